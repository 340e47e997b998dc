"""What table 10 fine-tunes: a small GPT that was pretrained on code, to classify code and to generate English."""

import copy
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from intrinsic_dimension_language import BATCH, CONTEXT, GPT, STEPS, VOCABULARY

PACKAGES = ("asyncio", "email", "tkinter")
STDLIB = Path(sysconfig.get_path("stdlib"))
HELD_OUT = 1024  # pieces to validate on


class Size(NamedTuple):
    width: int
    heads: int
    rate: float  # of pretraining
    pretraining: int  # steps
    steps: int  # of full fine-tuning
    seeds: int


SMALL, USUAL, FULL = Size(16, 2, 0.01, 40, 20, 1), Size(20, 2, 0.02, STEPS, 500, 3), Size(256, 8, 0.003, STEPS, 2000, 3)


class Task(NamedTuple):
    train: TensorDataset
    val: TensorDataset
    monitor: str
    mode: str


class FineTuned(LightningModule):
    """A pretrained GPT with the pieces' classes as its outputs, if there are classes."""

    def __init__(self, pretrained: GPT, classes: int):
        super().__init__()
        self.net = copy.deepcopy(pretrained)
        if classes:
            self.net.head = nn.Linear(self.net.head.in_features, classes)

    def training_step(self, batch):
        if len(batch) == 1:
            return self.net.training_step(batch)
        return F.cross_entropy(self._logits(batch), batch[1])

    def _logits(self, batch):
        return self.net(batch[0][:, :-1]).mean(1)

    def validation_step(self, batch):
        if len(batch) == 1:
            self.log("loss", self.training_step(batch))
        else:
            self.log("accuracy", (self._logits(batch).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def read(files: list[Path]) -> str:
    return "\n".join(file.read_text("utf-8", "ignore") for file in files).encode("ascii", "ignore").decode()


def pieces(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return a text as rows of 65 tokens, in random order."""
    ids = torch.tensor([i for line in text.splitlines(keepends=True) for i in tokenizer.encode(line).ids])
    rows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return rows[torch.randperm(len(rows))]


def tasks(tokenizer: Tokenizer) -> dict[str, Task]:
    """Return both tasks; of every five files of a package, and of ten topics of the reference, one is held out."""
    train, val = [], []
    for package in PACKAGES:
        files = sorted((STDLIB / package).rglob("*.py"))
        train.append(pieces(tokenizer, read([file for number, file in enumerate(files) if number % 5])))
        val.append(pieces(tokenizer, read(files[::5])))
    sets = []
    for rows in (train, val):
        count = min(HELD_OUT // 3 if rows is val else len(max(rows, key=len)), *map(len, rows))
        labels = torch.arange(len(PACKAGES)).repeat_interleave(count)
        sets.append(TensorDataset(torch.cat([part[:count] for part in rows]), labels))
    held = ["\n".join(text for i, text in enumerate(topics.values()) if (i % 10 == 0) == asked) for asked in (0, 1)]
    reference = [
        TensorDataset(pieces(tokenizer, text)[:count]) for text, count in zip(held, (None, HELD_OUT), strict=True)
    ]
    return {"classify": Task(*sets, "accuracy", "max"), "generate": Task(*reference, "loss", "min")}


def trainer(steps: int, every: int, device: str, callbacks: list[Callback]) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    schedule = {"max_steps": steps, "val_check_interval": every, "check_val_every_n_epoch": None}
    own = {"accelerator": device, "devices": 1, "logger": False, "num_sanity_val_steps": 0}
    return Trainer(**own, **schedule, **quiet, callbacks=callbacks)


def pretrained(size: Size, device: str) -> tuple[GPT, Tokenizer]:
    """Return a model of the modules that lie in the library's folder itself, and the encoding learned on them."""
    text = read(sorted(STDLIB.glob("*.py")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({letter for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text) for letter in piece})
    learn = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), learn)
    rows = pieces(tokenizer, text)
    counts = torch.bincount(rows.flatten(), minlength=VOCABULARY) + 1.0
    module = GPT(size.width, size.heads, size.rate, counts / counts.sum())
    data = DataLoader(TensorDataset(rows), batch_size=BATCH, shuffle=True)
    trainer(size.pretraining, size.pretraining, device, []).fit(module, data)
    return module, tokenizer


def fit(module: LightningModule, task: Task, steps: int, every: int, device: str, *callbacks: Callback) -> float:
    """Train, and return the metric of the last validation."""
    running = trainer(steps, every, device, list(callbacks))
    running.fit(module, DataLoader(task.train, BATCH, shuffle=True), DataLoader(task.val, 256))
    return float(running.callback_metrics[task.monitor])
