"""Where the rows of a store are: in a folder that compaction replaces as a whole.

`generation.json` names the folder that counts; without it that is the first. A new one is filled, then named, then the
old one removed: killed at any point, one whole folder counts.
"""

import json
import shutil
from pathlib import Path

from lightning_sketch.attribution.files import commit

_POINTER = "generation.json"


def rows_folder(path: Path) -> Path:
    """The folder that counts."""
    return _folder(path, _current(path))


def next_folder(path: Path) -> Path:
    """An empty folder for the rows that will replace the present ones."""
    folder = _folder(path, _current(path) + 1)
    shutil.rmtree(folder, ignore_errors=True)  # of a compaction that was interrupted
    folder.mkdir(parents=True)
    return folder


def switch(path: Path) -> None:
    """Let the next folder count, and remove the others."""
    number = _current(path) + 1
    commit(path / _POINTER, json.dumps({"generation": number}).encode())
    for folder in path.glob("rows*"):
        if folder != _folder(path, number):
            shutil.rmtree(folder)


def _current(path: Path) -> int:
    pointer = path / _POINTER
    return json.loads(pointer.read_text())["generation"] if pointer.exists() else 1


def _folder(path: Path, number: int) -> Path:
    return path / ("rows" if number == 1 else f"rows-{number}")
