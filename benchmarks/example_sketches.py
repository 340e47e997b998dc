"""Measure how many per-example gradients are sketched in a second: here, by TRAK and by dattri.

One classifier for all, of scikit-learn's digits, batches of 64, dim 2048, float32, one thread: once a network
512-1024-448-10 of 989,002 parameters (8 x 8 pixels through a fixed random map and tanh), once a transformer of 994,826
that reads a digit row by row. The sketched gradients are those of each example's cross-entropy.

ours            sketch_gradients: hooks, BlockSRHT; its check of the first batch included
traker          TRAKer.featurize with the projector that it chooses for the CPU: dense, normal
dattri          what TRAKAttributor.cache computes for each batch: per-example gradients by vmap, then random_project,
                which is dense and normal; without the matrix of all examples and its inverse, which come after
dattri, mask    the same with proj_type="random_mask", which keeps 2048 numbers of the gradient: no sketch, but fast

Each line is measured in new processes, in turn with the others, after a small network for imports and tables; a number
is the median. Peers get one batch in a process, ours and the mask get eight.

per second   examples in a second of CPU time, and of the clock
memory       the most in use at once, above what was before, in MB
error        of the dot products of all pairs of 64 sketches, against those of the gradients themselves: root mean
             square of the difference over the product of the two lengths, after the scale that suits best. A dense
             normal map has (1 + cosine²)^0.5 / 2048^0.5, 0.022 to 0.031

python benchmarks/example_sketches.py [passes]      needs scikit-learn; beside us: pip install traker dattri
"""

import contextlib
import functools
import importlib.util
import io
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from spectrum_peers import cpu, forget_high_water, high_water
from torch import Tensor, nn

from lightning_sketch.attribution import sketch_gradients
from lightning_sketch.operators import BlockSRHT

DIM, BATCH, BATCHES, ASKED = 2048, 64, 8, 10
MODULES = {"traker": "trak", "dattri": "dattri"}


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # fused attention is slow under vmap
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Reader(nn.Module):
    """A transformer over the rows of pixels."""

    def __init__(self, width: int = 128, depth: int = 5):
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) / 8)
        self.blocks, self.head = nn.Sequential(*[Block(width) for _ in range(depth)]), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


