"""A small GPT on real documents, trained on all of them and on many halves.

600 training and 60 query documents: docstrings of 60 modules of the standard library, 10 and 1 of each, cut to 64
tokens of a byte-pair encoding that is learned from the training texts. Training is AdamW with warm-up and linear
decay; the loss of a batch is the mean over its tokens, that of a document the mean over its own.

Another Python has other docstrings: the files of trained models and losses carry a hash of texts and training.
"""

import ast
import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lds_problems import halves
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

CONTEXT, WIDTH, HEADS, LAYERS, VOCABULARY = 64, 48, 4, 2, 320
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "antigravity", "this"}


class Block(nn.Module):
    """Causal attention and a network of two layers, each after a LayerNorm and added to its input."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + self.projection((attention @ v).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Map tokens (documents, time) to logits (documents, time, vocabulary); the head is not tied."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** (0.5 * ("projection" in name)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(torch.arange(x.shape[-1])))))


def token_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each token, zero where y is -100."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)


def document_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of the tokens of each document."""
    return token_losses(logits, y).sum(-1) / (y >= 0).sum(-1)


def batch_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of the tokens of a batch, as training minimizes it."""
    return token_losses(logits, y).sum() / (y >= 0).sum()


@dataclass(frozen=True)
class Trained:
    """Weights of one model, and Adam's second moments at that step, by name."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    step: int

    def module(self) -> GPT:
        module = GPT()
        module.load_state_dict(self.weights)
        return module.eval()

    def optimizer(self, module: GPT) -> torch.optim.AdamW:
        """Return an AdamW of the module with these second moments, as a checkpoint restores it."""
        optimizer = torch.optim.AdamW(module.parameters())
        for name, parameter in module.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": self.moments[name].clone(),
            }
        return optimizer


