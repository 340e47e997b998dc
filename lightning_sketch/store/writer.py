"""Rows to files, beside the training: one thread behind a bounded queue.

put() copies rows to the CPU, narrows them and returns; it waits only if the disk is slower than the queue is long.
What goes wrong in the thread is raised at the next put, flush or close.
"""

import queue
import threading
import time
from pathlib import Path

from lightning_sketch._files import TEMPORARY
from lightning_sketch.store.shards import ShardName, narrowed, write_shard
from lightning_sketch.store.sketched_gradients import SketchedGradients
from lightning_sketch.store.spec import StoreSpec

_WAIT = 0.1


class RowAppender:
    """Append rows to a store, for one rank of one attempt.

    Args:
        folder: of the store's rows, see `generations.rows_folder`.
        spec: of its rows.
        rank: number of this process.
        attempt: number of the attempt.
        shard_bytes: a file is written when so many bytes of rows are there,
        flush_seconds: or when its first row is so old.
        queue_bytes: most bytes that wait for the disk.

    Raises:
        RuntimeError: from `put`, `flush` and `close`, if a file could not be written. Committed rows are not touched.

    Example::

        with RowAppender(rows_folder(path), spec, rank=0, attempt=1) as appender:
            appender.put(rows)
            appender.flush()  # now they are on the disk, whatever happens
    """

    def __init__(
        self,
        folder: Path,
        spec: StoreSpec,
        rank: int,
        attempt: int,
        shard_bytes: int = 64 << 20,
        flush_seconds: float = 60.0,
        queue_bytes: int = 256 << 20,
    ):
        self.folder, self.spec, self.rank, self.attempt = folder, spec, rank, attempt
        self.shard_bytes, self.flush_seconds, self.queue_bytes = shard_bytes, flush_seconds, queue_bytes
        self.rows, self._closed = 0, False
        self._bytes, self._room = 0, threading.Condition()
        self._queue: queue.SimpleQueue[SketchedGradients | threading.Event | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        own = (self.folder / ShardName(attempt, rank, 0).path).parent
        for left in own.parent.glob(f"*/*{TEMPORARY}"):
            left.unlink()
        self._first = 1 + max((ShardName.of(path).sequence for path in own.glob("*.safetensors")), default=-1)
        self._thread = threading.Thread(target=self._run, name="sketch store", daemon=True)
        self._thread.start()

    def put(self, rows: SketchedGradients) -> None:
        """Hand over rows; they may be changed after."""
        self._check()
        if self._closed:
            raise RuntimeError("the appender is closed; begin another attempt for more rows.")
        if not len(rows):
            return
        narrow = narrowed(rows, self.spec.dtype)
        size = _size(narrow)
        if self._bytes + size > self.queue_bytes:
            self._queue.put(threading.Event())  # what is gathered goes to the disk now, and makes room
        with self._room:
            while self._bytes and self._bytes + size > self.queue_bytes and self._error is None:
                self._room.wait(_WAIT)
            self._bytes += size
        self._check()
        self.rows += len(narrow)
        self._queue.put(narrow)

    def flush(self) -> None:
        """Return when all rows are committed."""
        self._check()
        done = threading.Event()
        self._queue.put(done)
        while not done.wait(_WAIT):
            self._check()
        self._check()

    def close(self) -> None:
        """Commit all rows and stop; a second time nothing happens."""
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
        if self._error is not None:
            raise RuntimeError(
                f"rows could not be written to {self.folder}: {self._error}. Rows committed before are intact; make "
                "room, or choose another dirpath, and resume from a checkpoint."
            ) from self._error

    def _run(self) -> None:
        sequence, pending, since = self._first, [], 0.0

        def write() -> None:
            nonlocal sequence, pending
            if pending:
                name = ShardName(self.attempt, self.rank, sequence)
                write_shard(self.folder, name, self.spec, joined(pending))
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
        except BaseException as error:  # told to the training thread
            self._error = error


def joined(parts: list[SketchedGradients]) -> SketchedGradients:
    """All rows of the parts."""
    return parts[0] if len(parts) == 1 else SketchedGradients.cat(parts)


def _size(rows: SketchedGradients) -> int:
    return rows.sketches.nbytes + sum(column.nbytes for column in rows.columns.values())
