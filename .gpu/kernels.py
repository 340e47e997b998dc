"""Check and time the kernels in Triton on a CUDA device, within 150 seconds.

    PYTHONPATH=. python3 .gpu/kernels.py [--cpu] [--out FILE]      from the root of the checkout

Each part is guarded and has a time limit: what fails is written down and the rest goes on. Writes JSON line by line,
prints a table at the end. With --cpu everything runs once in Triton's interpreter, at sizes that mean nothing.
"""

import json
import os
import statistics
import sys
import time
import traceback
import warnings

BEGIN = time.perf_counter()
CPU = "--cpu" in sys.argv
if CPU and "--compile" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["LIGHTNING_SKETCH_KERNEL"] = "triton"
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
warnings.simplefilter("ignore")

import torch  # noqa: E402

from lightning_sketch.operators import BlockSRHT, CountSketch, kernel_in_use  # noqa: E402
from lightning_sketch.operators.kernels.triton import launches, plans  # noqa: E402

OUT = (
    sys.argv[sys.argv.index("--out") + 1]
    if "--out" in sys.argv
    else os.path.join(os.environ.get("OUT", "."), "kernels.jsonl")
)
DEVICE = "cpu" if CPU else "cuda"
F32, BF16 = torch.float32, torch.bfloat16
LOGS = (15, 16) if CPU else (24, 27)
COPY = {}  # (log n, type) -> milliseconds of a copy
TABLE = []


def elapsed():
    return time.perf_counter() - BEGIN


def say(**row):
    row["at"] = round(elapsed(), 1)
    print(json.dumps(row), flush=True)
    with open(OUT, "a") as file:
        file.write(json.dumps(row) + "\n")


class Over(Exception):
    """The time of a part is over."""


def part(name, function, until):
    """Run a part until a time since the start; it calls `check` between its cases."""

    def check():
        if elapsed() > until and not CPU:
            raise Over

    start = elapsed()
    try:
        function(check)
    except Over:
        say(part=name, over=True)
    except Exception as error:
        say(part=name, failed=f"{type(error).__name__}: {error}"[:800], where=traceback.format_exc(limit=-4)[-900:])
    say(part=name, seconds=round(elapsed() - start, 1))


def tried(function, **row):
    """Say what a case gives, or why it fails."""
    start = elapsed()
    try:
        row |= function()
    except Exception as error:
        row |= {"failed": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc(limit=-3)[-400:]}
    row["seconds"] = round(elapsed() - start, 2)
    say(**row)
    return row


def synchronize():
    None if CPU else torch.cuda.synchronize()


def gpu_ms(calls, inner=10, outer=7):
    """Return the milliseconds of a call on the device, without launch gaps: replays of a graph that rotates the calls."""
    for call in calls[:2]:
        call()
    synchronize()
    if CPU:
        return 1.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [calls[i % len(calls)]() for i in range(inner)]
    times = []
    for _ in range(outer):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / inner)
    del kept
    return statistics.median(times[1:])


def call_ms(call, repeats=10):
    """Return the milliseconds from a call to its result, launches and waiting included; the smallest of some."""
    call()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def relative(got, true):
    return float((got.double() - true.double()).norm() / true.double().norm())


