"""Measure how the time of a sketch S x grows with n, with dim and with ranks, and a model of it to 10^10 numbers.

BlockSRHT and float32, by the kernel in use and by PyTorch's operations, on one thread.

n       vectors of 2^20 to 2^28 numbers, dim 2^12. Larger ones are pieces that lie in the same 2^28 numbers, from which
        they are read again and again: the work is that of a vector that does not fit into memory
model   ms = a + b n, from 2^20, 2^22, ... 2^26 by least squares of relative errors; `off` is how far it is from what
        was measured. 2^28 and 10^10 numbers were not used for it
dim     2^6 to 2^20, vectors of 2^24 numbers
ranks   a vector of 2^26 numbers of which each rank has an equal part and sketches it; the parts are measured one after
        the other, since ranks are machines of their own. Then `dim` numbers are added up over all ranks: measured
        between two processes of this machine, by gloo. `share` is the time of one rank, the median, over that of one
        / ranks; small parts lie in the cache, as gradients that were just computed may

    python benchmarks/sketch_growth.py                           # two minutes
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time

import torch
from sketch_speed import machine, number, print_table

from lightning_sketch.operators import BlockSRHT, kernel_in_use

ROUNDS = 5


def ms(call, rounds: int = ROUNDS) -> float:
    """Return the median milliseconds of some calls after a first one."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def pieces_of(x: torch.Tensor, n: int) -> list[tuple[int, torch.Tensor]]:
    """Return n numbers as pieces that lie at x, and where each begins."""
    return [(start, x[: min(len(x), n - start)]) for start in range(0, n, len(x))]


def sketched(sketch: BlockSRHT, pieces: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    return sum(sketch.columns(start, start + len(x)).matvec(x) for start, x in pieces)


def linear(ns: list[int], times: list[float]) -> tuple[float, float]:
    """Return a and b of the line through times whose relative errors have the least squares."""
    weights = 1 / torch.tensor(times, dtype=torch.float64)
    ones = torch.ones(len(ns), dtype=torch.float64)
    matrix = torch.stack([ones, torch.tensor(ns, dtype=torch.float64)], 1) * weights[:, None]
    return tuple(torch.linalg.lstsq(matrix, ones[:, None]).solution.flatten().tolist())


def growth(kernels: list[str], small: bool) -> None:
    ns, held_out = ([1 << 12, 1 << 14], [1 << 16]) if small else ([1 << i for i in (20, 22, 24, 26)], [1 << 28, 10**10])
    x, dim, lines = torch.randn(max(ns) if small else 1 << 28), 1 << (8 if small else 12), []
    for kernel in kernels:
        os.environ["LIGHTNING_SKETCH_KERNEL"] = kernel
        times = {}
        for n in ns + held_out:
            sketch, pieces = BlockSRHT(n, dim), pieces_of(x, n)
            times[n] = ms(lambda: sketched(sketch, pieces), 1 if n > 1 << 28 else ROUNDS)  # noqa: B023
        a, b = linear(ns, [times[n] for n in ns])
        for n, found in times.items():
            off = (a + b * n) / found - 1
            label = f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else f"{n:.0e}"
            model = [number(a + b * n, 2), f"{off:+.0%}" + (" (used)" if n in ns else "")]
            lines.append([label, kernel, number(found, 2), number(1e6 * found / n, 2), *model])
    print_table(["n", "kernel", "ms", "ns a number", "model, ms", "off"], lines)


def dims(kernels: list[str], small: bool) -> None:
    x, logs, lines = torch.randn(1 << (14 if small else 24)), range(6, 11 if small else 21, 2), []
    for kernel in kernels:
        os.environ["LIGHTNING_SKETCH_KERNEL"] = kernel
        times = [ms(lambda log=log: BlockSRHT(len(x), 1 << log).matvec(x)) for log in logs]
        lines.append([kernel, *(number(found, 2) for found in times)])
    print_table(["ms, by kernel and dim", *(f"2^{log}" for log in logs)], lines)


def reduced(rank: int, folder: str, dim: int, found) -> None:
    """Put the milliseconds in which two processes add up `dim` numbers."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    y = torch.ones(dim)
    found.put(ms(lambda: torch.distributed.all_reduce(y), 50))
    torch.distributed.destroy_process_group()


def ranks(kernel: str, small: bool) -> None:
    os.environ["LIGHTNING_SKETCH_KERNEL"] = kernel
    n, dim, whole, lines = 1 << (14 if small else 26), 1 << (8 if small else 12), 0.0, []
    x, sketch = torch.randn(n), BlockSRHT(n, dim)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        found = context.Queue()
        both = [context.Process(target=reduced, args=(rank, folder, dim, found)) for rank in range(2)]
        for process in both:
            process.start()
        sums = max(found.get(timeout=120) for _ in both)
        for process in both:
            process.join()
    for count in (1, 2, 4, 8, 16, 64):
        size = n // count
        parts = [(start, x[start : start + size]) for start in range(0, n, size)]
        each = statistics.median(ms(lambda p=part: sketched(sketch, [p]), 2) for part in parts)
        whole = whole or each
        lines.append([str(count), number(each, 2), number(each * count / whole, 2)])
    print_table(["ranks", "ms of one", "share"], lines)
    print(f"Two processes add up {dim} numbers in {sums:.2f} ms.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tries the script out; the numbers say nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kernels = list(dict.fromkeys([kernel_in_use(BlockSRHT(1 << 20, 1 << 12), "cpu"), "torch"]))
    print(f"{machine()}, one thread\n")
    growth(kernels, asked.small)
    dims(kernels, asked.small)
    ranks(kernels[0], asked.small)


if __name__ == "__main__":
    main()
