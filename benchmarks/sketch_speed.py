"""Measure time and memory of sketches on a CPU, next to a copy of their input, TRAK and dattri (a few minutes).

python benchmarks/sketch_speed.py [--threads 1 2] [--dtype float32 bfloat16] [--kernels numba torch] [--busy COUNT]
                                  [--passes 3] [--small]

First table: BlockSRHT and CountSketch, by each kernel, of one vector of 2^24 numbers. A cell is the median time in ms
and, in brackets, the median of its ratio to what PyTorch does right after it, by as many threads.

S x       matvec, and its ratio to out.copy_(x): "copies"
Sᵀ y      rmatvec, and its ratio to x.clone(), "clones": both return new memory, and touching that for the first time
          takes several copies. It is in float32 whatever y is, and is measured there
copy,     median times of out.copy_(x) and of x.clone() in ms; a busy neighbor slows these down as well, so compare
clone     milliseconds with those of a quiet run
fht_cpu   a peer: PyTorch's operations for the signs and sums, as by "torch", and the transform by the package fht_cpu

Second table: all other kinds, and ours beside the projectors of TRAK and dattri, by all threads; of a batch, the time
of one vector in ms. GB/s are those of x, which is read once. On a CPU, TRAK and dattri multiply by a dense normal
matrix, made anew in every call if dim is over 100; our kind `gaussian` does the same. These get a smaller n; a batch
shares the making. Extra MB is the most memory in use at once beyond x, y and the result, in both products (on Linux).

--busy    measures the first table beside so many processes that compute without end, as another user's may do
--small   tries the script out, with tiny sizes; the numbers say nothing

Everything is measured three times, each time in new processes, one per kernel, since machines vary; a number is the
median of the three. Another program at work can double a ratio, and more with two threads, which wait for each other.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.operators import BlockSRHT, make_sketch

REPEATS = 9  # calls in a pass; fewer, but one at least, once they took
SECONDS = 0.5  # in all
LONG = 1.0  # seconds of a first call that is not repeated
ASKED, ASKED_BUSY = 4, 10  # copies
MODULES = {"traker": "trak", "dattri": "dattri", "fht_cpu": "fht_cpu", "numba": "numba"}
INSTALL = {"numba": "lightning-sketch[fast]"}


class Row(NamedTuple):
    kind: str
    log_n: int
    log_dim: int
    threads: int
    dtype: str = "float32"
    batch: int = 1


class Found(NamedTuple):
    """Times of one vector, and memory."""

    ms: float
    copies: float
    copy_ms: float
    adjoint_ms: float
    clones: float
    clone_ms: float
    extra_mb: float


class ByFht(BlockSRHT):
    """BlockSRHT by PyTorch's operations, with the transform of another package."""

    def _mix(self, x, before, after, which, spare):
        import fht_cpu

        self._flip(x, before, which, spare[1])
        fht_cpu.fht(x.view(-1, x.shape[-1]).numpy(), num_threads=torch.get_num_threads())
        return self._flip(x, after, which, spare[1])


def products(kind: str, kernel: str, n: int, dim: int) -> list[Callable[[Tensor], Tensor]]:
    """Return S, for x of shape (batch, n), and Sᵀ, for y of shape (batch, dim), where there is one."""
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
    sketch = ByFht(n, dim) if kernel == "fht_cpu" else make_sketch(kind, n=n, dim=dim, seed=0)
    return [sketch.matvec, sketch.rmatvec]


def measure_all(task: tuple[str, list[Row]]) -> list[Found]:
    """Measure rows by one kernel, or by the one that is used by itself if that is "". Call it in a new process."""
    kernel, rows = task
    if kernel:
        os.environ["LIGHTNING_SKETCH_KERNEL"] = "torch" if kernel == "fht_cpu" else kernel
    return [measure(kernel, row) for row in rows]


