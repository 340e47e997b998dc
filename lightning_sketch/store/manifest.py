"""Where the rows of a store are: in a folder that compaction replaces as a whole.

`generation.json` names the folder that counts; without it that is the first. A new one is filled, then named, then the
old one removed: killed at any point, one whole folder counts. It also says up to which step each fit was kept.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sketch._files import commit

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


def switch(path: Path, kept: Mapping[int, int]) -> None:
    """Let the next folder count, with the last step that it has of each fit, and remove the others."""
    number = _current(path) + 1
    kept = {str(fit): min(step, kept_steps(path).get(fit, step)) for fit, step in kept.items()}
    commit(path / _POINTER, json.dumps({"generation": number, "kept": kept}).encode())
    for folder in path.glob("rows*"):
        if folder != _folder(path, number):
            shutil.rmtree(folder)


def kept_steps(path: Path) -> dict[int, int]:
    """The last step of each fit that no compaction has dropped; fits that began later are whole."""
    return {int(fit): step for fit, step in _read(path).get("kept", {}).items()}


def _current(path: Path) -> int:
    return _read(path).get("generation", 1)


def _read(path: Path) -> dict[str, Any]:
    pointer = path / _POINTER
    return json.loads(pointer.read_text()) if pointer.exists() else {}


def _folder(path: Path, number: int) -> Path:
    return path / ("rows" if number == 1 else f"rows-{number}")
