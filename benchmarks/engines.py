"""Measure `top_k` by one process and by Ray's workers, and the model that says what a billion rows would take.

Rows are random numbers in a store of bfloat16 and in a Lance dataset of float32, in files of 16,384 rows; 100 queries.
The pages of the files are in memory, so that nothing here says how fast a disk or a network is. One thread a worker.

seconds    the whole of `top_k`, or of `ray_top_k`; the median of three
columns    bytes of the columns of a row, which the calling process holds

The model, fitted to one worker and the smaller number of rows, and tested by all other lines:

    seconds = a + rows (c + d / workers)

a   what ray_top_k takes for 1,024 rows        c   columns are read, rows selected and sent, by the caller
d   rows are read and multiplied: bytes to be read, and 2 dim queries operations a row

    python benchmarks/engines.py [dim] [rows ...]         # needs lightning-sketch[lance,ray]; two cores
"""

import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scoring_speed import random_rows
from sketch_speed import machine, print_table
from torch import nn

from lightning_sketch import GradientStore
from lightning_sketch.attribution import ray_top_k, top_k
from lightning_sketch.attribution.scores import scorers
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store import LanceRows, SketchedGradients, StoreSpec

DIM, ROWS, QUERIES, IN_FILE, NONE, ROUNDS = 4096, (50_000, 150_000), 100, 16_384, 1024, 3
BILLION, CORES = 10**9, (64, 256)


def stored(folder: Path, count: int, dim: int) -> tuple[Path, str]:
    """Make a store and a Lance dataset of random rows with ids."""
    layout = Layout.of(nn.Linear(dim, 8))
    sketch = BlockSRHT(layout.n, dim)
    store = GradientStore.create(folder / "store", StoreSpec.of(sketch, layout, dtype="bfloat16"))
    with store.appender(store.begin_run("predict")) as appender:
        for start in range(0, count, 2048):
            rows = random_rows(sketch, start, min(2048, count - start))
            ids = torch.arange(start, start + len(rows))
            appender.put(SketchedGradients(rows.sketches, sketch, {"example_id": ids}))
            if (start + 2048) % IN_FILE == 0:
                appender.flush()
    GradientStore.open(folder / "store").export("lance", folder / "rows.lance")
    return folder / "store", str(folder / "rows.lance")


def seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def opened(where: Path | str) -> GradientStore | LanceRows:
    return GradientStore.open(where) if isinstance(where, Path) else LanceRows(where)


def caller(where: Path | str, queries: SketchedGradients) -> tuple[float, float]:
    """Return bytes of columns and seconds of the calling process for a row: it is read, selected and sent."""
    start = time.perf_counter()
    rows = opened(where)
    (scorer,) = scorers(queries, rows, "dot", "ggn")
    for part in scorer.split(8192):
        pickle.dumps(part)
    took, columns = time.perf_counter() - start, rows.metadata().values()
    return sum(getattr(column, "hashes", column).nbytes for column in columns) / len(rows), took / len(rows)


def with_workers(count: int, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    import ray

    ray.init(num_cpus=count, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().print_on_execution_start = False
    try:
        for call in calls.values():
            call()  # workers start
        return {name: seconds(call) for name, call in calls.items()}
    finally:
        ray.shutdown()


def main():
    torch.set_num_threads(1)
    given = [int(argument) for argument in sys.argv[1:]]
    dim, sizes = (given or [DIM])[0], given[1:] or ROWS
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        all_sources = {count: stored(Path(folder) / str(count), count, dim) for count in (NONE, *sizes)}
        queries = random_rows(opened(all_sources[NONE][0]).sketch, -1, QUERIES)
        memory = {(count, i): caller(where, queries) for count in sizes for i, where in enumerate(all_sources[count])}
        one = {
            (c, i): seconds(lambda w=w: top_k(queries, opened(w))) for c in sizes for i, w in enumerate(all_sources[c])
        }
        calls = {(c, i): (lambda w=w: ray_top_k(queries, w)) for c, s in all_sources.items() for i, w in enumerate(s)}
        by_workers = {count: with_workers(count, calls) for count in (1, 2)}
    print(f"{machine()}; dim {dim}, {QUERIES} queries\n")
    for i, kind in enumerate(("store", "Lance")):
        first = sizes[0]
        a, c = by_workers[1][NONE, i], memory[sizes[-1], i][1]
        d = (by_workers[1][first, i] - a) / first - c
        for count in sizes:
            model = [a + count * (c + d / workers) for workers in (1, 2)]
            measured = [by_workers[workers][count, i] for workers in (1, 2)]
            told = [
                f"{s:.1f}" + (f" (model {m / s - 1:+.0%})" if (count, w) != (first, 0) else "")
                for w, (s, m) in enumerate(zip(measured, model, strict=True))
            ]
            lines.append([kind, f"{count:,}", f"{memory[count, i][0]:.0f}", f"{one[count, i]:.1f}", *told])
        size = dim * (2 if kind == "store" else 4)
        print(
            f"{kind}: a = {a:.1f} s, c = {1e6 * c:.2f}, d = {1e6 * d:.1f} microseconds; {BILLION:.0e} rows are "
            f"{BILLION * size / 1e12:.1f} TB and {BILLION * memory[sizes[-1], i][0] / 1e9:.0f} GB of columns, and take "
            + " and ".join(f"{(a + BILLION * (c + d / n)) / 3600:.1f} h on {n} cores" for n in CORES)
        )
    print()
    print_table(["rows of", "rows", "columns, B", "one process, s", "1 worker, s", "2 workers, s"], lines)


if __name__ == "__main__":
    main()
