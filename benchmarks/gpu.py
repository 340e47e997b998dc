"""Check and measure everything on one CUDA device, in at most eight minutes.

    python benchmarks/gpu.py [--cpu] [--out FILE] [--only PART ...]

tests      the tests marked gpu, but for those of sharded models
products   S x and Sᵀ y of each kind beside a copy of the vector, with the memory that they take
tables     tables 11, 8, 9 and 3 of the paper (`paper/`): gradients of transformers of 82 million to 1.5 billion
           parameters and products with their Hessians, sketched by our operators and by the paper's formulas
steps      a training step of such a transformer, and with the writer (per step, per example) or the monitor
noise      the largest eigenvalues of a small Llama in bfloat16, by differences of gradients, against autograd
peers      TRAK's dense projector, where traker is installed

Each part has a time limit, and one that fails is written down; the others go on. Each row is printed and appended to
FILE (gpu.jsonl) as a line of JSON at once. `gpu_ms` is the time on the device, by replays of a CUDA graph; `ms` the
smallest time from a call to its result, launches and waiting included; `copies` the first (the second, where there
is no graph) over the same of a copy. With --cpu all is tiny, which shows that the script works and no more.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_sketch.operators import kernel_in_use, make_sketch

sys.path.append(str(Path(__file__).parent / "paper"))
from costs import GPT, OURS, PUBLISHED, SIZES, Problem, Sketched

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480  # for all parts; what is left when a part begins limits it as well
BEGIN = time.perf_counter()
TYPES = torch.float32, torch.bfloat16


class Over(BaseException):
    """The time of a part is over; no handler of errors takes it for one."""


class Report:
    """Rows of JSON, printed and appended to a file as they come."""

    def __init__(self, path, cpu):
        self.path, self.cpu = path, cpu
        self.device = "cpu" if cpu else "cuda"

    def say(self, **row):
        line = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(line + "\n")

    def part(self, function, limit):
        """Run a part, for `limit` seconds at most."""
        start, name = time.perf_counter(), function.__name__
        left = max(1.0, min(limit, SECONDS - (start - BEGIN)))
        signal.setitimer(signal.ITIMER_REAL, left)
        with self.row(part=name) as row:
            try:
                function(self)
            except Over:
                row["over"] = round(left)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                row["seconds"] = round(time.perf_counter() - start, 1)
        if not self.cpu:
            torch.cuda.empty_cache()

    @contextmanager
    def row(self, **row):
        """Say a row that is completed inside, or why it was not."""
        try:
            yield row
        except Exception as error:
            where = traceback.format_exc(limit=-3)[-600:]
            row |= {"failed": f"{type(error).__name__}: {error}"[:600], "where": where}
        self.say(**row)

    def wait(self):
        if not self.cpu:
            torch.cuda.synchronize()

    def ms(self, call, repeats=7):
        """Return the milliseconds from a call to its result; the smallest of some."""
        call()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return min(times)

    def gpu_ms(self, calls, inner=10, outer=7):
        """Return the milliseconds of a call on the device, by replays of a graph of calls that take turns."""
        if self.cpu:
            return None
        for call in calls:
            call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [calls[i % len(calls)]() for i in range(inner)]
        times = []
        for _ in range(outer):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            graph.replay()
            last.record()
            self.wait()
            times.append(first.elapsed_time(last) / inner)
        del kept
        return statistics.median(times[1:])

    def extra_mb(self, call):
        """Return the most memory that a call takes beside what is there, its result included."""
        if self.cpu:
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def header(report):
    device, driver = "cpu", None
    if not report.cpu:
        device = torch.cuda.get_device_name()
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader").strip()[:40]
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    versions = {"torch": torch.__version__, "triton": triton, "python": sys.version.split()[0]}
    code = subprocess.getoutput(f"git -C {ROOT} describe --always --dirty").strip()[:40]
    kernel = kernel_in_use(make_sketch("block_srht", n=1 << 24, dim=1 << 12), report.device)
    report.say(date=time.strftime("%Y-%m-%d"), device=device, driver=driver, **versions, kernel=kernel, code=code)


def ran(*command):
    """Return the output, the errors and the status of a program, which ends with its part, as do those that it runs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        return *process.communicate(), process.returncode
    except Over:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def tests(report):
    folders = ["operators/test_random.py"] if report.cpu else ["autodiff", "operators", "per_example", "subspace"]
    options = "-q -m gpu -W default -p no:cacheprovider --continue-on-collection-errors"
    options += " -o addopts=--import-mode=importlib"
    out, errors, status = ran(sys.executable, "-m", "pytest", *options.split(), *[f"tests/{name}" for name in folders])
    report.say(status=status, tail=out[-3000:], errors=errors[-500:])


