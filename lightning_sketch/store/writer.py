"""Writes rows to files in a background thread, behind a bounded queue.

put() copies rows to the CPU in the stored type and returns; it waits only while the queue is full. An error in the
thread is raised at the next put, flush or close.
"""

import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_sketch._files import TEMPORARY, acquire, check_folder, locked, make_folder
from lightning_sketch.store.format import (
    LOCK,
    WRITER_LOCK,
    Manifest,
    Shard,
    ShardName,
    Snapshot,
    narrowed,
    write_shard,
)
from lightning_sketch.store.sketched_gradients import SketchedGradients

_WAIT = 0.1  # seconds between checks of the thread's error


class _Written(threading.Event):
    """An item of the queue that is set once the rows before it are on the disk, marked if `doubted`."""

    def __init__(self, doubted: bool = False):
        super().__init__()
        self.doubted = doubted


class RowAppender:
    """Appends the rows of one process of a run to a store, in a background thread; see `RowStore.appender`.

    It holds a lock until it is closed: a second appender of its rank and run is refused, and so is compaction.

    Args:
        snapshot: The snapshot that the rows are added to.
        rank: Rank of this process.
        run: Number of the run.
        shard_bytes: Write a file when its rows have this many bytes,
        flush_seconds: or when its first row is this old.
        queue_bytes: Most bytes that wait for the disk.

    Attributes:
        rows: Number of rows that were put.

    Raises:
        RuntimeError: from `put`, `flush` and `close`, if a file could not be written. Committed rows stay intact.
        Busy: if another process writes the rows of this rank and run.

    Example::

        with store.appender(store.begin_run("fit")) as appender:
            appender.put(rows)
            appender.flush()  # now the rows are on the disk, whatever happens
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        rank: int,
        run: int,
        shard_bytes: int = 64 << 20,
        flush_seconds: float = 60.0,
        queue_bytes: int = 256 << 20,
    ):
        if rank < 0:
            raise ValueError(f"need rank >= 0, got {rank}.")
        self.snapshot, self.rank, self.run = snapshot, rank, run
        self.shard_bytes, self.flush_seconds, self.queue_bytes = shard_bytes, flush_seconds, queue_bytes
        self.rows, self._closed = 0, False
        self._bytes, self._room = 0, threading.Condition()
        self._queue: queue.SimpleQueue[SketchedGradients | _Written | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        own = (snapshot.folder / ShardName(run, rank, 0).path).parent
        for folder in (snapshot.folder, own.parent, own, snapshot.folder / "manifests"):
            check_folder(folder)
            make_folder(folder)
        self._lock = acquire(
            own / WRITER_LOCK,
            f"rank {rank} of run {run} in {snapshot.path} is being written by another process, which holds "
            f"{own / WRITER_LOCK}; end it, or begin another run.",
        )
        try:
            for left in own.glob(f"*{TEMPORARY}"):
                left.unlink()
            self._manifest = self._committed()
            self._manifest.write(snapshot, rank, run)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._write_queue, name="sketch store", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, *, rank: int, run: int, **sizes: Any) -> "RowAppender":
        """Open the appender of a rank's run in the store of a folder, after a compaction that is under way."""
        with locked(path / LOCK):
            return cls(Snapshot.read(path), rank=rank, run=run, **sizes)

    def put(self, rows: SketchedGradients) -> None:
        """Queue a copy of rows for writing; waits only while the queue is full.

        Raises:
            RuntimeError: if rows could not be written before, or the appender is closed.
        """
        self._check()
        if self._closed:
            raise RuntimeError("the appender is closed; begin another run for more rows.")
        if not len(rows):
            return
        narrow = narrowed(rows, self.snapshot.spec.dtype)
        size = narrow.nbytes
        if self._bytes + size > self.queue_bytes:
            self._queue.put(_Written())  # makes the thread write what it has, which makes room
        with self._room:
            while self._bytes and self._bytes + size > self.queue_bytes and self._error is None:
                self._room.wait(_WAIT)
            self._bytes += size
        self._check()
        self.rows += len(narrow)
        self._queue.put(narrow)

    def flush(self) -> None:
        """Wait until all rows are on the disk.

        Raises:
            RuntimeError: if rows could not be written.
        """
        self._wait_for(_Written())

    def doubt_scale(self) -> None:
        """Mark all rows of this rank's run up to now as of unknown scale (`scale_known` False), on the disk too.

        Raises:
            RuntimeError: if rows or the mark could not be written, or the appender is closed.
        """
        if self._closed:
            raise RuntimeError("the appender is closed; doubt the scale of its rows before.")
        self._wait_for(_Written(doubted=True))

    def _wait_for(self, done: "_Written") -> None:
        """Wait until all rows, and the mark if there is one, are on the disk."""
        self._check()
        self._queue.put(done)
        while self._thread.is_alive() and not done.wait(_WAIT):
            self._check()
        self._check()

    def close(self) -> None:
        """Write all rows and stop the thread; a second call does nothing.

        Raises:
            RuntimeError: if rows could not be written.
        """
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._release()
        self._check()

    def __enter__(self) -> "RowAppender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _committed(self) -> Manifest:
        """Return the manifest of what is there; a writer that was killed may have committed one shard more."""
        manifest = self.snapshot.manifest(self.rank, self.run)
        try:
            last = Shard(self.snapshot, ShardName(self.run, self.rank, manifest.files))
        except FileNotFoundError:
            return manifest
        return Manifest(manifest.files + 1, manifest.rows + len(last), last.seal, manifest.doubted)

    def _release(self) -> None:
        """Let others write the rows of this rank and run."""
        if self._lock is not None:
            self._lock.release()

    def _check(self) -> None:
        """Raise the thread's error, if it had one."""
        if self._error is not None:
            vanished = isinstance(self._error, FileNotFoundError)
            advice = "Rows committed before are intact; make room, or choose another dirpath, and"
            raise RuntimeError(
                f"rows could not be written to {self.snapshot.path}: {self._error}. "
                f"{'Choose another dirpath, or put it back, and' if vanished else advice} resume from a checkpoint."
            ) from self._error

    def _check_place(self) -> None:
        """Refuse a manifest that is not as it was: rows do not go to a deleted store, or to another in its place."""
        there = (self.snapshot.folder / Manifest.path(self.rank, self.run)).exists()
        if not there or self.snapshot.manifest(self.rank, self.run) != self._manifest:
            raise FileNotFoundError("the store was deleted, moved or replaced while it was being written")

    def _write(self, pending: list[SketchedGradients], size: int) -> None:
        """Write pending rows of this size as one file, then the manifest; no folder is made anew."""
        self._check_place()
        before, snapshot = self._manifest, self.snapshot
        rows = pending[0] if len(pending) == 1 else SketchedGradients.cat(pending)
        seal = write_shard(snapshot, ShardName(self.run, self.rank, before.files), rows, before.seal)
        self._manifest = Manifest(before.files + 1, before.rows + len(rows), seal, before.doubted)
        self._manifest.write(snapshot, self.rank, self.run)
        with self._room:
            self._bytes -= size
            self._room.notify_all()

    def _doubt(self) -> None:
        """Mark the rows of all shards that are committed as of unknown scale."""
        self._check_place()
        self._manifest = replace(self._manifest, doubted=self._manifest.files)
        self._manifest.write(self.snapshot, self.rank, self.run)

    def _write_queue(self) -> None:
        """Write the rows of the queue until a None comes: the body of the thread."""
        pending: list[SketchedGradients] = []
        size, due = 0, float("inf")  # bytes of the pending rows, and when the first of them is to be on the disk
        limit = min(self.shard_bytes, self.queue_bytes // 2)
        try:
            while True:
                item: SketchedGradients | _Written | None
                try:
                    item = self._queue.get(timeout=max(0.0, due - time.monotonic()) if pending else None)
                except queue.Empty:
                    item = _Written()
                if isinstance(item, SketchedGradients):
                    due = due if pending else time.monotonic() + self.flush_seconds
                    pending.append(item)
                    size += item.nbytes
                    if size < limit and time.monotonic() < due:
                        continue
                if pending:
                    self._write(pending, size)
                    pending, size = [], 0
                if item is None:
                    return
                if isinstance(item, _Written):
                    if item.doubted:
                        self._doubt()
                    item.set()
        except BaseException as error:  # raised in the training thread by _check
            self._error = error
