"""Writes rows to files in a background thread, behind a bounded queue.

put() copies rows to the CPU in the stored type and returns; it waits only while the queue is full. An error in the
thread is raised at the next put, flush or close.
"""

import queue
import threading
import time
from pathlib import Path

from lightning_sketch._files import TEMPORARY
from lightning_sketch.store.shards import ShardName, narrowed, write_shard
from lightning_sketch.store.sketched_gradients import SketchedGradients
from lightning_sketch.store.spec import StoreSpec

_WAIT = 0.1  # seconds between checks of the thread's error


class RowAppender:
    """Appends the rows of one process of a run to a store, in a background thread; see `RowStore.appender`.

    Args:
        folder: The folder of the store's rows, see `manifest.rows_folder`.
        spec: The spec of the store.
        rank: Rank of this process.
        run: Number of the run.
        shard_bytes: Write a file when its rows have this many bytes,
        flush_seconds: or when its first row is this old.
        queue_bytes: Most bytes that wait for the disk.

    Attributes:
        rows: Number of rows that were put.

    Raises:
        RuntimeError: from `put`, `flush` and `close`, if a file could not be written. Committed rows stay intact.

    Example::

        with store.appender(store.begin_run("fit")) as appender:
            appender.put(rows)
            appender.flush()  # now the rows are on the disk, whatever happens
    """

    def __init__(
        self,
        folder: Path,
        spec: StoreSpec,
        *,
        rank: int,
        run: int,
        shard_bytes: int = 64 << 20,
        flush_seconds: float = 60.0,
        queue_bytes: int = 256 << 20,
    ):
        self.folder, self.spec, self.rank, self.run = folder, spec, rank, run
        self.shard_bytes, self.flush_seconds, self.queue_bytes = shard_bytes, flush_seconds, queue_bytes
        self.rows, self._closed = 0, False
        self._bytes, self._room = 0, threading.Condition()
        self._queue: queue.SimpleQueue[SketchedGradients | threading.Event | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        own = (self.folder / ShardName(run, rank, 0).path).parent
        for left in own.parent.glob(f"*/*{TEMPORARY}"):
            left.unlink()
        self._first = 1 + max((ShardName.of(path).sequence for path in own.glob("*.safetensors")), default=-1)
        self._thread = threading.Thread(target=self._write_queue, name="sketch store", daemon=True)
        self._thread.start()

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
        narrow = narrowed(rows, self.spec.dtype)
        size = _size(narrow)
        if self._bytes + size > self.queue_bytes:
            self._queue.put(threading.Event())  # makes the thread write what it has, which makes room
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
        self._check()
        done = threading.Event()
        self._queue.put(done)
        while not done.wait(_WAIT):
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
        self._check()

    def __enter__(self) -> "RowAppender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        """Raise the thread's error, if it had one."""
        if self._error is not None:
            raise RuntimeError(
                f"rows could not be written to {self.folder}: {self._error}. Rows committed before are intact; make "
                "room, or choose another dirpath, and resume from a checkpoint."
            ) from self._error

    def _write_queue(self) -> None:
        """Write the rows of the queue until a None comes: the body of the thread."""
        sequence, since = self._first, 0.0
        pending: list[SketchedGradients] = []

        def write() -> None:
            """Write the pending rows as one file."""
            nonlocal sequence, pending
            if pending:
                name = ShardName(self.run, self.rank, sequence)
                rows = pending[0] if len(pending) == 1 else SketchedGradients.cat(pending)
                write_shard(self.folder, name, self.spec, rows)
                sequence += 1
                with self._room:
                    self._bytes -= sum(map(_size, pending))
                    self._room.notify_all()
                pending = []

        try:
            while True:
                try:
                    item = self._queue.get(timeout=self.flush_seconds if pending else None)
                except queue.Empty:
                    write()
                    continue
                if isinstance(item, SketchedGradients):
                    since = since if pending else time.monotonic()
                    pending.append(item)
                    full = sum(map(_size, pending)) >= min(self.shard_bytes, self.queue_bytes // 2)
                    if full or time.monotonic() - since > self.flush_seconds:
                        write()
                    continue
                write()
                if item is None:
                    return
                item.set()
        except BaseException as error:  # raised in the training thread by _check
            self._error = error


def _size(rows: SketchedGradients) -> int:
    """Return the bytes of rows."""
    return rows.sketches.nbytes + sum(column.nbytes for column in rows.columns.values())
