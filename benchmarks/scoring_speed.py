"""Measure the speed of queries to a store, relative to one product with the same numbers in memory.

100,000 rows of dim 4096 in a `GradientStore`, and 100 queries; random numbers, for speed does not depend on them. The
store's files are in the page cache, which a first pass over them sees to. All lines of a table take turns, in one
process; a number is the median. A last table has influence by a curvature that is made from the rows, 200,000 of dim
1024, relative to `dot`; at equal speed of the processor it would be (dim / 2 + queries) / queries = 6 times, since the
curvature takes rows dim² operations and `dot` 2 rows dim queries.

product   torch.matmul(queries, rows.T), all rows in memory as one tensor, with the same float32 arithmetic; of
          float32 rows, and of rows in the stored type, which is another and less exact product if that is bfloat16
speed     time of the float32 product / time of the line: by the clock, and by time of the CPU
error     largest difference of scores from the product's, over their standard deviation

python benchmarks/scoring_speed.py [rows]
"""

import functools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_sketch.attribution import GradientStore, Influence, row_curvature
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT, Sketch
from lightning_sketch.store.sketched_gradients import SketchedGradients
from lightning_sketch.store.spec import StoreSpec

ROWS, DIM, QUERIES, PART = 100_000, 4096, 100, 2048
INFLUENCE_ROWS, INFLUENCE_DIM = 200_000, 1024
ROUNDS = 5
ASKED = 0.8


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    print(f"{cpu()}, torch {torch.__version__}; {count:,} rows of dim {DIM}, {QUERIES} queries")
    for dtype in ("bfloat16", "float16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            store = random_store(folder, dtype, count, DIM)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                table(dtype, store, random_rows(store.sketch, -1, QUERIES))
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(folder, "bfloat16", INFLUENCE_ROWS, INFLUENCE_DIM)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            influence(store, random_rows(store.sketch, -1, QUERIES))


def random_store(folder: str, dtype: str, count: int, dim: int) -> GradientStore:
    layout = Layout.of(nn.Linear(dim, 8))
    sketch = BlockSRHT(layout.n, dim)
    store = GradientStore.create(folder, StoreSpec.of(sketch, layout, dtype=dtype))
    with store.appender(store.begin_run("predict")) as appender:
        for start in range(0, count, PART):
            appender.put(random_rows(sketch, start, min(PART, count - start)))
    return GradientStore.open(folder)


def random_rows(sketch: Sketch, seed: int, count: int) -> SketchedGradients:
    generator = torch.Generator().manual_seed(seed + 1)
    return SketchedGradients(torch.randn(count, sketch.dim, generator=generator), sketch)


def table(dtype: str, store: GradientStore, queries: SketchedGradients) -> None:
    """Print the table, after a first pass that warms up and compares the numbers."""
    stored = store.read().sketches
    rows = stored.float()
    asked = queries.sketches
    lines: dict[str, Callable[[], Tensor]] = {
        "product, float32": functools.partial(product, asked, rows),
        "scores, dot": lambda: store.scores(queries),
        "scores, cosine": lambda: store.scores(queries, method="cosine"),
        "top_k, 10, by row": lambda: store.top_k(queries, 10, group=None).scores,
    }
    if dtype == "bfloat16":
        lines["product, bfloat16"] = functools.partial(product, asked.bfloat16(), stored)
    first = {name: call() for name, call in lines.items()}
    error = float((first["scores, dot"] - first["product, float32"]).abs().max() / first["product, float32"].std())
    best = first["product, float32"].topk(10).values
    error = max(error, float((first["top_k, 10, by row"] - best).abs().max() / best.std()))
    del first, best

    wall: dict[str, list[float]] = {name: [] for name in lines}
    busy: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(ROUNDS):
        for name, call in lines.items():
            start, start_busy = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)

    title = f"{dtype} rows, {torch.get_num_threads()} threads"
    print(f"\n{title:24} seconds  speed    CPU  speed    (error {error:.0e})")
    bases = [statistics.median(times["product, float32"]) for times in (wall, busy)]
    for name in lines:
        seconds, used = statistics.median(wall[name]), statistics.median(busy[name])
        speed, speed_busy = bases[0] / seconds, bases[1] / used
        verdict = f"asked {ASKED}: {'met' if speed >= ASKED else 'NOT MET'}" if name == "scores, dot" else ""
        print(f"{name:24} {seconds:7.3f} {speed:6.2f} {used:6.3f} {speed_busy:6.2f}    {verdict}".rstrip(), flush=True)


def influence(store: GradientStore, queries: SketchedGradients) -> None:
    """Print the times of influence relative to `dot`, with a curvature that is made for it, and made before."""
    made = Influence(row_curvature(store, "fisher", single=True))
    lines = {
        "scores, dot": lambda: store.scores(queries),
        "influence, fisher": lambda: store.scores(queries, method="influence", curvature="fisher"),
        "the same, made before": lambda: store.scores(queries, method="influence", curvature=made),
    }
    times: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(ROUNDS):
        for name, call in lines.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"\n{len(store):,} rows of dim {store.sketch.dim}, {torch.get_num_threads()} threads    seconds  times dot")
    for name, seconds in medians.items():
        print(f"{name:40} {seconds:7.3f} {seconds / medians['scores, dot']:10.1f}", flush=True)


def product(queries: Tensor, rows: Tensor) -> Tensor:
    return torch.matmul(queries, rows.T)


def cpu() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