def make_problem(name: str, size: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Make a network at its start, inputs and labels; a smaller one if `size` is given."""
    torch.manual_seed(0)
    pixels, y = map(torch.tensor, load_digits(return_X_y=True))
    x = pixels.float() / 16
    if name == "transformer":
        return Reader(size or 128, 1 if size else 5), x.view(-1, 8, 8), y
    x, width = torch.tanh(x @ torch.randn(64, 512) * 2), size or 1024
    last = width * 7 // 16
    layers = nn.Linear(512, width), nn.GELU(), nn.Linear(width, last), nn.GELU(), nn.Linear(last, 10)
    return nn.Sequential(*layers), x, y


def ours(module, batches) -> Tensor:
    sketch = BlockSRHT(sum(p.numel() for p in module.parameters()), DIM)

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    return sketch_gradients(module, batches, sketch, loss, engine="hooks").sketches


def traker(module, batches) -> Tensor:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Loss(AbstractModelOutput):
        def __init__(self):
            pass

        @staticmethod
        def get_output(module, weights, buffers, x, y):
            return F.cross_entropy(torch.func.functional_call(module, (weights, buffers), x[None]), y[None])

        def get_out_to_loss_grad(self, module, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    count = sum(len(x) for x, _ in batches)
    with tempfile.TemporaryDirectory() as folder:
        options = {"device": "cpu", "proj_dim": DIM, "use_half_precision": False, "logging_level": logging.ERROR}
        found = TRAKer(module, Loss(), count, folder, **options)
        found.load_checkpoint(module.state_dict(), model_id=0)
        for batch in batches:
            found.featurize(batch, num_samples=len(batch[0]))
        return torch.tensor(found.saver.current_store["grads"])


def dattri(module, batches, proj_type="normal") -> Tensor:
    from dattri.func.projection import random_project
    from dattri.task import AttributionTask

    def loss(weights, example):
        return F.cross_entropy(torch.func.functional_call(module, weights, example[0][None]), example[1][None])

    task = AttributionTask(loss_func=loss, model=module, checkpoints=module.state_dict())
    gradients, (weights, _) = task.get_grad_loss_func(in_dims=(None, 0)), task.get_param(ckpt_idx=0)
    parts = []
    for batch in batches:
        found = gradients(weights, batch).nan_to_num()
        project = random_project(found, len(found), DIM, 32, proj_type=proj_type, device="cpu")
        parts.append(project(found, ensemble_id=0).clone().detach())
    return torch.cat(parts)


# Each method, with the number of batches that a process gets.
METHODS = {
    "ours": (ours, BATCHES),
    "traker": (traker, 1),
    "dattri": (dattri, 1),
    "dattri, mask": (functools.partial(dattri, proj_type="random_mask"), BATCHES),
}


def measure(task: tuple[str, str]) -> list[float] | None:
    """Return examples per second of CPU time and of the clock, memory, error; None if the package is missing."""
    name, method = task
    package = method.partition(",")[0]
    if package in MODULES and not importlib.util.find_spec(MODULES[package]):
        return None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sketches, many = METHODS[method]
    with contextlib.redirect_stderr(io.StringIO()):
        module, x, y = make_problem(name, size=16)
        sketches(module, [(x[:4], y[:4])])
        module, x, y = make_problem(name)
        batches = list(zip(x[: many * BATCH].split(BATCH), y[: many * BATCH].split(BATCH), strict=True))
        forget_high_water()
        memory, clock, start = high_water(), time.perf_counter(), time.process_time()
        found = sketches(module, batches)
        seconds, clock, memory = time.process_time() - start, time.perf_counter() - clock, high_water() - memory
    return [len(found) / seconds, len(found) / clock, memory / 1e6, error(found[:BATCH], module, *batches[0])]


def error(found: Tensor, module: nn.Module, x: Tensor, y: Tensor) -> float:
    parameters = list(module.parameters())
    each = F.cross_entropy(module(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in each]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    true, got = rows @ rows.T, found @ found.T
    lengths = rows.norm(dim=1)
    true, got = true / lengths / lengths[:, None], got / lengths / lengths[:, None]
    return float((got * (got * true).sum() / got.square().sum() - true).square().mean().sqrt())


def main():
    passes = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started below
    packages = ["torch", *(name for name, module in MODULES.items() if importlib.util.find_spec(module))]
    print(f"{cpu() or platform.machine()}, 1 thread,", ", ".join(f"{name} {version(name)}" for name in packages))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in ("mlp", "transformer"):
            n = sum(p.numel() for p in make_problem(name)[0].parameters())
            print(f"\n{f'{name}, n = {n:,}':24} per second (CPU)  (clock)  memory MB   error")
            tasks = [(name, method) for _ in range(passes) for method in METHODS]
            results = dict.fromkeys(METHODS, ())
            for (_, method), numbers in zip(tasks, pool.imap(measure, tasks), strict=True):
                results[method] = (*results[method], numbers)
            medians = {}
            for method, numbers in results.items():
                if numbers[0] is None:
                    print(f"{method:24} not installed: pip install {method.partition(',')[0]}")
                    continue
                medians[method] = list(map(statistics.median, zip(*numbers, strict=True)))
                busy, clock, memory, wrong = medians[method]
                print(f"{method:24} {busy:16.1f} {clock:8.1f} {memory:10.0f} {wrong:7.4f}", flush=True)
            for which, by in enumerate(("CPU", "clock")):
                peers = [medians[peer][which] for peer in ("traker", "dattri") if peer in medians]
                if peers:
                    ratio = medians["ours"][which] / max(peers)
                    verdict = "met" if ratio >= ASKED else "NOT MET"
                    print(f"by {by}: {ratio:.0f} times the better peer's, asked {ASKED}: {verdict}", flush=True)


if __name__ == "__main__":
    main()
