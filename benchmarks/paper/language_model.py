"""What tables 1 and 6 share: a small language model, its training, and 128 of its gradients.

A GPT-2 of six layers and 5.1M parameters learns, byte by byte, to continue the sources of Python's standard library,
for one short epoch. Then, without dropout, gradients are taken of 64 sequences x it was trained on and of 64 sequences
z of other files, whose 2^12 dot products ∇L(x)·∇L(z) are the exact scores.

The paper has a GPT-2 of six layers on WikiText-103, fine-tuned from the pretrained one.
"""

import argparse
import logging
import statistics
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch.autodiff.layout import Layout

sys.path.append(str(Path(__file__).parents[1]))
from sketch_speed import machine

HALF = 64  # sequences on either side of a pair


class Size(NamedTuple):
    """Sizes of the model and its training."""

    width: int
    layers: int
    tokens: int  # in a sequence
    steps: int
    batch: int


SMALL = Size(width=64, layers=2, tokens=64, steps=40, batch=8)
USUAL = Size(width=264, layers=6, tokens=128, steps=300, batch=8)
FULL = Size(width=768, layers=6, tokens=256, steps=800, batch=16)  # 22 GB of gradients


class SmallGPT(LightningModule):
    def __init__(self, size: Size):
        super().__init__()
        shape = {"n_embd": size.width, "n_layer": size.layers, "n_head": 4, "n_positions": size.tokens}
        self.gpt = GPT2LMHeadModel(GPT2Config(vocab_size=256, **shape, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch):
        return self.gpt(batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Dots(NamedTuple):
    """Dot products of 128 vectors: each of the first half with each of the second."""

    products: Float[Tensor, "64 64"]
    squares: Float[Tensor, " 128"]

    @classmethod
    def of(cls, rows: Float[Tensor, "128 size"]) -> "Dots":
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return cls((rows[:HALF] @ rows[HALF:].T).double(), squares)

    @classmethod
    def sum(cls, parts: Iterable["Dots"]) -> "Dots":
        """Add the products of parts of the vectors."""
        return cls(*map(sum, zip(*parts, strict=True)))

    def cosines(self) -> Float[Tensor, "64 64"]:
        lengths = self.squares.sqrt()
        return self.products / lengths[:HALF, None] / lengths[HALF:]

    def fidelity(self, exact: "Dots") -> tuple[float, float]:
        """Return Pearson's r of the dot products, and of the cosines."""
        return _pearson(self.products, exact.products), _pearson(self.cosines(), exact.cosines())


def _pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


class Problem(NamedTuple):
    """The trained model, the sequences, and their gradients as rows in the order of the layout."""

    module: SmallGPT
    layout: Layout
    examples: Int[Tensor, "128 tokens"]
    rows: Float[Tensor, "128 n"]
    parts: dict[str, Dots]  # of each parameter alone
    exact: Dots


def prepared(size: Size, device: str) -> Problem:
    """Train the model, take the gradients, and print what they are of."""
    print(f"{machine()}, {torch.get_num_threads()} threads, {device}")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*treespec|.*number of training batches")
    seed_everything(0, verbose=False)
    train, queries = sequences(size)
    module = trained(size, train, device)
    layout = Layout.of(module)
    examples = torch.cat([train[torch.randperm(len(train))[:HALF]], queries]).to(device)
    rows, losses = gradients(module, layout, examples)
    split = rows.split([shape.numel() for shape in layout.shapes], dim=1)
    parts = dict(zip(layout.names, map(Dots.of, split), strict=True))
    exact = Dots.sum(parts.values())
    print(f"{layout.n:,} parameters, {size.steps} steps of {size.batch} x {size.tokens} tokens")
    means, cosines = [statistics.mean(losses[:HALF]), statistics.mean(losses[HALF:])], exact.cosines()
    print("loss {:.2f} on the 64 of training, {:.2f} on the 64 others; ".format(*means), end="")
    print(f"cosines {float(cosines.mean()):.3f} ± {float(cosines.std()):.3f}\n", flush=True)
    return Problem(module, layout, examples, rows, parts, exact)


def sequences(size: Size) -> tuple[Int[Tensor, "train tokens"], Int[Tensor, "queries tokens"]]:
    """Return parts of source files, byte by byte; every eighth file is for the queries."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train, queries = [path for number, path in enumerate(files) if number % 8], files[::8]
    return pieces(train, size.tokens, size.steps * size.batch), pieces(queries, size.tokens, HALF)


def pieces(files: list[Path], tokens: int, count: int) -> Int[Tensor, "count tokens"]:
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    pieces = text[: len(text) // tokens * tokens].view(-1, tokens)
    return pieces[torch.randperm(len(pieces))[:count]]


def trained(size: Size, train: Tensor, device: str) -> SmallGPT:
    module = SmallGPT(size)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator=device, devices=1, logger=False, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(train), batch_size=size.batch))
    return module.eval().to(device)


def gradients(module: SmallGPT, layout: Layout, examples: Tensor) -> tuple[Float[Tensor, "examples n"], list[float]]:
    """Return a row for each example, and its loss."""
    weights, rows, losses = (
        layout.parameters(module),
        examples.new_empty(len(examples), layout.n, dtype=torch.float),
        [],
    )
    for row, example in zip(rows, examples, strict=True):
        loss = module.training_step([example[None]])
        row[:] = layout.flatten(torch.autograd.grad(loss, weights), row)
        losses.append(loss.item())
    return rows, losses


def arguments(doc: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that both tables have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="try the script out; the numbers say nothing")
    parser.add_argument("--full", action="store_true", help="a model of 43M parameters, for a GPU of 80 GB")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


def size_of(asked: argparse.Namespace) -> Size:
    return SMALL if asked.small else FULL if asked.full else USUAL
