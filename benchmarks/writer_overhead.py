"""Measure the cost of GradientSketchWriter per training step (a few minutes).

A transformer of 10M parameters (GPT-2, 5 layers of width 384, vocabulary 2000, AdamW, dropout 0.1) on the source text
of Python's standard library, 8 rows of 64 tokens a batch, trained by the Trainer: as it is, and with the writer. The
arms take turns, in one process, three times; fewer if that would take more than six minutes.

python benchmarks/writer_overhead.py [--threads 2] [--workers 0] [--steps 12] [--rounds 3] [--small]
needs transformers

clock      median step in ms, and its ratio to that without the writer
least      shortest step, which neighbors disturb least
CPU        median time of the processor in a step, of all threads of the training process together
first,     of rows of examples: how the loss weighs them is checked on every batch of the first 32, and on a quarter of
later      the later ones, of which the time is a quarter of a checked and three quarters of an unchecked batch's

With --workers, that many processes of the data loader read the text and cut it into tokens, batch after batch; without,
the tokens are in memory.
"""

import argparse
import functools
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from sketch_speed import machine, number, print_table
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch import GradientSketchWriter
from lightning_sketch.callbacks.gradient_sketch_writer._example_rows import _ALL_CHECKED, _CHECKED_LATER, _is_drawn

SECONDS, SKIPPED = 360, 2
TOKENS, WORDS, BATCH = 64, 2000, 8
EXAMPLES = "per example, dim 4096"
ARMS = {
    "plain": None,
    "per step, dim 4096": {"per": "step", "dim": 4096},
    "per step, dim 65536": {"per": "step", "dim": 1 << 16},
    EXAMPLES: {"per": "example", "dim": 4096, "index_key": "hash"},
}


class SmallGPT(LightningModule):
    def __init__(self, small: bool = False):
        super().__init__()
        size = {"n_embd": 32, "n_layer": 1, "n_head": 2} if small else {"n_embd": 384, "n_layer": 5, "n_head": 6}
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=TOKENS, **size))

    def training_step(self, batch, batch_idx):
        return self.model(batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Clock(Callback):
    """A callback that records the time from the start of a step to the start of the next, by the clock and the CPU."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *_):
        self.starts.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, *_):
        self.starts.append((time.perf_counter(), time.process_time()))

    @property
    def steps(self):
        """The clock and CPU times of each step, by its number."""
        pairs = zip(self.starts, self.starts[1:], strict=False)
        steps = enumerate((b[0] - a[0], b[1] - a[1]) for a, b in pairs)
        return [(i, *both) for i, both in steps if i >= SKIPPED]


def sources():
    return sorted(Path(statistics.__file__).parent.glob("*.py"))[:40]


def pairs_of(text):
    pairs = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return pairs[: len(pairs) // 2 * 2].view(-1, 2) @ torch.tensor([256, 1])


@functools.cache
def frequent_pairs():
    """Return the most frequent pairs of bytes of the source files, which are the tokens."""
    known, counts = pairs_of(b"".join(path.read_bytes() for path in sources())).unique(return_counts=True)
    return known[counts.argsort(descending=True)][:WORDS].sort()[0]


def tokens(text):
    """Return the tokens of a text in rows, without the pairs of bytes that are none."""
    frequent, pairs = frequent_pairs(), pairs_of(text)
    place = torch.searchsorted(frequent, pairs).clamp(max=len(frequent) - 1)
    kept = place[frequent[place] == pairs]
    return kept[: len(kept) // TOKENS * TOKENS].view(-1, TOKENS)


class Files(Dataset):
    """The same rows, in another order; a file is read and cut into tokens for each row of it."""

    def __init__(self):
        self.rows = [(path, row) for path in sources() for row in range(len(tokens(path.read_bytes())))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        path, row = self.rows[index * 7919 % len(self.rows)]
        return [tokens(path.read_bytes())[row]]


def run(arguments, data, steps, small, folder):
    """Return the clock and CPU times of steps, with their numbers."""
    seed_everything(0, verbose=False)
    clock = Clock()
    writer = [] if arguments is None else [GradientSketchWriter(folder, **arguments)]
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[clock, *writer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(SmallGPT(small), data)
    return clock.steps


def medians(steps):
    """Return the median and the least of the clock's times, and the median of the CPU's."""
    clock, busy = zip(*((clock, busy) for _, clock, busy in steps), strict=True)
    return statistics.median(clock), min(clock), statistics.median(busy)


def parts(name, steps):
    """Return the lines of an arm, each with its times."""
    if name != EXAMPLES:
        return {name: medians(steps)}
    later = [step for step in steps if step[0] >= _ALL_CHECKED]
    checked = medians([step for step in later if _is_drawn(step[0])])
    unchecked = medians([step for step in later if not _is_drawn(step[0])])
    share = _CHECKED_LATER
    mean = [share * often + (1 - share) * seldom for often, seldom in zip(checked, unchecked, strict=True)]
    first = medians([step for step in steps if step[0] < _ALL_CHECKED])
    return {f"{name}, first {_ALL_CHECKED} batches": first, f"{name}, later": mean}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes of the data loader")
    parser.add_argument("--steps", type=int, default=12, help="measured in each round for each line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tries the script out; the numbers say nothing")
    asked = parser.parse_args()
    if not any(_is_drawn(_ALL_CHECKED + i) for i in range(asked.steps)):
        parser.error("among so few steps no later batch is checked: ask for more")
    logging.disable(logging.WARNING)
    begin = time.perf_counter()
    torch.set_num_threads(asked.threads)
    if asked.workers:
        data = DataLoader(Files(), BATCH, num_workers=asked.workers)
    else:
        data = DataLoader(TensorDataset(torch.cat([tokens(path.read_bytes()) for path in sources()])), BATCH)
    n = sum(p.numel() for p in SmallGPT(asked.small).parameters())
    print(f"{machine()}, {asked.threads} threads, {asked.workers} workers, {n:,} parameters")

    times = {name: [] for name in ARMS}
    rounds, longest = 0, 0.0
    while rounds < asked.rounds and time.perf_counter() - begin + longest < SECONDS:
        start = time.perf_counter()
        for name, arguments in ARMS.items():
            skipped = _ALL_CHECKED if name == EXAMPLES else SKIPPED
            with tempfile.TemporaryDirectory() as folder:
                times[name] += run(arguments, data, skipped + asked.steps, asked.small, folder)
        rounds, longest = rounds + 1, max(longest, time.perf_counter() - start)
    print(f"{rounds} rounds of {asked.steps} steps\n")

    base = medians(times["plain"])
    lines = []
    for name, steps in times.items():
        for title, found in parts(name, steps).items():
            cells = [(number(1e3 * own, 0), number(own / plain, 2)) for own, plain in zip(found, base, strict=True)]
            lines.append([title, *(cell for both in cells for cell in both)])
    print_table(["", "clock", "ratio", "least", "ratio", "CPU", "ratio"], lines)


if __name__ == "__main__":
    main()
