"""The runs of a search on disk, a folder each, which several processes or machines may share.

    intrinsic_dimension/fit-32-0-8d2f0c.../   kind, dim, seed, and a hash of all settings
        run.json            the finished run
        step=400.ckpt       the last checkpoint, from which a killed run goes on
        checkpoint.json     its name and a hash of its contents
        lock                held by the process that trains it, and released by the end of that process

Of settings only hashes are written, since hyper-parameters may be secret. Each file is written as a whole, so that no
process loses what another one wrote. Where a file system has no locks, which is said, two processes may do the same
run; then both record it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.utils import _pytree as pytree

from lightning_sketch._files import CorruptFile, acquire, make_folder, read_document, write_document

# kind ("fit" or "search"), dim (n for full training), seed, scale of the directions, value of the metric and
# the optimizer step at which it was validated, best validation, optimizer steps, status, and path of the checkpoint.
Run = dict[str, Any]

FOLDER, _FIRST_VERSION = "intrinsic_dimension", "intrinsic_dimension.json"
_RUN, _CHECKPOINT = "run.json", "checkpoint.json"
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("kind", "status", "monitor"), str),
    **dict.fromkeys(("dim", "seed", "steps", "validated"), int),
    **dict.fromkeys(("scale", "value", "best"), float),
    "settings": dict,
}


def hashed(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of each of these settings, without the memory addresses in the names of functions."""
    whole = pytree.tree_map(lambda leaf: leaf.tolist() if hasattr(leaf, "tolist") else leaf, dict(settings))
    texts = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(setting)) for name, setting in whole.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


@dataclass(frozen=True)
class Entry:
    """A run on disk, finished or not.

    Attributes:
        folder: The folder of the run.
        settings: The hashes of its settings.
    """

    folder: Path
    settings: dict[str, str]

    def run(self) -> Run | None:
        """Return the run if it has finished, with the path of its checkpoint.

        Raises:
            CorruptFile: If its file is not what was written.
        """
        try:
            found = _read(self.folder / _RUN, _TYPES)
        except FileNotFoundError:
            return None
        kept = {name: found[name] for name in _TYPES if name not in ("settings", "monitor")}
        return {**kept, "checkpoint": self._named_checkpoint()}

    def record(self, run: Run, monitor: str) -> None:
        """Write a finished run."""
        fields = {name: run[name] for name in _TYPES if name in run}
        write_document(self.folder / _RUN, {**fields, "monitor": monitor, "settings": self.settings})

    def claim(self) -> FileLock | None:
        """Keep other processes from training this run, as long as the lock is held; None where there are no locks.

        Raises:
            Busy: If another process trains it.
        """
        make_folder(self.folder)
        return acquire(self.folder / "lock", busy=f"another process trains {self.folder.name}")

    def checkpoint(self) -> str | None:
        """Return the path of the last checkpoint, whose contents have been compared with their hash.

        Raises:
            CorruptFile: If it is not what was written.
        """
        path = self._named_checkpoint()
        return None if path is None else str(checked_checkpoint(path))

    def seal(self, path: Path) -> str | None:
        """Make a checkpoint that has just been written the last one; return the path of the one before, if any."""
        before = self._named_checkpoint()
        write_document(self.folder / _CHECKPOINT, {"file": path.name, "sha256": _sha256(path, sync=True)})
        return None if before == str(path) else before

    def _named_checkpoint(self) -> str | None:
        try:
            return str(self.folder / _read(self.folder / _CHECKPOINT, {"file": str})["file"])
        except FileNotFoundError:
            return None


class Ledger:
    """The runs in a folder.

    Args:
        folder: Where the folder of runs is, or will be.
    """

    def __init__(self, folder: Path):
        self.path, self.first_version = folder / FOLDER, folder / _FIRST_VERSION

    def entry(self, kind: str, dim: int, seed: int, scale: float, settings: Mapping[str, Any]) -> Entry:
        """Return the place of a run with these settings, of which some may be hashes."""
        hashes = hashed(settings)
        name = hashlib.sha256(json.dumps([scale, hashes], sort_keys=True).encode()).hexdigest()[:16]
        return Entry(self.path / f"{kind}-{dim}-{seed}-{name}", hashes)

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Return in what recorded runs differ from these settings: the fewest names; nothing if some run does not."""
        here, found = hashed(settings), []
        for path in self.path.glob(f"*/{_RUN}"):
            with suppress(CorruptFile, OSError):  # which are named if their run is needed
                there = _read(path, _TYPES)["settings"]
                found.append([name for name in here if there.get(name) != here[name]])
        return min(found, key=len, default=[])


def checked_checkpoint(path: str | Path) -> Path:
    """Return the path of a run's checkpoint, after comparing its contents with their hash.

    Raises:
        CorruptFile: If it is not what was written.
        FileNotFoundError: If its hash is missing.
    """
    path = Path(path)
    named = _read(path.with_name(_CHECKPOINT), {"file": str, "sha256": str})
    if not path.exists() or (named["file"], named["sha256"]) != (path.name, _sha256(path)):
        raise CorruptFile(
            f"{path} is not the checkpoint that was written there; restore it from a copy, or delete the folder "
            f"{path.parent}, and the run is trained again."
        )
    return path


def _read(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return read_document(path, types)
    except CorruptFile as error:
        raise CorruptFile(f"{error} Or delete the folder {path.parent}, and the run is trained again.") from error


def _sha256(path: Path, sync: bool = False) -> str:
    """Return a hash of the contents of a file, or of a folder of a distributed checkpoint."""
    digest = hashlib.sha256()
    for part in sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]:
        with part.open("r+b" if sync else "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            if sync:
                os.fsync(file.fileno())
    return digest.hexdigest()