def products(report):
    for log_n in (12, 13) if report.cpu else (24, 27):
        for dtype in TYPES:
            torch.manual_seed(log_n)
            count = max(1, min(8, (1 << 28) // (dtype.itemsize << log_n)))  # more than a cache holds, as in training
            xs = [torch.randn(1 << log_n, device=report.device).to(dtype) for _ in range(count)]
            to = [torch.empty_like(x) for x in xs]
            copies = [lambda x=x, y=y: y.copy_(x) for x, y in zip(xs, to, strict=True)]
            copy, on_device = report.ms(copies[0]), report.gpu_ms(copies)
            report.say(copy=log_n, dtype=str(dtype)[6:], ms=copy, gpu_ms=on_device)
            del to, copies
            for kind in ("block_srht", "count_sketch", "qk", "afjl", "affd", "fjl"):
                for dim in (1 << 8,) if report.cpu else (1 << 8, 1 << 12, 1 << 15):
                    product(report, kind, dim, xs, copy, min(copy, on_device or copy))


def product(report, kind, dim, xs, copy, on_device):
    """Say what both products of a sketch take, of vectors that take turns."""
    n, dtype = len(xs[0]), xs[0].dtype
    with report.row(kind=kind, log_n=n.bit_length() - 1, dim=dim, dtype=str(dtype)[6:]) as row:
        sketch = make_sketch(kind, n=n, dim=dim, seed=1)
        row["kernel"] = kernel_in_use(sketch, report.device)
        y = torch.randn(dim, device=report.device)
        ways = {"": [lambda x=x: sketch.matvec(x) for x in xs]}
        if dtype == torch.float32:  # whatever x is in, sketches are in float32
            ways["adjoint_"] = [lambda: sketch.rmatvec(y)]
        for name, calls in ways.items():
            row[f"{name}ms"], row[f"{name}extra_mb"] = report.ms(calls[0], 3), report.extra_mb(calls[0])
            row[f"{name}copies"] = row[f"{name}ms"] / copy
            if row["kernel"] == "triton":  # others may copy from the host, which no graph can hold
                row[f"{name}gpu_ms"] = report.gpu_ms(calls)
                row[f"{name}copies"] = row[f"{name}gpu_ms"] / on_device


def tables(report):
    ways = "gradient", "implicit gradient", "product", "implicit product"
    fast = [Sketched(kind) for kind in ("block_srht", "count_sketch", "qk", "afjl", "affd")]
    full, half = TYPES
    for size, dtype, every, logs, names in (
        ("82M", full, fast, range(12, 19), ways[:1]),  # table 11
        ("134M", full, OURS + PUBLISHED, (17,), ways),  # tables 8 and 9
        ("82M", half, [*OURS, Sketched("affd", "fft")], (17,), ways[::2]),  # table 3
        ("1.5B", full, fast, (17,), ways[::2]),
        ("1.5B", half, fast, (17,), ways[::2]),
    ):
        problem = Problem("tiny" if report.cpu else size, report.device, dtype)
        about = {"size": size, "dtype": str(dtype)[6:]}
        for name, cost in problem.plain().items():
            report.say(**about, plain=name, ms=cost.ms, gb=cost.gb)
        for sketched in every:
            for log in (6,) if report.cpu else logs:
                with report.row(**about, sketch=str(sketched), log_dim=log) as row:
                    ((_, _, found),) = problem.costs([sketched], [1 << log], names, repeats=2)
                    for name, cost in found.items():
                        row |= {f"{name.replace(' ', '_')}_{key}": own for key, own in cost._asdict().items()}
        del problem


def steps(report):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from lightning_sketch import GradientSketchWriter, SpectrumMonitor
    from lightning_sketch.attribution import IndexedDataset

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt, self.times = GPT(SIZES["tiny" if report.cpu else "134M"]), []

        def training_step(self, batch):
            return self.gpt(batch)

        def on_train_batch_end(self, *_):
            report.wait()
            self.times.append(time.perf_counter())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-4)

    dim = 64 if report.cpu else 4096
    arms = {
        "warm-up": lambda folder: [],
        "plain": lambda folder: [],
        "writer, per step": lambda folder: [GradientSketchWriter(folder, dim=dim)],
        "writer, per example": lambda folder: [GradientSketchWriter(folder, dim=dim, per="example")],
        "monitor": lambda folder: [SpectrumMonitor(num_matvecs=16, top_k=3, bottom_k=1, num_batches=1)],
        "plain again": lambda folder: [],
    }
    plain = None
    for name, made in arms.items():
        torch.manual_seed(0)
        net = Net()
        data = net.gpt.batch(8 * (4 if report.cpu else 56))
        options = {"precision": "32-true", "accelerator": "cpu"} if report.cpu else {"precision": "bf16-mixed"}
        with report.row(step=name, parameters=sum(p.numel() for p in net.parameters())) as row:
            with tempfile.TemporaryDirectory() as folder:
                callbacks = made(folder)
                pl.Trainer(
                    max_epochs=1, devices=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, **options,
                ).fit(net, DataLoader(IndexedDataset(data) if "writer" in name else list(data), 8))  # fmt: skip
            gaps = [b - a for a, b in zip(net.times, net.times[1:], strict=False)]
            # The writer checks how the loss weighs the examples of all of the first 32 batches, and of some later ones.
            row["first_ms"] = 1e3 * statistics.median(gaps[len(gaps) // 8 : len(gaps) // 2])
            row["ms"] = 1e3 * statistics.median(gaps[-(len(gaps) // 3) :])
            plain = row["ms"] if name == "plain" else plain
            row["ratio"] = plain and row["ms"] / plain
            row["measurements_s"] = [m.seconds for c in callbacks for m in getattr(c, "history", [])]


def noise(report):
    with tempfile.TemporaryDirectory() as folder:
        script, out = str(ROOT / "benchmarks/sharded_spectrum.py"), Path(folder, "found.json")
        less = ["--products", "8", "--steps", "2"] if report.cpu else []
        _, errors, _ = ran(sys.executable, script, "--small", "--device", report.device, "--out", str(out), *less)
        if not out.exists():
            raise RuntimeError(errors[-500:])
        for name, value in json.loads(out.read_text()).items():
            report.say(noise=name, found=value)


def peers(report):
    if importlib.util.find_spec("trak") is None:
        report.say(peer="traker", missing="traker is not installed")
        return
    from trak.projectors import BasicProjector, ProjectionType

    n, dims = (1 << 10, (64,)) if report.cpu else (1 << 22, (256, 1 << 12))
    x = torch.randn(1, n, device=report.device)
    for dim in dims:
        with report.row(peer="traker", n=n, dim=dim) as row:
            projector = BasicProjector(n, dim, 0, ProjectionType.normal, torch.device(report.device))
            sketch = make_sketch("block_srht", n=n, dim=dim)
            row["ms"] = report.ms(lambda: projector.project(x, model_id=0), 2)  # noqa: B023
            row["block_srht_ms"] = report.ms(lambda: sketch.matvec(x))  # noqa: B023


PARTS = {tests: 170, products: 30, tables: 130, steps: 80, noise: 60, peers: 20}


def over(*_):
    raise Over


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", default="gpu.jsonl")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS])
    asked = parser.parse_args()
    if not asked.cpu and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; --cpu tries the script out, with tiny sizes.")
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, over)
    report = Report(asked.out, asked.cpu)
    header(report)
    for part, limit in PARTS.items():
        if not asked.only or part.__name__ in asked.only:
            report.part(part, limit)


if __name__ == "__main__":
    main()
