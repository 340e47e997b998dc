"""The current snapshot of a store: the folder of rows that compaction replaces as a whole.

`generation.json` has the number of the current snapshot; without the file it is the first. Compaction fills a new
snapshot, then names it there, then removes the old one: killed at any point, one complete snapshot is current. The file
also has the last step of each fit that compaction has kept.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sketch._files import commit

_MANIFEST = "generation.json"


def rows_folder(path: Path) -> Path:
    """Return the folder of the current snapshot."""
    return _folder(path, _current(path))


def next_folder(path: Path) -> Path:
    """Make an empty folder for the next snapshot."""
    folder = _folder(path, _current(path) + 1)
    shutil.rmtree(folder, ignore_errors=True)  # left by a compaction that was interrupted
    folder.mkdir(parents=True)
    return folder


def switch(path: Path, kept: Mapping[int, int]) -> None:
    """Make the next snapshot the current one and remove the others.

    Args:
        path: The folder of the store.
        kept: The last step of each fit that the next snapshot has, by the number of the fit's run.
    """
    number = _current(path) + 1
    steps = {str(fit): min(step, kept_steps(path).get(fit, step)) for fit, step in kept.items()}
    commit(path / _MANIFEST, json.dumps({"generation": number, "kept": steps}).encode())
    for folder in path.glob("rows*"):
        if folder != _folder(path, number):
            shutil.rmtree(folder)


def kept_steps(path: Path) -> dict[int, int]:
    """Return the last step of each fit that compaction has kept; fits that began later are complete and not listed."""
    return {int(fit): step for fit, step in _read(path).get("kept", {}).items()}


def _current(path: Path) -> int:
    return _read(path).get("generation", 1)


def _read(path: Path) -> dict[str, Any]:
    manifest = path / _MANIFEST
    return json.loads(manifest.read_text()) if manifest.exists() else {}


def _folder(path: Path, number: int) -> Path:
    return path / ("rows" if number == 1 else f"rows-{number}")
