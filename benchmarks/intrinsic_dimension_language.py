"""How many of its parameters a small GPT needs: next-token prediction, three sizes and two amounts of text.

Text: the docstrings of Python's standard library and its language reference (pydoc_data), as tokens of a byte-pair
encoding of 256 that is learned on them; packages that are held out validate. GPTs of two layers and three widths train
for 2,000 steps of 16 pieces of 64 tokens by Adam. Two million tokens are two passes over all text, and eight over a
quarter of it. The models start as the unigram model: zero weights in the last layer, log frequencies as its bias.

The rate of full training is the best of some that differ by a factor of two, for each size. In a subspace each dim is
asked at factors of about three of it, as `IntrinsicDimensionTuner` does by itself, and judged at the best.

full           loss after full training, on held-out text
d90            the smallest dim, interpolated in its logarithm, with 90 % of the gain of full training over the unigram
               model
d90 of random  the same with 90 % of the gain of training along n - 1 random directions. That is full training in other
               coordinates, nearly a rotation, at which Adam is worse (Zhang et al., arXiv:2410.19964)

python benchmarks/intrinsic_dimension_language.py [--size 20k ...] [--text quarter ...] [--structure layers]
    [--seeds 1] [--runs FOLDER] [--out FILE]

Both amounts of text, on one core: --size 20k 8 minutes, 80k 9, 300k 17. What was trained is in FOLDER, and is not done
again.
"""

import argparse
import ast
import datetime
import itertools
import json
import logging
import math
import platform
import random
import sysconfig
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import pytorch_lightning
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import IntrinsicDimensionTuner

VOCABULARY, CONTEXT, LAYERS, STEPS, BATCH, VALIDATED = 256, 64, 2, 2000, 16, 512
SIZES = {"20k": (20, 2, 0.02), "80k": (48, 4, 0.01), "300k": (96, 8, 0.006)}  # width, heads, rate of full training
TEXTS = {"quarter": 4, "all": 1}
PARTS = (1 / 4, 1 / 2, 3 / 4)  # of n; then n - 1
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
RESULTS = Path(__file__).parent / "results" / "intrinsic_dimension_language.jsonl"


class GPT(LightningModule):
    def __init__(self, width, heads, lr, frequencies):
        super().__init__()
        self.lr = lr
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        nn.init.zeros_(self.head.weight)
        self.head.bias.data = frequencies.log()
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        h = self.tokens(x) + self.positions.weight
        for layer in self.layers:
            h = layer(h, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(h))

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(20 * (step + 1) / STEPS, (1 + math.cos(math.pi * step / STEPS)) / 2)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def documents():
    """Return texts by package, of paragraphs that did not occur before."""
    root, texts = Path(sysconfig.get_path("stdlib")), {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if SKIPPED.isdisjoint(parts):
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)
            nodes = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, kinds)]
            texts.setdefault(parts[0], []).extend(ast.get_docstring(node) or "" for node in nodes)
    texts |= {f"reference: {name}": [text] for name, text in topics.items()}
    seen: set[str] = set()
    for name, several in texts.items():
        for place, text in enumerate(several):
            new = [paragraph for paragraph in text.split("\n\n") if paragraph not in seen]
            seen.update(new)
            several[place] = "\n\n".join(new).encode("ascii", "ignore").decode()
        texts[name] = [text for text in several if len(text) >= 30]
    return texts


def tokens():
    """Return the tokens to train on and those of packages that are held out, 8 % of the letters."""
    texts, train, held_out = documents(), [], []
    enough = 0.08 * sum(len(text) for several in texts.values() for text in several)
    names = sorted(texts)
    random.Random(0).shuffle(names)
    for name in names:
        (held_out if sum(map(len, held_out)) < enough else train).extend(texts[name])
    random.Random(1).shuffle(train)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(" ".join(train + held_out))
    alphabet = sorted({letter for piece, _ in pieces for letter in piece})
    learn = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(train, learn)
    return [
        torch.tensor([i for text in texts for i in (*tokenizer.encode(text).ids, 0)]) for texts in (train, held_out)
    ]


