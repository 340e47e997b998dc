"""Measure time and memory of a sketch, next to a copy of its input, TRAK and dattri (5 minutes).

One table, float32 on the CPU. All lines are measured in turn, three times over, each time in a new process,
since machines vary; a number is the median of the three. Times are for one vector of a batch:

ms        of matvec, S x: median of several calls
GB/s      of x, which is read once
copies    median of (time of a call) / (time of the out.copy_(x) right after it)
adjoint   rmatvec, Sᵀ y, in ms and in the same copies. Like x.clone() it returns new memory, and touching that
          for the first time can take longer than a copy: compare that line
extra MB  the most memory in use at once beyond x, y and the result, in matvec and rmatvec

On a CPU, TRAK and dattri multiply by a dense normal matrix, made anew in every call if dim is over 100; our kind
`gaussian` does the same. These get a smaller n; a batch shares the making. Another program at work can double
`copies`.
"""

import functools
import importlib.util
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_sketch import make_sketch

THREADS = 2
PASSES = 3  # through the table
REPEATS = 9  # calls in a pass; fewer, but one at least, once they took
SECONDS = 1.5  # in all

ROWS = [  # kind, log2 n, log2 dim, batch
    ("x.clone()", 24, 12, 1),
    *[(kind, 24, dim, 1) for kind in ("block_srht", "count_sketch") for dim in (8, 10, 12, 15)],
    *[(kind, 26, 12, 1) for kind in ("block_srht", "count_sketch")],
    *[(kind, 24, 12, 1) for kind in ("affd", "afjl", "qk", "ffd", "fjl")],
    *[
        (kind, *sizes)
        for sizes in ((20, 8, 1), (20, 8, 16), (18, 12, 1))
        for kind in ("block_srht", "gaussian", "traker", "dattri")
    ],
]


def products(kind: str, n: int, dim: int) -> list[Callable]:
    """Return S, for x of shape (batch, n), and Sᵀ, for y of shape (batch, dim), or None."""
    if kind == "x.clone()":
        return [torch.clone]
    if kind == "traker":
        from trak.projectors import BasicProjector, ProjectionType

        projector = BasicProjector(n, dim, seed=0, proj_type=ProjectionType.normal, device=torch.device("cpu"))
        return [functools.partial(projector.project, model_id=0)]
    if kind == "dattri":
        from dattri.func.projection import ProjectionType, make_random_projector

        projector = make_random_projector([n], 1, dim, 8, torch.device("cpu"), proj_type=ProjectionType.normal)
        return [functools.partial(projector.project, ensemble_id=0)]
    sketch = make_sketch(kind, n=n, dim=dim, seed=0)
    return [sketch.matvec, sketch.rmatvec]


def measure(row: tuple[str, int, int, int]) -> list[float] | None:
    """Return ms, copies, adjoint ms, its copies, extra MB; None without the package. Call it in a new process."""
    kind, n, dim, batch = row[0], 1 << row[1], 1 << row[2], row[3]
    if kind in ("traker", "dattri") and not importlib.util.find_spec({"traker": "trak"}.get(kind, kind)):
        return None
    torch.set_num_threads(THREADS)
    for product in products(kind, dim, dim):  # imports, tables, threads: once in a process, whatever n is
        product(torch.ones(1, dim))
    x, y, out = torch.randn(batch, n), torch.randn(batch, dim), torch.ones(batch, n)
    ballast = torch.ones(1 << 24)  # more than was freed since the start: the high-water mark is now
    before, extra, times = high_water(), 0, []
    for product, vectors in zip(products(kind, n, dim), (x, y), strict=False):
        result = product(vectors)
        extra = max(extra, high_water() - before - result.nbytes)
        del result
        pairs = []
        while not pairs or (len(pairs) < REPEATS and sum(map(sum, pairs)) < SECONDS):
            pairs.append((seconds(product, vectors), seconds(out.copy_, x)))
        times.append(statistics.median(call for call, _ in pairs) * 1e3 / batch)
        times.append(statistics.median(call / copy for call, copy in pairs))
    del ballast
    return [*times, *[float("nan")] * (4 - len(times)), extra / 1e6]


def high_water() -> int:
    """Return the most bytes that this process has had in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds(call: Callable, argument: torch.Tensor) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def cpu() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor())


def main():
    print(f"{cpu()}, {THREADS} threads, torch {torch.__version__}, float32")
    print(f"{'kind':12}    n   dim batch        ms    GB/s  copies   adjoint  copies  extra MB")
    found, copies, extra = {row: [] for row in ROWS}, {}, 0.0
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for row, numbers in zip(ROWS * PASSES, pool.imap(measure, ROWS * PASSES), strict=True):
            found[row].append(numbers)
            if len(found[row]) < PASSES:
                continue
            kind, n, dim, batch = row
            start = f"{kind:12} 2^{n:<2}  2^{dim:<2} {batch:4}"
            if numbers is None:
                print(f"{start}  not installed: pip install {kind}", flush=True)
                continue
            ms, ratio, adjoint_ms, adjoint_ratio, mb = map(statistics.median, zip(*found[row], strict=True))
            adjoint = f"{adjoint_ms:9.1f} {adjoint_ratio:7.1f}".replace("nan", "  -")
            print(f"{start} {ms:9.1f} {4e-6 * 2**n / ms:#7.2g} {ratio:7.1f} {adjoint} {mb:9.0f}", flush=True)
            if n >= 24 and kind in ("block_srht", "count_sketch"):
                copies[kind, n, dim], extra = ratio, max(mb, extra)

    count = max(ratio for row, ratio in copies.items() if row[0] == "count_sketch")
    srht = {dim: copies["block_srht", 24, dim] for dim in (8, 12, 15)}
    print(
        f"BlockSRHT at 2^12: {srht[12]:.1f} copies (at most 15); CountSketch: {count:.1f} copies (at most 12); "
        f"BlockSRHT at 2^15: {srht[15] / srht[8]:.2f} times 2^8 (at most 1.8); both: {extra:.0f} MB extra (under 64)"
    )


if __name__ == "__main__":
    main()
