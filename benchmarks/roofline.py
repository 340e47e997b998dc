"""Compare the four main paths on a CPU with what this machine's memory and arithmetic allow (a few minutes).

python benchmarks/roofline.py [--threads 1 2] [--small]        needs scikit-learn

step       the row of a training step: Layout.sketch of the gradients of 10M parameters, dim 4096
factors    rows of examples, from the factors of one Linear layer: products of matrices, and their sketches, dim 2048
examples   the same of a transformer of a million parameters, with its passes: sketch_gradients, dim 2048
gradient   one forward and backward pass of that transformer, for comparison: all of it is PyTorch's
product    S H Sᵀ y with the Hessian of that transformer, one batch, in a run that keeps its graph, dim 4096
scores     GradientStore.top_k over rows of dim 4096 in bfloat16, for one query and for a hundred

MB         what has to be read and written once
GFLOP      operations that have to be, in 10^9. Of passes those of products of matrices, as PyTorch counts them; with
           the Hessian, the derivative of a forward and a backward pass, twice as many. A sketch takes log2(dim) + 1
           additions a number, which count as two each: they take the place of a product and a sum
allowed    ms: the longer of MB / (bandwidth of a copy or of a sum, whichever is more) and GFLOP / (those per second of
           a product of large float32 matrices), measured in turn with the paths, by as many threads
measured   ms: the median of calls in five rounds; `CPU` the same in time of the processor, of all threads together
ratio      measured / allowed
"""

import argparse
import contextlib
import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from example_sketches import make_problem
from scoring_speed import random_rows
from sketch_speed import machine, number, print_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sketch import Hessian, sketch_gradients
from lightning_sketch.attribution import GradientStore
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT, Sketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import LowRank
from lightning_sketch.store.spec import StoreSpec

PRODUCT = "product S H Sᵀ y"
ROUNDS = 5
CALLS, SECONDS = 5, 0.3  # in a round; fewer, but one at least, once they took so long


class Path(NamedTuple):
    """What is measured.

    `move` and `operations` are the bytes and operations that have to be; calls are made inside `around()`.
    """

    name: str
    move: float
    operations: float
    call: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def additions(n: int, dim: int) -> float:
    """Return the operations of a sketch of n numbers."""
    return 2.0 * n * (math.log2(dim) + 1)


def step(small: bool) -> Path:
    width, layers = (32, 1) if small else (384, 5)
    body = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 4 * width), layers, enable_nested_tensor=False)
    layout = Layout.of(nn.ModuleList([nn.Embedding(2000, width), body, nn.Linear(width, 2000)]))
    sketch = BlockSRHT(layout.n, 4096)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    gradients = itertools.cycle([{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)])
    name = f"step: {layout.n / 1e6:.1f}M parameters"  # three in turn, so that none is in a cache
    return Path(name, 4 * layout.n, additions(layout.n, 4096), lambda: layout.sketch(sketch, next(gradients)))


def factors(small: bool) -> Path:
    examples, tokens, rows, columns = (2, 4, 16, 256) if small else (8, 64, 1536, 384)
    layer = nn.Linear(columns, rows, bias=False)
    layout, n = Layout.of(layer), rows * columns
    accumulator = SketchAccumulator(BlockSRHT(n, 2048), layout, parameters={"weight": layer.weight})
    factor = LowRank(layer.weight, torch.randn(examples, tokens, rows), torch.randn(examples, tokens, columns))

    def call() -> Tensor:
        accumulator.start(examples)
        accumulator.add(factor)
        return accumulator.rows()

    operations = examples * (2.0 * tokens * n + additions(n, 2048))
    moved = 4 * (factor.left.numel() + factor.right.numel() + examples * 2048)
    return Path(f"factors: {examples} x {tokens} tokens, {rows} x {columns}", moved, operations, call)


def passes(small: bool) -> list[Path]:
    """Return the paths that differentiate a transformer."""
    module, x, y = make_problem("transformer", size=16 if small else 0)
    count = 8 if small else 256
    batch, n = (x[:count], y[:count]), sum(p.numel() for p in module.parameters())
    parameters = list(module.parameters())

    def each_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(each_loss(module, batch).mean(), parameters)

    with FlopCounterMode(display=False) as counter:
        gradient()
    once = float(counter.get_total_flops())
    rows_dim, dim = (64, 64) if small else (2048, 4096)
    rows_sketch, sketch = BlockSRHT(n, rows_dim), BlockSRHT(n, dim)
    batches = [(x, y) for x, y in zip(batch[0].split(64), batch[1].split(64), strict=True)]
    h = Hessian(lambda module, batch: each_loss(module, batch).mean(), module, [batch])
    vector = torch.randn(dim)
    rows = functools.partial(sketch_gradients, module, batches, rows_sketch, each_loss, engine="hooks")
    read, written = 8 * n * len(batches), 4 * count * rows_dim  # parameters are read forward and backward
    return [
        Path(f"examples: {count}", read + written, once + count * additions(n, rows_dim), rows),
        Path("gradient", 12 * n, once, gradient),
        Path(PRODUCT, 28 * n, 2 * (once + additions(n, dim)), lambda: product(h, sketch, vector), h.hold),
    ]


