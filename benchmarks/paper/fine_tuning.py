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
    """A pretrained GPT; to classify, with a new last layer whose outputs are averaged over the tokens."""

    def __init__(self, pretrained: GPT, task: Task):
        super().__init__()
        self.net = copy.deepcopy(pretrained)
        if task.monitor == "accuracy":
            self.net.head = nn.Linear(self.net.head.in_features, int(task.train.tensors[1].max()) + 1)

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


def of_library(package: str) -> list[str]:
    """Return the code of a package, but that of every fifth file, and that of these."""
    files = sorted((STDLIB / package).rglob("*.py"))
    return [read([file for i, file in enumerate(files) if (i % 5 == 0) == held]) for held in (False, True)]


def of_reference() -> list[str]:
    """Return the language reference, but every tenth topic, and these."""
    return [
        "\n".join(text for i, text in enumerate(topics.values()) if (i % 10 == 0) == held) for held in (False, True)
    ]


def classification(tokenizer: Tokenizer, texts: list[list[str]]) -> Task:
    """Return the task to tell texts apart; there are as many pieces of each."""
    sets = []
    for parts, most in zip(zip(*texts, strict=True), (1 << 20, HELD_OUT // len(texts)), strict=True):
        rows = [pieces(tokenizer, part) for part in parts]
        count = min(most, *map(len, rows))
        labels = torch.arange(len(texts)).repeat_interleave(count)
        sets.append(TensorDataset(torch.cat([part[:count] for part in rows]), labels))
    return Task(*sets, "accuracy", "max")


def sources(tokenizer: Tokenizer) -> Task:
    return classification(tokenizer, [of_library("asyncio"), of_library("encodings"), of_reference()])


def packages(tokenizer: Tokenizer) -> Task:
    return classification(tokenizer, [of_library("asyncio"), of_library("email"), of_library("tkinter")])


def generate(tokenizer: Tokenizer) -> Task:
    train, val = (TensorDataset(pieces(tokenizer, text)) for text in of_reference())
    return Task(train, TensorDataset(val.tensors[0][:HELD_OUT]), "loss", "min")


TASKS = {"sources": sources, "packages": packages, "generate": generate}


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