def trivial(train, asked):
    """Return the frequencies of tokens, and the losses of the unigram and of the best smoothed bigram model."""
    single = torch.bincount(train, minlength=VOCABULARY) + 1.0
    single /= single.sum()
    pairs = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).view(VOCABULARY, -1)
    smooth = [(pairs + a * single) / (pairs.sum(dim=1, keepdim=True) + a) for a in (1, 3, 10, 30, 100, 300)]
    bigram = min(float(-guess[asked[:, :-1], asked[:, 1:]].log().mean()) for guess in smooth)
    return single, float(-single[asked[:, 1:]].log().mean()), bigram


def pieces(train, held_out):
    """Return pieces at random places of the text, as many as are trained on, and pieces of the held-out text."""
    starts = torch.randint(len(train) - CONTEXT, (STEPS * BATCH,), generator=torch.Generator().manual_seed(0))
    evenly = torch.linspace(0, len(held_out) - CONTEXT - 1, VALIDATED).long()
    window = torch.arange(CONTEXT + 1)
    return train[starts[:, None] + window], held_out[evenly[:, None] + window]


def crossing(values, target):
    """Return where the loss falls to the target, interpolated in the logarithm of dim; None if it does not."""
    points = sorted(values.items())
    for (dim, loss), (larger, lower) in itertools.pairwise(points):
        if loss > target >= lower:
            return round(dim * (larger / dim) ** ((loss - target) / (loss - lower)))
    return None if points[0][1] > target else points[0][0]


def measured(size, text, train, held_out, args):
    """Return the row of one model and one amount of text."""
    width, heads, lr = SIZES[size]
    train = train[: len(train) // TEXTS[text]]
    taken, asked = pieces(train, held_out)
    frequencies, unigram, bigram = trivial(train, asked)
    seed_everything(0, verbose=False)
    model = GPT(width, heads, lr, frequencies)
    n, start = sum(p.numel() for p in model.parameters()), time.process_time()
    trainer = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "default_root_dir": args.runs,
    }
    result = IntrinsicDimensionTuner(trainer, structure=args.structure).find(
        model,
        DataLoader(TensorDataset(taken), batch_size=BATCH, shuffle=True),
        DataLoader(TensorDataset(asked), batch_size=128),
        dims=[*(round(part * n) for part in PARTS), n - 1],
        monitor="loss",
        mode="min",
        seeds=args.seeds,
    )
    table = {row["dim"]: row for row in result.table()}
    losses = {dim: row["mean"] for dim, row in table.items()}
    d90 = crossing({**losses, n: result.baseline}, result.target)
    of_random = crossing(losses, result.start - 0.9 * (result.start - losses[n - 1]))
    return {
        "size": size,
        "n": n,
        "tokens": len(train),
        "structure": args.structure,
        "seeds": args.seeds,
        "unigram": round(unigram, 4),
        "bigram": round(bigram, 4),
        "start": round(result.start, 4),
        "full": round(result.baseline, 4),
        "losses": {dim: round(loss, 4) for dim, loss in losses.items()},
        "rates": {dim: row["scale"] for dim, row in table.items()},
        "gains": {
            dim: round((result.start - loss) / (result.start - result.baseline), 3) for dim, loss in losses.items()
        },
        "d90": d90,
        "d90 / n": d90 and round(d90 / n, 3),
        "d90 of random": of_random,
        "d90 of random / n": of_random and round(of_random / n, 3),
        "runs": 1 + len(result.results["dim"]),
        "cpu_s": round(time.process_time() - start),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--text", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--structure", choices=["layers"], help="learn a scale for each layer")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/intrinsic_dimension_language"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of JSON lines to append to")
    args = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*nested tensor|The number of training")
    train, held_out = tokens()
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "lightning_sketch": version("lightning-sketch"),
    }
    for size in args.size:
        for text in args.text:
            row = {**about, **measured(size, text, train, held_out, args)}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            parts = " ".join(f"{gain:.3f} at {dim} (rate {row['rates'][dim]:g})," for dim, gain in row["gains"].items())
            print(
                f"{size}, {row['tokens']:,} tokens: n = {row['n']:,}; loss {row['unigram']:.3f} of the unigram model, "
                f"{row['bigram']:.3f} bigram, {row['full']:.3f} full\n    of the gain: {parts} 1 at n\n    d90 "
                f"{row['d90']} = {row['d90 / n']} n; of random directions {row['d90 of random']} = "
                f"{row['d90 of random / n']} n; {row['runs']} runs, {row['cpu_s']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