def measure(kernel: str, row: Row) -> Found:
    torch.set_num_threads(row.threads)
    dtype, n, dim = getattr(torch, row.dtype), 1 << row.log_n, 1 << row.log_dim
    for product in products(row.kind, kernel, dim, dim):  # imports, tables, compiled code, threads: whatever n is
        product(torch.ones(1, dim, dtype=dtype))
    most = min(n, 1 << 20)
    x, y = torch.randn(row.batch, most).repeat(1, n // most).to(dtype), torch.randn(row.batch, dim)
    out, extra, times = torch.ones_like(x), 0.0, []
    vectors = (x, y) if dtype == torch.float32 else (x,)
    bases = out.copy_, torch.clone
    for product, vector, base in zip(products(row.kind, kernel, n, dim), vectors, bases, strict=False):
        forget_high_water()
        before, start = high_water(), time.perf_counter()
        result = product(vector)
        first = time.perf_counter() - start
        extra = max(extra, high_water() - before - result.nbytes)
        del result
        pairs = [(first, seconds(base, x))] if first > LONG else []
        while not pairs or (len(pairs) < REPEATS and sum(map(sum, pairs)) < SECONDS):
            pairs.append((seconds(product, vector), seconds(base, x)))
        times.append(statistics.median(call for call, _ in pairs) * 1e3 / row.batch)
        times.append(statistics.median(call / other for call, other in pairs))
        times.append(statistics.median(other for _, other in pairs) * 1e3)
    return Found(*times, *[float("nan")] * (6 - len(times)), extra / 1e6)


def spin(spinning: Event) -> None:
    """Compute without end, as long as the process lives that started this one."""
    parent, numbers = os.getppid(), np.ones(1 << 16)
    spinning.set()
    while os.getppid() == parent:
        np.sin(numbers, out=numbers)


def seconds(call: Callable, argument: Tensor) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def forget_high_water() -> None:
    """Reset the high-water mark of memory to what is in use now."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def high_water() -> float:
    """Return the most bytes in use at once."""
    if sys.platform != "linux":
        return float("nan")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def cpu() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor())


def machine() -> str:
    """Return what the numbers of this run depend on, with the load of the machine over the last minute."""
    packages = [f"{name} {version(name)}" for name in ("torch", "numba") if importlib.util.find_spec(name)]
    processors = f"{cpu() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    return ", ".join([processors, *packages, time.strftime("%Y-%m-%d")])


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, the first column to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    for line in [lines[0], rule, *lines[1:]]:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def number(value: float, digits: int = 1) -> str:
    return "-" if value != value else f"{value:.{digits}f}"


def cells(found: Found | None) -> list[str]:
    """Return the times of both products, with copies and clones in brackets."""
    if found is None:
        return ["-", "-"]
    pairs = (found.ms, found.copies), (found.adjoint_ms, found.clones)
    return ["-" if ms != ms else f"{number(ms, 0 if ms >= 100 else 1)} ({ratio:.1f})" for ms, ratio in pairs]


def is_installed(name: str) -> bool:
    return name not in MODULES or importlib.util.find_spec(MODULES[name]) is not None


def run(tasks: list[tuple[str, list[Row]]], passes: int) -> list[dict[Row, Found]]:
    """Return the medians of all passes through the tasks, for each task."""
    every: list[list[list[Found]]] = [[] for _ in tasks]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for i, found in enumerate(pool.imap(measure_all, tasks * passes)):
            every[i % len(tasks)].append(found)
            print(f"measured {i + 1} of {passes * len(tasks)}", file=sys.stderr, end="\r", flush=True)
    print(" " * 40, file=sys.stderr, end="\r", flush=True)
    medians = []
    for (_, rows), passed in zip(tasks, every, strict=True):
        by_row = [zip(*times, strict=True) for times in zip(*passed, strict=True)]
        medians.append({row: Found(*map(statistics.median, times)) for row, times in zip(rows, by_row, strict=True)})
    return medians


def by_kernel(kernels: list[str], rows: list[Row], passes: int) -> dict[str, dict[Row, Found]]:
    """Measure rows by each kernel, and print a table with two columns for each."""
    fitting = {"fht_cpu": [row for row in rows if row.kind == "block_srht" and row.dtype == "float32"]}
    tasks = [(kernel, fitting.get(kernel, rows)) for kernel in kernels]
    found = dict(zip(kernels, run(tasks, passes), strict=True))
    lines = []
    for row in rows:
        own = [found[kernel].get(row) for kernel in kernels]
        there = [times for times in own if times is not None]
        copy, clone = (statistics.median(getattr(t, name) for t in there) for name in ("copy_ms", "clone_ms"))
        sizes = [row.kind, f"2^{row.log_n}", f"2^{row.log_dim}", row.dtype, str(row.threads)]
        lines.append([*sizes, number(copy), number(clone), *(cell for times in own for cell in cells(times))])
    titles = [f"{kernel}, {product}" for kernel in kernels for product in ("S x", "Sᵀ y")]
    print_table(["sketch", "n", "dim", "type", "threads", "copy", "clone", *titles], lines)
    for kernel, times in found.items():
        print(f"{kernel}: at most {max(time.extra_mb for time in times.values()):.0f} MB extra")
    return found


def beside_peers(threads: int, small: bool, passes: int) -> None:
    """Measure the other kinds, ours beside those of peers, and print them."""
    n, dim, sizes = (16, 8, [(12, 6, 1), (12, 6, 4)]) if small else (24, 12, [(20, 8, 1), (20, 8, 16), (18, 12, 1)])
    kinds = ("x.clone()", "affd", "afjl", "qk", "ffd", "fjl")
    tasks = [("", [Row(kind, n, dim, threads) for kind in kinds])]
    for kind in ("block_srht", "gaussian", "traker", "dattri"):
        if is_installed(kind):
            tasks.append(("", [Row(kind, *size[:2], threads, batch=size[2]) for size in sizes]))
        else:
            print(f"{kind} is not installed: pip install {kind}")
    merged = {row: found for part in run(tasks, passes) for row, found in part.items()}
    lines = []
    for row, found in sorted(merged.items(), key=lambda item: (-item[0].log_n, item[0].batch)):
        sizes = [row.kind, f"2^{row.log_n}", f"2^{row.log_dim}", str(row.batch)]
        forward = [number(found.ms), f"{4e-6 * 2**row.log_n / found.ms:#.2g}", number(found.copies)]
        adjoint = [number(found.adjoint_ms), number(found.clones)]
        lines.append([*sizes, *forward, *adjoint, number(found.extra_mb, 0)])
    print(f"\nAll other kinds, and beside peers: {threads} threads, float32\n")
    print_table(["kind", "n", "dim", "batch", "S x", "GB/s", "copies", "Sᵀ y", "clones", "extra MB"], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--kernels", nargs="+", choices=["numba", "torch"], default=["numba", "torch"])
    parser.add_argument("--busy", type=int, default=0, metavar="COUNT")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    passes = 1 if asked.small else asked.passes

    kernels = [kernel for kernel in asked.kernels if is_installed(kernel)]
    if missing := set(asked.kernels).difference(kernels):
        print(*(f"{kernel} is not installed: pip install {INSTALL[kernel]}" for kernel in missing), sep="\n")
    context = multiprocessing.get_context("spawn")
    for _ in range(asked.busy):
        spinning = context.Event()
        context.Process(target=spin, args=(spinning,), daemon=True).start()
        spinning.wait()
    print(f"{machine()}, beside {asked.busy} busy processes\n")

    n, dims = (16, (6, 8)) if asked.small else (24, (8, 12, 15))
    rows = [
        Row(kind, n, dim, threads, dtype)
        for dtype in asked.dtype
        for threads in asked.threads
        for kind in ("block_srht", "count_sketch")
        for dim in dims
    ]
    peers = ["fht_cpu"] if is_installed("fht_cpu") else []
    found = by_kernel([*kernels, *peers], rows, passes).get("numba", {})
    float32 = [times for row, times in found.items() if row.dtype == "float32"]
    if float32 and not asked.small:
        copies, clones = max(times.copies for times in float32), max(times.clones for times in float32)
        limit = ASKED_BUSY if asked.busy else ASKED
        verdict = "met" if copies <= limit else "NOT MET"
        print(f"numba, float32: S x at most {copies:.1f} copies, asked {limit}: {verdict}", end="; ")
        print(f"Sᵀ y at most {clones:.1f} clones")
    if not asked.busy:
        beside_peers(max(asked.threads), asked.small, passes)


if __name__ == "__main__":
    main()
