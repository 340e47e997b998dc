"""Measure the cost of GradientSketchWriter per training step.

A transformer of 10M parameters (GPT-2, 5 layers of width 384, vocabulary 2000, AdamW, dropout 0.1) on the
source text of Python's standard library, 8 rows of 64 tokens a batch, trained by the Trainer: as it is, and with the
writer. The arms take turns, in one process; printed are the median step of each and their ratio.

python benchmarks/writer_overhead.py [threads]        needs transformers
"""

import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch import GradientSketchWriter

ROUNDS, STEPS, SKIPPED = 5, 8, 2
ARMS = {
    "plain": None,
    "per step, dim 4096": {"per": "step", "dim": 4096},
    "per step, dim 65536": {"per": "step", "dim": 1 << 16},
    "per example, dim 4096": {"per": "example", "dim": 4096, "index_key": "hash"},
}


class SmallGPT(LightningModule):
    def __init__(self):
        super().__init__()
        config = GPT2Config(vocab_size=2000, n_positions=64, n_embd=384, n_layer=5, n_head=6)
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.model(batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Clock(Callback):
    """A callback that records the time from the start of a step to the start of the next."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *_):
        self.starts.append(time.perf_counter())

    def on_train_end(self, *_):
        self.starts.append(time.perf_counter())

    @property
    def steps(self):
        return [b - a for a, b in zip(self.starts[SKIPPED:], self.starts[SKIPPED + 1 :], strict=False)]


def tokens():
    """Return bytes of source files, with the most frequent pairs of bytes as further tokens."""
    text = b"".join(path.read_bytes() for path in sorted(Path(statistics.__file__).parent.glob("*.py"))[:40])
    pairs = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pairs = pairs[: len(pairs) // 2 * 2].view(-1, 2) @ torch.tensor([256, 1])
    known, counts = pairs.unique(return_counts=True)
    frequent = known[counts.argsort(descending=True)][:2000].sort()[0]
    place = torch.searchsorted(frequent, pairs).clamp(max=len(frequent) - 1)
    kept = place[frequent[place] == pairs]
    return kept[: len(kept) // 64 * 64].view(-1, 64)


def run(arguments, data, folder):
    seed_everything(0, verbose=False)
    clock = Clock()
    writer = [] if arguments is None else [GradientSketchWriter(folder, **arguments)]
    Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        callbacks=[clock, *writer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(SmallGPT(), data)
    return clock.steps


def main():
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    data = DataLoader(TensorDataset(tokens()), batch_size=8)
    n = sum(p.numel() for p in SmallGPT().parameters())
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{n:,} parameters, {ROUNDS} rounds of {STEPS - SKIPPED} steps\n")
    times = {name: [] for name in ARMS}
    for _ in range(ROUNDS):
        for name, arguments in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name] += run(arguments, data, folder)
    base, least = statistics.median(times["plain"]), min(times["plain"])
    print(f"{'':<24}{'median':>10}{'ratio':>8}{'least':>10}{'ratio':>8}")
    for name, steps in times.items():
        median, best = statistics.median(steps), min(steps)
        print(f"{name:<24}{median * 1e3:>7.0f} ms{median / base:>8.2f}{best * 1e3:>7.0f} ms{best / least:>8.2f}")


if __name__ == "__main__":
    main()