@dataclass(frozen=True)
class Corpus:
    """Texts, their tokens and labels padded to (documents, 64), labels -100 where padded, and how to train on them."""

    train: list[str]
    queries: list[str]
    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor
    lr: float = 5e-3
    decay: float = 0.1
    batch: int = 32
    epochs: int = 16

    @classmethod
    def of(cls, train: list[str], queries: list[str], starts: list[int] | None = None) -> "Corpus":
        """Return the corpus of texts; the byte-pair encoding is learned from the training texts.

        With `starts` the loss of a query is that of its tokens from this letter on.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(
            {c for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str(" ".join(train + queries)) for c in text}
        )
        tokenizer.train_from_iterator(
            train,
            trainers.BpeTrainer(
                vocab_size=VOCABULARY, special_tokens=["<start>"], initial_alphabet=alphabet, show_progress=False
            ),
        )
        tokenizer.enable_truncation(CONTEXT)
        cut = [tokenizer.encode(text) for text in train + queries]
        texts = [text[: found.offsets[-1][1]] for text, found in zip(train + queries, cut, strict=True)]
        encoded = [[0, *found.ids] for found in cut]
        x, y = torch.zeros(len(encoded), CONTEXT, dtype=torch.long), torch.full((len(encoded), CONTEXT), -100)
        for row, ids in enumerate(encoded):
            x[row, : len(ids) - 1], y[row, : len(ids) - 1] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        count = len(train)
        for row, found, start in zip(y[count:], cut[count:], starts or [0] * len(queries), strict=True):
            row[: sum(end <= start for _, end in found.offsets)] = -100
        return cls(texts[:count], texts[count:], x[:count], y[:count], x[count:], y[count:])

    @property
    def key(self) -> str:
        """Name texts and training."""
        tensors = [self.x, self.y, self.x_query, self.y_query]
        text = repr(
            (self.train, self.queries, self.lr, self.decay, self.batch, self.epochs, [t.tolist() for t in tensors])
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def fit(self, subset: Tensor, seed: int, keep: int = 1) -> list[Trained]:
        """Train a model on the documents of some indices.

        Args:
            subset: The indices; every epoch visits them in another order and drops the last batch if it is not full.
            seed: Of initial weights and order.
            keep: How many evenly spaced steps to return, the last among them.
        """
        module, order = GPT(seed), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(module.parameters(), lr=self.lr, weight_decay=self.decay)
        steps = self.epochs * (len(subset) // self.batch)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
        )
        kept: list[Trained] = []
        for epoch in range(self.epochs):
            shuffled = subset[torch.randperm(len(subset), generator=order)]
            for number, chosen in enumerate(shuffled[: steps // self.epochs * self.batch].split(self.batch), 1):
                optimizer.zero_grad()
                batch_loss(module(self.x[chosen]), self.y[chosen]).backward()
                optimizer.step()
                schedule.step()
                step = epoch * (steps // self.epochs) + number
                if step * keep // steps > len(kept):
                    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
                    moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in module.named_parameters()}
                    kept.append(Trained(weights, moments, step))
        return kept

    @torch.no_grad()
    def query_losses(self, module: nn.Module) -> Tensor:
        """Return the loss of each query."""
        return document_losses(module(self.x_query), self.y_query)


def standard_library(modules: int = 60, train: int = 10, seed: int = 0) -> Corpus:
    """Return docstrings of the standard library: of each module `train` to learn from and one to ask."""
    folder, found = Path(sysconfig.get_path("stdlib")), {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if not SKIPPED & set(parts) and not parts[0].startswith("_"):
            found.setdefault(parts[0], set()).update(_docstrings(file))
    shuffle, taken, texts, queries = random.Random(seed), set(), [], []
    for name in sorted(found, key=lambda name: (-len(found[name]), name)):
        own = sorted(found[name] - taken)
        if len(own) > train and len(queries) < modules:
            chosen = shuffle.sample(own, train + 1)
            taken.update(chosen)
            texts += chosen[:train]
            queries += chosen[train:]
    return Corpus.of(texts, queries)


def _docstrings(file: Path) -> set[str]:
    """Return the docstrings of a file that have content and fit the context, each on one line."""
    defines = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    try:
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, defines)]
    except (SyntaxError, UnicodeDecodeError):
        return set()
    texts = {re.sub(r"\s+", " ", ast.get_docstring(node) or "").strip() for node in nodes}
    return {text for text in texts if 50 <= len(text) <= 200 and text.isascii()}


def default_cache() -> Path:
    """Return the folder below the user's cache directory that keeps what took minutes."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_sketch" / "lds_language_model"


def cached(file: Path, make: Callable[[], object]):
    """Return what is in the file, or make it and write it."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(make(), partial)
        partial.replace(file)
    return torch.load(file, weights_only=False)


def truth(corpus: Corpus, cache: Path, subsets: int = 50, repeats: int = 4) -> tuple[Tensor, Tensor]:
    """Return subsets (50, 300) and query losses (4, 50, 60) of models trained on each, with other seeds each time."""
    chosen = halves(len(corpus.train), subsets)

    def losses(repeat: int) -> Tensor:
        trained = (corpus.fit(subset, 1000 * (1 + repeat) + number)[-1] for number, subset in enumerate(chosen))
        return torch.stack([corpus.query_losses(one.module()) for one in trained])

    kept = [cached(cache / corpus.key / f"truth_{repeat}.pt", lambda r=repeat: losses(r)) for repeat in range(repeats)]
    return chosen, torch.stack(kept)


def members(corpus: Corpus, cache: Path, count: int = 5, keep: int = 8) -> list[list[Trained]]:
    """Return models on all documents, each at evenly spaced steps, the last of which is the end."""
    everything = torch.arange(len(corpus.train))
    return cached(
        cache / corpus.key / "members.pt", lambda: [corpus.fit(everything, seed, keep) for seed in range(count)]
    )


def members_on_halves(corpus: Corpus, cache: Path, count: int = 5) -> list[Trained]:
    """Return models on halves other than those of the truth, as TRAK wants them."""
    own = halves(len(corpus.train), count, seed=7)
    return cached(
        cache / corpus.key / "halves.pt", lambda: [corpus.fit(subset, seed)[-1] for seed, subset in enumerate(own)]
    )
