"""What a store costs: opening it, checking it, selecting rows, appending rows. No peer is needed; three minutes.

python benchmarks/store_speed.py [--folder FOLDER]

Times are CPU seconds, the least of three, or ratios of two such times of one run; torch has one thread. The first pass
over a store that was just opened includes opening it, and compares each file with its checksum in a second thread.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from lightning_sketch.attribution import GradientStore, RowAppender, SketchedGradients, StoreSpec, top_k
from lightning_sketch.operators import BlockSRHT


def rows(sketch, count, start=0, **columns):
    steps = torch.arange(start, start + count)
    sketches = torch.randn(count, sketch.dim)
    weights = torch.full_like(steps, 1 << 60)
    return SketchedGradients(sketches, sketch, {"step": steps, "example_id": steps, "fingerprint": weights, **columns})


def store(folder, dim, parts, **sizes):
    sketch = BlockSRHT(max(100, dim), dim)
    spec = StoreSpec(sketch.spec(), [["weight", [sketch.n]]])
    made = GradientStore.create(folder, spec)
    with made.appender(made.begin_run("validate"), **sizes) as appender:
        for part in parts(sketch):
            appender.put(part)
    return GradientStore.open(folder)


def least(function, repeats=3, clock=time.process_time):
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def many_files(folder):
    sync, os.fsync = os.fsync, lambda handle: None  # makes the files faster, and nothing that is measured
    store(folder, 4, lambda sketch: (rows(sketch, 1, i) for i in range(4000)), shard_bytes=1)
    os.fsync = sync
    print(f"open 4,000 files of a row: {least(lambda: GradientStore.open(folder)):.2f} s")


def many_rows(folder):
    store(folder, 64, lambda sketch: (rows(sketch, 10_000, i) for i in range(0, 1_000_000, 10_000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"open 1,000,000 rows: {least(lambda: GradientStore.open(folder)):.2f} s", end="")
    print(f", {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3:.0f} MB more memory")


def selection(folder):
    """Rows of five sources in turn, a fifth of which is selected."""
    made = store(
        folder,
        1024,
        lambda sketch: (rows(sketch, 2000, i, source=torch.arange(2000) % 5) for i in range(0, 200_000, 2000)),
    )
    query = made.where(example_id=[0, 1, 2]).read()
    top_k(query, made)
    whole = least(lambda: top_k(query, made))
    part = made.where(source=3)
    print(
        f"top_k of a fifth of 200,000 interleaved rows of 1024: {least(lambda: top_k(query, part)) / whole:.2f} of all"
    )


def checks(folder):
    made = store(folder, 4096, lambda sketch: (rows(sketch, 1000, i) for i in range(0, 50_000, 1000)))
    for queries in (10, 100):
        query = made.where(example_id=range(queries)).read()
        top_k(query, made)
        checked = least(lambda query=query: top_k(query, made), clock=time.perf_counter)
        cpu = least(lambda query=query: top_k(query, made))
        first = least(lambda query=query: top_k(query, GradientStore.open(folder)), clock=time.perf_counter)
        first_cpu = least(lambda query=query: top_k(query, GradientStore.open(folder)))
        print(
            f"first top_k of {queries} queries over 50,000 rows of 4096: {first / checked:.2f} of a later one by the "
            f"clock, {first_cpu / cpu:.2f} in CPU time"
        )


def appending(folder):
    sketch = BlockSRHT(100, 4)
    for count in (500, 2000, 8000):
        parts = [rows(sketch, 1, i) for i in range(count)]
        made = GradientStore.create(folder / str(count), StoreSpec(sketch.spec(), [["weight", [100]]]))
        appender: RowAppender = made.appender(made.begin_run("fit"), flush_seconds=1e6)
        start = time.process_time()
        for part in parts:
            appender.put(part)
        appender.flush()
        print(f"append {count} rows one by one: {1e3 * (time.process_time() - start) / count:.2f} ms of CPU a row")
        appender.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    folder = Path(tempfile.mkdtemp(dir=parser.parse_args().folder))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        for job in (many_files, many_rows, selection, checks, appending):
            job(folder / job.__name__)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