def vectors(log_n, dtype):
    """Return a few vectors of 2^log_n numbers, 256 MB or more together, so that a cache holds few of them."""
    count = max(1, min(8, (1 << 28) // (dtype.itemsize << log_n)))
    torch.manual_seed(log_n)
    return [torch.randn(1 << log_n, device=DEVICE).to(dtype) for _ in range(count)]


def device(check):
    import triton

    say(
        device="cpu" if CPU else torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        kernel=kernel_in_use(BlockSRHT(1 << 20, 4096), DEVICE),
        capability=None if CPU else torch.cuda.get_device_capability(),
        multiprocessors=None if CPU else torch.cuda.get_device_properties(0).multi_processor_count,
    )  # fmt: skip
    for log_n in LOGS:
        for dtype in (F32, BF16):
            xs = vectors(log_n, dtype)
            target = [torch.empty_like(x) for x in xs]
            ms = gpu_ms([lambda x=x, y=y: y.copy_(x) for x, y in zip(xs, target)])
            COPY[log_n, dtype] = ms
            say(copy=log_n, dtype=str(dtype)[6:], gpu_ms=round(ms, 4), call_ms=round(call_ms(lambda: target[0].copy_(xs[0])), 4),
                tb_per_s=round(2 * dtype.itemsize * (1 << log_n) / ms / 1e9, 2))  # fmt: skip


def correct(check):
    """Both products against the reference in float64."""
    for kind, dim, n, start, stop, rows, dtype in (
        (BlockSRHT, 4096, 300_001, 0, 300_001, 1, F32),
        (BlockSRHT, 4096, 300_001, 8192, 200_000, 3, BF16),
        (BlockSRHT, 4096, 300_001, 17, 300_000, 2, F32),
        (BlockSRHT, 256, 1 << 18, 0, 1 << 18, 1, F32),
        (BlockSRHT, 200, 99_999, 16, 99_999, 2, torch.float16),
        (BlockSRHT, 1 << 15, 500_000, 0, 500_000, 1, F32),
        (BlockSRHT, 1 << 15, 500_000, 16, 500_000, 2, BF16),
        (BlockSRHT, 10_000, 300_000, 0, 300_000, 2, F32),
        (BlockSRHT, 4096, 1 << 40, (1 << 38) - 9000, (1 << 38) + 70_000, 1, F32),
        (BlockSRHT, 1, 5, 0, 5, 1, F32),
        (CountSketch, 4096, 300_001, 0, 300_001, 1, F32),
        (CountSketch, 4096, 300_001, 17, 300_000, 3, BF16),
        (CountSketch, 256, 1 << 18, 0, 1 << 18, 1, F32),
        (CountSketch, 20_000, 300_000, 16, 300_000, 2, torch.float16),
        (CountSketch, 4096, 1 << 40, (1 << 38) - 9000, (1 << 38) + 70_000, 1, F32),
    ):
        check()

        def compare():
            sketch = kind(n, dim, 5)
            torch.manual_seed(0)
            x = torch.randn(rows, stop - start, device=DEVICE).to(dtype)
            y = torch.randn(rows, dim, device=DEVICE).to(dtype)
            begin = elapsed()
            got, back = launches.forward(sketch, x, start), launches.adjoint(sketch, y, start, stop)
            synchronize()
            compiled = elapsed() - begin
            again, twice = launches.forward(sketch, x, start), launches.adjoint(sketch, y, start, stop)
            errors = (
                relative(got, sketch.forward(x.double(), start)),
                relative(back, sketch.adjoint(y.double(), start, stop)),
            )
            return {
                "forward": errors[0], "adjoint": errors[1], "ok": max(errors) < 1e-6, "compiled": round(compiled, 2),
                "same_again": torch.equal(got, again) and torch.equal(back, twice),
            }  # fmt: skip

        tried(compare, check=kind.kind, n=n, dim=dim, start=start, stop=stop, rows=rows, dtype=str(dtype)[6:])


def timed(kind, dim, log_n, dtype, forward, call=None, xs=None, **row):
    """Time a way to compute a product, and compare it with the default one."""
    sketch = kind(1 << log_n, dim, 5)
    xs = xs if xs is not None else vectors(log_n, dtype)
    call = call or (launches.forward if forward else launches.adjoint)
    y = torch.randn(1, dim, device=DEVICE)

    def run():
        if forward:
            calls = [lambda x=x: call(sketch, x[None], 0) for x in xs]
            error = relative(calls[0](), launches.forward(sketch, xs[0][None], 0))
        else:
            calls = [lambda: call(sketch, y, 0, 1 << log_n)]
            error = relative(calls[0](), launches.adjoint(sketch, y, 0, 1 << log_n))
        ms = gpu_ms(calls)
        whole = call_ms(calls[0])
        copy = COPY.get((log_n, dtype if forward else F32), float("nan"))
        TABLE.append((kind.kind, "S x" if forward else "S'y", log_n, dim, str(dtype)[6:], row.get("variant", "default"),
                      ms, ms / copy, whole))  # fmt: skip
        return {"gpu_ms": round(ms, 4), "copies": round(ms / copy, 2), "call_ms": round(whole, 4), "error": error}

    return tried(run, kind=kind.kind, forward=forward, log_n=log_n, dim=dim, dtype=str(dtype)[6:], **row)


def default(check):
    for log_n in LOGS:
        for dtype in (F32, BF16):
            xs = vectors(log_n, dtype)
            for kind in (BlockSRHT, CountSketch):
                for dim in (1 << 8, 1 << 12, 1 << 15) if not CPU else (1 << 8,):
                    check()
                    timed(kind, dim, log_n, dtype, True, xs=xs)
                    if dtype == F32:
                        timed(kind, dim, log_n, dtype, False, xs=xs)


def variants(check):
    """Other sizes of programs for Block SRHT, and the same kernels in plain Triton."""
    stages = plans.stages_of
    two = {
        F32: ((0, 1, 7, 11, 12), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6)),
        BF16: ((0, 1, 2, 11, 12), (3, 4, 5, 6, 7), (3, 4, 5, 6, 7)),
    }

    def several(dtype, backward=False):
        v = 4 if dtype == F32 else 8
        order = -1 if backward else 1
        s13, s14 = stages(13, v)[::order], stages(14, v)[::order]
        usual = [("13 x2", plans.Plan(13, 8, s13, 2)), ("13 x4", plans.Plan(13, 8, s13, 4))]
        third = [("13 x3 80 registers", plans.Plan(13, 8, s13, 3, False, 80))]
        ahead = [] if backward else [("13 x2 ahead", plans.Plan(13, 8, s13, 2, True))]
        large = [("14 x1", plans.Plan(14, 16, s14, 1))]
        narrow = [("13 x2 narrow", plans.Plan(13, 8, stages(13, 4), 2))] if dtype == BF16 else []
        return {
            1 << 12: usual + third + ahead + large + narrow,
            1 << 15: large + usual[:1] + ([] if backward else [("14 x1 ahead", plans.Plan(14, 16, s14, 1, True))]) + third,
            1 << 8: usual[1:] + third + ([] if backward else [("two stages", plans.Plan(13, 8, two[dtype], 2))]),
        }

    for log_n in LOGS[::-1]:
        for dtype in (F32, BF16):
            xs = vectors(log_n, dtype)
            for dim, cases in several(dtype).items():
                for name, plan in cases:
                    check()
                    call = lambda s, x, start, plan=plan: launches.block_srht_forward(s, x, start, plan)  # noqa: E731
                    timed(BlockSRHT, dim, log_n, dtype, True, call, xs, variant=name)
                check()
                with plain():
                    plan = plans.plan_of(dim, dtype.itemsize, False)
                    call = lambda s, x, start, plan=plan: launches.block_srht_forward(s, x, start, plan)  # noqa: E731
                    timed(BlockSRHT, dim, log_n, dtype, True, call, xs, variant="plain Triton")
        for dim, cases in several(F32, True).items():
            for name, plan in cases:
                check()
                call = lambda s, y, a, b, plan=plan: launches.block_srht_adjoint(s, y, a, b, plan)  # noqa: E731
                timed(BlockSRHT, dim, log_n, F32, False, call, xs, variant=name)


class plain:
    """Take the kernels of Block SRHT from plain Triton."""

    def __enter__(self):
        import plain as module

        if CPU:
            module.range = __import__("lightning_sketch.operators.kernels.triton.language", fromlist=["range"]).range
        self.before = launches.hadamard, launches.constants
        constants = launches.constants
        launches.hadamard = module
        launches.constants = lambda plan, chunk: {**constants(plan, chunk), "A": 0, "B": 0, "C": 0}

    def __exit__(self, *_):
        launches.hadamard, launches.constants = self.before


def rolling(check):
    """Other sizes of programs for CountSketch."""
    for log_n in LOGS[::-1]:
        for dtype in (F32, BF16):
            xs = vectors(log_n, dtype)
            for dim in (1 << 8, 1 << 12):
                for name, tiles in {
                    1 << 8: [("16 chunks, 8 warps", plans.Tiles(256, 16, 8, 4)), ("4 chunks, 1 warp", plans.Tiles(256, 4, 1, 16))],
                    1 << 12: [("4096 x8", plans.Tiles(4096, 1, 8, 8)), ("1024, 2 warps", plans.Tiles(1024, 1, 2, 16))],
                }[dim]:
                    check()
                    call = lambda s, x, start, tiles=tiles: launches.count_sketch_forward(s, x, start, tiles)  # noqa: E731
                    timed(CountSketch, dim, log_n, dtype, True, call, xs, variant=name)
                    if dtype == F32 and log_n == LOGS[-1]:
                        call = lambda s, y, a, b, tiles=tiles: launches.count_sketch_adjoint(s, y, a, b, tiles)  # noqa: E731
                        timed(CountSketch, dim, log_n, dtype, False, call, xs, variant=name)


def reference(check):
    """The operations of PyTorch, on groups of 2^24 numbers."""
    for log_n in LOGS:
        for dtype in (F32, BF16):
            xs = vectors(log_n, dtype)
            for kind, dim in ((BlockSRHT, 1 << 8), (BlockSRHT, 1 << 12), (BlockSRHT, 1 << 15), (CountSketch, 1 << 12)):
                check()
                sketch, y = kind(1 << log_n, dim, 5), torch.randn(1, dim, device=DEVICE)
                there = lambda: sketch.forward(xs[0][None], 0)  # noqa: B023, E731
                back = lambda: sketch.adjoint(y, 0, 1 << log_n)  # noqa: B023, E731

                def run():
                    if not CPU:
                        torch.cuda.reset_peak_memory_stats()
                    before = 0 if CPU else torch.cuda.memory_allocated()
                    ms = call_ms(there, 3)  # noqa: B023
                    extra = 0 if CPU else torch.cuda.max_memory_allocated() - before
                    return {"call_ms": round(ms, 3), "adjoint_ms": round(call_ms(back, 3), 3), "extra_mb": extra >> 20,  # noqa: B023
                            "copies": round(ms / COPY[log_n, dtype], 1)}  # noqa: B023  # fmt: skip

                tried(run, torch_reference=kind.kind, log_n=log_n, dim=dim, dtype=str(dtype)[6:])


def unaligned(check):
    """A range that begins anywhere, as that of a layer does; and many rows."""
    log_n = LOGS[-1]
    for dtype in (F32, BF16):
        check()
        x = vectors(log_n, dtype)[0][None]
        sketch = BlockSRHT(1 << 30, 4096, 5)
        for start in (16, 3):
            tried(
                lambda: {"gpu_ms": round(ms := gpu_ms([lambda: launches.forward(sketch, x, start)]), 4),  # noqa: B023
                         "copies": round(ms / COPY[log_n, dtype], 2)},  # noqa: B023
                unaligned=start, dtype=str(dtype)[6:],
            )  # fmt: skip
        rows = x.view(64, -1)
        narrow = BlockSRHT(rows.shape[1], 4096 if not CPU else 64, 5)
        tried(
            lambda: {"gpu_ms": round(ms := gpu_ms([lambda: launches.forward(narrow, rows, 0)]), 4),  # noqa: B023
                     "copies": round(ms / COPY[log_n, dtype], 2),  # noqa: B023
                     "error": relative(launches.forward(narrow, rows, 0)[5:7], narrow.forward(rows[5:7].double(), 0))},  # noqa: B023
            rows=64, dtype=str(dtype)[6:],
        )  # fmt: skip


def large(check):
    """More than 2^32 numbers, against the reference in pieces."""
    n = (1 << 18 if CPU else 1 << 32) + 12_345
    torch.manual_seed(1)
    x = torch.randn(1, n, device=DEVICE, dtype=BF16)
    for kind in (BlockSRHT, CountSketch):
        check()
        sketch = kind(n, 4096, 5)

        def compare():
            got = launches.forward(sketch, x, 0)  # noqa: B023
            step = n // 4 + 1
            true = sum(sketch.forward(x[:, a : a + step], a).double() for a in range(0, n, step))  # noqa: B023
            return {
                "error": relative(got, true),
                "gpu_ms": round(gpu_ms([lambda: launches.forward(sketch, x, 0)], 2, 3), 3),
            }  # noqa: B023

        tried(compare, large=kind.kind, n=n)


def host(check):
    """What a call costs the host, when the device is far behind or idle."""
    for kind in (BlockSRHT, CountSketch):
        for forward in (True, False):
            check()
            sketch = kind(1 << 16, 4096, 5)
            x, y = torch.randn(1, 1 << 16, device=DEVICE), torch.randn(1, 4096, device=DEVICE)
            call = (lambda: sketch.matvec(x)) if forward else (lambda: sketch.rmatvec(y))  # noqa: B023
            call()
            synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            middle = time.perf_counter()
            synchronize()
            say(
                host=kind.kind,
                forward=forward,
                us=round(1e4 * (middle - start), 1),
                with_wait_us=round(1e4 * (time.perf_counter() - start), 1),
            )


def main():
    part("device", device, 20)
    part("correct", correct, 55)
    part("default", default, 85)
    part("variants", variants, 120)
    part("reference", reference, 126)
    part("unaligned", unaligned, 131)
    part("CountSketch", rolling, 139)
    part("large", large, 144)
    part("host", host, 147)
    for row in TABLE:
        print("{:12s} {} 2^{} dim {:5d} {:8s} {:20s} {:8.4f} ms {:6.2f} copies, call {:8.4f} ms".format(*row))


if __name__ == "__main__":
    main()
