"""A program that appends rows to a store until it is killed; it prints the number of its run and each step flushed.

python crash.py FOLDER PARENT PARENT_STEP [compact] [kill=K]

kill=K: the process kills itself in its K-th call that touches the disk: write, fsync, rename, link or removal.
"""

import os
import signal
import sys
from pathlib import Path

from test_row_store import rows, spec

from lightning_sketch import _files as files
from lightning_sketch.attribution import GradientStore


def kill_in_call(number: int):
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    files.open = counted(open)


def main(folder: str, parent: str, parent_step: str, *options: str):
    for option in options:
        if option.startswith("kill="):
            kill_in_call(int(option.removeprefix("kill=")))
    store = GradientStore.create(Path(folder), spec())
    if "compact" in options:
        store.compact()
        print("COMPACTED", flush=True)
        return
    resumed = {"parent": int(parent), "parent_step": int(parent_step)} if int(parent) else {}
    run = store.begin_run("fit", **resumed)
    print(f"RUN {run.number}", flush=True)
    step = int(parent_step)
    with store.appender(run, shard_bytes=300) as appender:
        while step < 100_000:
            step += 1
            appender.put(rows([step]))
            if step % 5 == 0:
                appender.flush()
                print(f"FLUSHED {step}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
