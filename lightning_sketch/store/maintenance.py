"""Maintenance of a store: verify its files, compact it, delete it."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sketch._files import check_folder, locked, sync_folder
from lightning_sketch.store.format import (
    FOLDERS,
    FOREVER,
    LOCK,
    MANIFEST,
    WRITER_LOCK,
    CorruptShard,
    Shard,
    ShardName,
    Snapshot,
    create_store,
    read_runs,
)
from lightning_sketch.store.index import Inventory, lineage_of
from lightning_sketch.store.writer import RowAppender

_NEVER = 1e6  # seconds: while compacting, files are cut by size alone
_SNAPSHOT = re.compile(r"rows(-\d+)?")
PRECONDITIONER = re.compile(r"[0-9a-f]{16}")
_OWN = {  # the names of a store's files in its folders, whose other files are the user's
    "attempts": re.compile(r"\d{8}\.json(\.\w+\.tmp)?"),
    "curvature": re.compile(r"[a-z]+(_[0-9a-f]{16}){1,2}\.safetensors(\.\w+\.tmp)?"),
    "preconditioner": re.compile(r"(\d{5}\.safetensors|preconditioner\.json)(\.\w+\.tmp)?"),
    "manifests": re.compile(rf"{MANIFEST.pattern}(\.\w+\.tmp)?"),
    "run": re.compile(r"\d{8}\.safetensors(\.\w+\.tmp)?|writer\.lock"),
}


def verify(path: Path, on_file: Callable[[], object] | None = None) -> int:
    """Read every file of rows, compare its checksum, and return the number of rows, visible or not.

    Args:
        path: The folder of the store.
        on_file: Called after each file.

    Raises:
        CorruptFile: if files are truncated, changed, foreign or missing; the message names all. Nothing is repaired.
    """
    snapshot = Snapshot.read(path)
    rows = 0

    def check(shard: Shard) -> None:
        nonlocal rows
        shard.check()
        rows += len(shard)
        if on_file is not None:
            on_file()

    problems = Inventory.of(snapshot, read_runs(snapshot), check).problems()
    if problems and Snapshot.read(path).number != snapshot.number:
        return verify(path, on_file)  # compaction has removed the files meanwhile
    if problems:
        raise CorruptShard(f"{len(problems)} files of {path} are not as they were written:\n" + "\n".join(problems))
    return rows


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep compactions and writers out of a store.

    Raises:
        Busy: if another process compacts the store or writes to it.
    """
    with locked(path / LOCK, f"{path} is being compacted by another process; try again when it has ended."):
        for file in sorted(path.glob(f"rows*/r*/a*/{WRITER_LOCK}")):
            run = f"rank {int(file.parts[-3][1:])} of run {int(file.parts[-2][1:])}"
            with locked(file, f"{run} in {path} is being written; try again when that fit or validation has ended."):
                pass
        yield


