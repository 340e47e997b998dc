"""Measure time and memory of a step in a subspace, here and in the wrappers of `intrinsic-dimensionality`.

The network of `writer_overhead` (GPT-2, 10M parameters), 8 rows of 64 tokens a step, trained by the Trainer: in full,
in a subspace of 4096 numbers, and by the peers. The arms take turns, each time in a new process.

median, least    of the time of a step, and their ratios to those of full training
peak             the most memory in use at once, as Linux counts it, above that of the process before the network is
                 made: the network with gradients and optimizer is part of it

FastfoodWrap draws its directions layer by layer and keeps three numbers for each; DenseWrap keeps all of D, which at
dim 4096 would be 4096 networks, so it gets as few directions as fit. Both cut tied weights in two.
"""

import importlib.util
import multiprocessing
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from pytorch_lightning import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from writer_overhead import SKIPPED, STEPS, Clock, SmallGPT, tokens

from lightning_sketch import SubspaceModule

ROUNDS, DIM, DENSE = 5, 4096, 64
INSTALL = (
    "intrinsic.fastfood is not importable: clone https://github.com/jgamper/intrinsic-dimensionality and put it on "
    "PYTHONPATH (the release 0.1 on PyPI holds no code)"
)


class Peer(SmallGPT):
    """A wrapper of the network that trains one vector."""

    def __init__(self, wrap, dim):
        super().__init__()
        self.model = wrap(Loss(self.model), dim, "cpu")

    def training_step(self, batch, batch_idx):
        return self.model(batch[0])


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        return self.model(rows, labels=rows).loss


def fastfood():
    from intrinsic.fastfood import FastfoodWrap

    return Peer(FastfoodWrap, DIM)


def dense():
    from intrinsic.dense import DenseWrap

    return Peer(DenseWrap, DENSE)


ARMS = {
    "full training": SmallGPT,
    f"subspace, dim {DIM}": lambda: SubspaceModule(SmallGPT(), dim=DIM, scale=100),
    f"FastfoodWrap, dim {DIM}": fastfood,
    f"DenseWrap, dim {DENSE}": dense,
}


def memory(field):
    """Return VmRSS or VmHWM of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run(name, threads):
    """Measure times of steps, and peak memory."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    data, clock = DataLoader(TensorDataset(tokens()), batch_size=8), Clock()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=STEPS, accelerator="cpu", logger=False, callbacks=[clock], **quiet)
    before = memory("VmRSS")
    trainer.fit(ARMS[name](), data)
    return clock.steps, memory("VmHWM") - before


def table(threads):
    """Print a line per arm."""
    arms = list(ARMS)[: 4 if importlib.util.find_spec("intrinsic") else 2]
    n = sum(p.numel() for p in SmallGPT().parameters())
    print(f"\n{n:,} parameters, {threads} threads, {ROUNDS} rounds of {STEPS - SKIPPED} steps")
    if len(arms) == 2:
        print(INSTALL)
    times, peaks = {name: [] for name in arms}, {name: [] for name in arms}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(ROUNDS):
            for name in arms:
                steps, peak = pool.apply(run, (name, threads))
                times[name] += steps
                peaks[name].append(peak)
    base, least = statistics.median(times[arms[0]]), min(times[arms[0]])
    print(f"{'':<24}{'median':>10}{'ratio':>7}{'least':>10}{'ratio':>7}{'peak':>10}")
    for name, steps in times.items():
        median, best, peak = statistics.median(steps), min(steps), statistics.median(peaks[name])
        seconds = f"{median * 1e3:>7.0f} ms{median / base:>7.2f}{best * 1e3:>7.0f} ms{best / least:>7.2f}"
        print(f"{name:<24}{seconds}{peak:>7.0f} MB", flush=True)
    print(f"DenseWrap at dim {DIM} would keep {4 * n * DIM / 1e9:.0f} GB")


if __name__ == "__main__":
    start = time.perf_counter()
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    print(f"{time.perf_counter() - start:.0f} s")
