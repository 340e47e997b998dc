"""Measure what it costs to check every batch of rows: two witnesses at a checkpoint, two losses in training.

A GPT-2 of 10M parameters (5 layers of width 384, vocabulary 2000, dropout 0.1) on padded batches of 32 rows of 64
tokens, and a perceptron of 10,000 parameters on batches of 32. Printed are the share of the time of `sketch_gradients`
that its checks take, from the second batch on, and that of the checks in a training step with per="example". Both are
CPU seconds of one thread, from one run.

python benchmarks/row_checks.py [batches]        needs transformers
"""

import logging
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch import BlockSRHT, GradientSketchWriter, sketch_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks.gradient_sketch_writer._example_rows import TrainingExamples
from lightning_sketch.per_example.example_sketches import ExampleSketches

BATCH, TOKENS, WORDS = 32, 64, 2000


class Text(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=TOKENS, n_embd=384, n_layer=5, n_head=6))

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)

    def batches(self, count):
        lengths = torch.randint(TOKENS // 3, TOKENS + 1, (count * BATCH,))
        ids = torch.randint(WORDS, (count * BATCH, TOKENS))
        labels = ids.where(torch.arange(TOKENS) < lengths[:, None], -100)
        numbers = torch.arange(count * BATCH)
        rows = zip(ids, labels, numbers, strict=True)
        return DataLoader([{"input_ids": i, "labels": y, "number": n} for i, y, n in rows], BATCH)


class Perceptron(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 130), nn.GELU(), nn.Linear(130, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["x"]), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def batches(self, count):
        rows = [{"x": torch.randn(64), "labels": i % 10, "number": i} for i in range(count * BATCH)]
        return DataLoader(rows, BATCH)


def timed(owner, name, spent):
    """Add the CPU time of a method to `spent`, while the context of the caller lasts."""
    plain = getattr(owner, name)

    def measured(self, *args, **kwargs):
        start = time.process_time()
        try:
            return plain(self, *args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    setattr(owner, name, measured)
    return lambda: setattr(owner, name, plain)


def share_of_rows(module, count):
    sketch = BlockSRHT(Layout.of(module).n, 4096)
    checks, batches = [], []
    undo = timed(ExampleSketches, "alone", checks), timed(ExampleSketches, "__call__", batches)
    sketch_gradients(module, module.batches(count), sketch)
    for put_back in undo:
        put_back()
    assert len(checks) == 2 * count
    return sum(checks[2:]) / (sum(batches[1:]) - sum(checks[2:]))


def share_of_training(module, count):
    checks = []
    put_back = timed(TrainingExamples, "_weighing", checks)
    with tempfile.TemporaryDirectory() as folder:
        writer = GradientSketchWriter(Path(folder) / "store", per="example", index_key="number")
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        run = Trainer(max_epochs=1, accelerator="cpu", callbacks=[writer], enable_checkpointing=False, **options)
        starts = []
        module.on_train_batch_start = lambda *_: starts.append(time.process_time())
        run.fit(module, module.batches(count))
        starts.append(time.process_time())
    put_back()
    return sum(checks[1:]) / (starts[-1] - starts[1] - sum(checks[1:]))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {count} batches of {BATCH}")
    for make, times in ((Text, 1), (Perceptron, 20)):
        module = make()
        size = f"{sum(p.numel() for p in module.parameters()):,} parameters"
        print(
            f"{make.__name__}, {size}: checks add {share_of_rows(module, times * count):.1%} to sketch_gradients",
            end="",
        )
        print(f", {share_of_training(make(), times * count):.1%} to a training step with rows of examples")


if __name__ == "__main__":
    main()