def compact(
    path: Path, kept_rows: Callable[[], Mapping[ShardName, Tensor]], shard_bytes: int, accept_loss: bool
) -> None:
    """Replace the rows of a store by some of them, in files of about `shard_bytes` bytes.

    Killed at any point, the store is as before or as after.

    Args:
        path: The folder of the store.
        kept_rows: Returns the positions of the rows to keep in each file, in order; called once nobody writes.
        shard_bytes: Bytes of rows in a file.
        accept_loss: Whether files may be missing, whose rows are lost then.

    Raises:
        Busy: if another process compacts the store or writes to it.
        CorruptFile: if a file is missing or has changed: a new, matching checksum would hide that.
    """
    snapshot = Snapshot.read(path)
    if not snapshot.store:
        create_store(path, snapshot.spec)
    with alone(path):
        old = Snapshot.read(path)
        runs = read_runs(old)
        inventory = Inventory.of(old, runs, Shard.check)
        problems = list(map(str, inventory.wrong)) if accept_loss else inventory.problems()
        if problems:
            listed = "\n".join(problems)
            raise CorruptShard(
                f"compaction of {path} would make losses final; restore these files before, or delete those that are "
                f"damaged and call compact(accept_loss=True):\n{listed}"
            )
        lineage, rows = lineage_of(runs, kept=old.kept), kept_rows()
        kept = {run.number: lineage.get(run.number, -1) for run in runs if run.stage == "fit"}
        kept = {run: min(step, old.kept.get(run, FOREVER)) for run, step in kept.items()}
        settled = {run.number: sorted({name.rank for name in rows if name.run == run.number}) for run in runs}
        new = replace(old, number=old.number + 1, kept=kept, settled=settled)
        try:
            _copy(old, new, rows, shard_bytes)
            for folder in (*new.folder.rglob("*/"), new.folder, path):
                sync_folder(folder)
            new.write()
        except BaseException:
            if Snapshot.read(path).number == old.number:
                _remove_rows(new.folder)
            raise
        for folder in path.iterdir():
            if _SNAPSHOT.fullmatch(folder.name) and folder != new.folder:
                _remove_rows(folder)


def _copy(old: Snapshot, new: Snapshot, rows: Mapping[ShardName, Tensor], shard_bytes: int) -> None:
    """Copy rows of one snapshot to another, rank by rank and run by run."""
    check_folder(new.folder)
    _remove_rows(new.folder)  # left by a compaction that was killed
    appender: RowAppender | None = None
    (new.folder / "manifests").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        for name, places in rows.items():
            if appender is None or (appender.rank, appender.run) != (name.rank, name.run):
                stack.close()
                sizes: dict[str, Any] = {"shard_bytes": shard_bytes, "queue_bytes": 2 * shard_bytes}
                appender = RowAppender(new, rank=name.rank, run=name.run, flush_seconds=_NEVER, **sizes)
                stack.enter_context(appender)
            appender.put(Shard(old, name).rows(places))


def erase(path: Path) -> None:
    """Delete the store of a folder, if there is one, but no file that is not of a store.

    Raises:
        Busy: if another process compacts the store or writes to it.
    """
    if not path.is_dir():
        return
    with alone(path):
        for name in ("spec.json", "generation.json"):  # without spec.json there is no store
            (path / name).unlink(missing_ok=True)
        for folder in path.iterdir():
            if _SNAPSHOT.fullmatch(folder.name):
                _remove_rows(folder)
        _remove(path / "attempts", _OWN["attempts"])
        _remove(path / "curvature", _OWN["curvature"])
        kept = path / "preconditioner"
        for folder in kept.iterdir() if kept.is_dir() and not kept.is_symlink() else ():
            if PRECONDITIONER.fullmatch(folder.name):
                _remove(folder, _OWN["preconditioner"])
        _remove_empty(kept)
        sync_folder(path)


def _remove_rows(folder: Path) -> None:
    """Remove the files of a snapshot."""
    if not folder.is_symlink() and folder.is_dir():
        for rank in folder.iterdir():
            if FOLDERS[0].fullmatch(rank.name):
                for run in rank.iterdir() if not rank.is_symlink() else ():
                    if FOLDERS[1].fullmatch(run.name):
                        _remove(run, _OWN["run"])
                _remove_empty(rank)
        _remove(folder / "manifests", _OWN["manifests"])
    _remove_empty(folder)


def _remove(folder: Path, own: re.Pattern[str]) -> None:
    """Remove a store's files from a folder, and the folder if it is empty then; follow no link."""
    for file in folder.iterdir() if not folder.is_symlink() and folder.is_dir() else ():
        if own.fullmatch(file.name):
            with contextlib.suppress(PermissionError):  # open in another process on Windows; the next time removes it
                file.unlink()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty; of a link to a folder, the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        with contextlib.suppress(OSError):  # it has files of the user
            folder.rmdir()