def product(h: Hessian, sketch: Sketch, y: Tensor) -> Tensor:
    return sketch.matvec(h.matvec(sketch.rmatvec(y)))


def scores(small: bool, folder: str) -> list[Path]:
    dim, count, part = (64, 256, 128) if small else (4096, 40960, 2048)
    layout = Layout.of(nn.Linear(dim, 8))
    sketch = BlockSRHT(layout.n, dim)
    store = GradientStore.create(folder, StoreSpec.of(sketch, layout, dtype="bfloat16"))
    with store.appender(store.begin_run("predict")) as appender:
        for start in range(0, count, part):
            appender.put(random_rows(sketch, start, part))
    store = GradientStore.open(folder)
    paths = []
    for queries in (1, 100):
        asked = functools.partial(store.top_k, random_rows(sketch, -1, queries), 10, group=None)
        name = f"scores: {count:,} rows, {queries} {'query' if queries == 1 else 'queries'}"
        paths.append(Path(name, 2.0 * count * dim, 2.0 * queries * count * dim, asked))
    return paths


def ceilings(small: bool) -> list[Path]:
    n, m = (1 << 16, 64) if small else (1 << 25, 2048)
    x, a = torch.randn(n), torch.randn(m, m)
    out, b = torch.empty_like(x), torch.empty(m, m)
    return [
        Path("copy", 8 * n, 0, lambda: out.copy_(x)),
        Path("sum", 4 * n, 0, x.sum),
        Path("matrices", 0, 2.0 * m**3, lambda: torch.mm(a, a, out=b)),
    ]


def times(path: Path) -> list[tuple[float, float]]:
    """Return the times of some calls after a first one: by the clock, and of the processor."""
    found: list[tuple[float, float]] = []
    with path.around():
        path.call()
        while not found or (len(found) < CALLS and sum(clock for clock, _ in found) < SECONDS):
            clock, busy = time.perf_counter(), time.process_time()
            path.call()
            found.append((time.perf_counter() - clock, time.process_time() - busy))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--small", action="store_true", help="tries the script out; the numbers say nothing")
    asked = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        limits = ceilings(asked.small)
        paths = [step(asked.small), factors(asked.small), *passes(asked.small), *scores(asked.small, folder)]
        every: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            for threads in asked.threads:
                torch.set_num_threads(threads)
                for path in limits + paths:
                    every.setdefault((threads, path.name), []).extend(times(path))
    medians = {key: tuple(map(statistics.median, zip(*found, strict=True))) for key, found in every.items()}

    print(f"{machine()}\n")
    table, lines = [], []
    for threads in asked.threads:
        copy, total, matrices = (
            max(limit.move, limit.operations) / medians[threads, limit.name][0] for limit in limits
        )
        table.append([str(threads), *(number(ceiling / 1e9, 0) for ceiling in (copy, total, matrices))])
        for path in paths:
            clock, busy = medians[threads, path.name]
            by_memory, by_arithmetic = path.move / max(copy, total), path.operations / matrices
            allowed = max(by_memory, by_arithmetic)
            size = [number(path.move / 1e6), number(path.operations / 1e9, 2)]
            ms = [number(1e3 * each) for each in (by_memory, by_arithmetic, clock, busy)]
            lines.append([path.name, str(threads), *size, *ms, number(clock / allowed)])
    print_table(["threads", "copy, GB/s", "sum, GB/s", "matrices, GFLOP/s"], table)
    header = ["path", "threads", "MB", "GFLOP", "memory allows", "arithmetic allows", "measured", "CPU", "ratio"]
    print_table(header, sorted(lines, key=lambda line: int(line[1])))
    for threads in asked.threads:
        gradients = medians[threads, PRODUCT][0] / medians[threads, "gradient"][0]
        print(f"{threads} threads: a product S H Sᵀ y took {gradients:.1f} gradients; two would be enough")


if __name__ == "__main__":
    main()
