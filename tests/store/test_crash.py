"""A process that is killed at any time loses no committed rows and leaves no half-written files."""

import random
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import Started
from test_row_store import rows, written

from lightning_sketch.attribution import GradientStore

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("crash.py")


def printed(lines, word):
    """The last number that was printed after this word."""
    return next((int(line.split()[1]) for line in reversed(lines) if line.startswith(f"{word} ")), None)


def check(folder, flushed):
    """The files are complete; each step up to the last flush has its row, exactly once, with no gap."""
    store = GradientStore.open(folder)
    store.verify()
    steps = store.metadata()["step"]
    assert steps.tolist() == list(range(1, len(steps) + 1))
    assert len(steps) >= flushed
    assert torch.equal(store.read().sketches, rows(steps.tolist()).sketches)
    return len(steps)


def test_killed_at_random_times_and_resumed(tmp_path):
    """Eight runs, each resumed from a checkpoint at the last flush or an older one."""
    draw = random.Random(0)
    parent, resumed_at = 0, 0
    for _ in range(8):
        process = Started(PROGRAM, tmp_path, parent, resumed_at)
        lines = []
        wanted = draw.randint(1, 30)
        while not (printed(lines, "FLUSHED") or 0) >= resumed_at + wanted:
            lines.append(process.stdout.readline())
            assert lines[-1], "the program ended before it was killed"
        time.sleep(draw.random() * 0.02)
        process.kill()
        lines += process.communicate()[0].splitlines()
        flushed = printed(lines, "FLUSHED")
        check(tmp_path, flushed)
        parent = printed(lines, "RUN")
        resumed_at = max(resumed_at, flushed - draw.choice([0, 5]))


@pytest.mark.parametrize("kill", range(1, 26))
def test_killed_in_each_step_of_a_commit(tmp_path, kill):
    """The first calls write the spec and the run, the next ones the first files of rows."""
    process = Started(PROGRAM, tmp_path, 0, 0, f"kill={kill}")
    lines = process.communicate()[0].splitlines()
    assert process.returncode == -9
    if not (tmp_path / "spec.json").exists():
        assert not lines
        return
    check(tmp_path, printed(lines, "FLUSHED") or 0)
    store = written(tmp_path).compact()  # removes temporary files, which may be those of another process before
    assert not list(store.path.glob("rows*/**/*.tmp"))


@pytest.mark.parametrize("kill", [1, 2, 4, 7, 11, 16, 20, 22, 23, 24, 25, 26, 28, 30, 33])
def test_killed_while_compacting(tmp_path, kill):
    written(tmp_path, *(rows([s]) for s in range(1, 8)))
    written(tmp_path, *(rows([s]) for s in (5, 6)), parent=1, parent_step=4)
    process = Started(PROGRAM, tmp_path, 0, 0, "compact", f"kill={kill}")
    process.communicate()
    assert check(tmp_path, 6) == 6
    store = GradientStore.open(tmp_path).compact()
    assert store.verify() == 6
    assert check(tmp_path, 6) == 6


def test_a_full_disk_is_raised_at_the_next_row_and_committed_rows_stay(tmp_path):
    """A limit on the size of files stands in for a full disk: writing past it raises an OSError."""
    store = written(tmp_path, rows(range(1, 6)))
    appender = store.appender(store.begin_run("fit", parent=1, parent_step=5), shard_bytes=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        appender.put(rows([6]))
        appender._thread.join(timeout=3600)  # the thread ends with its error
        with pytest.raises(RuntimeError, match=r"rows could not be written to .*Rows committed before are intact"):
            appender.put(rows([7]))
        with pytest.raises(RuntimeError, match="could not be written"):
            appender.flush()
        with pytest.raises(RuntimeError, match="could not be written"):
            appender.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert check(tmp_path, 5) == 5


def test_put_waits_for_the_disk_only_when_the_queue_is_full(tmp_path, monkeypatch):
    """About 130 bytes a row and 1500 in the queue: while the disk stands still some ten rows pass, and then none."""
    from lightning_sketch.store import writer as module

    store = written(tmp_path)
    quick, disk, passed, full = module.write_shard, threading.Event(), [], threading.Event()

    def stopped(*args):
        assert disk.wait(timeout=3600)
        return quick(*args)

    class Room(threading.Condition):
        """Reports that put() waits."""

        def wait(self, timeout=None):
            full.set()
            return super().wait(timeout)

    monkeypatch.setattr(module, "write_shard", stopped)
    with store.appender(store.begin_run("fit"), shard_bytes=1, queue_bytes=1500) as appender:
        appender._room = Room()

        def put_all():
            for step in range(1, 16):
                appender.put(rows([step]))
                passed.append(step)

        putting = threading.Thread(target=put_all)
        putting.start()
        assert full.wait(timeout=3600)
        assert 5 <= len(passed) < 15
        disk.set()
        putting.join(timeout=3600)
    assert len(passed) == 15
    assert check(tmp_path, 15) == 15
