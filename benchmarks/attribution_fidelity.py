"""Measure how well sketches preserve the dot products of gradients.

A GPT-2 of six layers and 5.1M parameters learns, byte by byte, to continue the sources of Python's standard library,
for one short epoch. Then, without dropout, for 64 sequences x it was trained on and 64 sequences z of other files,

    S∇L(x)·S∇L(z)        is compared with        ∇L(x)·∇L(z)

by Pearson's r over the 2^12 pairs. Printed is the mean over the seeds of S, for each kind of sketch, and for

random mask    dim coordinates, chosen at random
traker         TRAK's BasicProjector with normal entries, where installed
one layer      the exact dot product of one layer's gradients, to which attribution is often restricted

.95 .98 .99    the least log2 dim at which r is higher, of those measured; the paper's is for another model and text
s/gradient     to sketch one of 128, at the largest dim of its line; gaussian and traker make one matrix for all

Pairs of long gradients weigh most in r, so that of cosines follows. Dense kinds stop at --dense-log. Needs
transformers, 4 GB of memory, 6 with traker, and 20 minutes of one thread beside other work.

Source of the questions: A. Schioppa, arXiv:2402.03994, tables 1 and 6.
"""

import argparse
import importlib.util
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch import make_sketch
from lightning_sketch.autodiff.layout import Layout

KINDS = ("block_srht", "count_sketch", "qk", "afjl", "affd", "ffd", "fjl", "gaussian")
DENSE = ("gaussian", "traker")
PAPER = {"fjl": (10, 12, 13), "affd": (10, 12, 13), "ffd": (10, 12, 14), "afjl": (12, 13, 15), "qk": (14, 16, 17)}
PAPER_LAYERS = ("0.16", "0.75", "0.89", "0.90", "0.89", "0.78", "0.38")  # token embedding, then layers 1 to 6
HALF = 64  # sequences on either side of a pair


class Size(NamedTuple):
    """Sizes of the model, its training and the table."""

    width: int
    layers: int
    tokens: int  # in a sequence
    steps: int
    batch: int
    last: int  # log2 of the largest dim


QUICK = Size(width=64, layers=2, tokens=64, steps=100, batch=8, last=12)
FULL = Size(width=264, layers=6, tokens=128, steps=300, batch=8, last=16)


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


def sequences(size: Size) -> tuple[Int[Tensor, "train tokens"], Int[Tensor, "queries tokens"]]:
    """Return parts of source files, byte by byte; every eighth file is for the queries."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train, queries = [path for number, path in enumerate(files) if number % 8], files[::8]
    return _pieces(train, size.tokens, size.steps * size.batch), _pieces(queries, size.tokens, HALF)


def _pieces(files: list[Path], tokens: int, count: int) -> Int[Tensor, "count tokens"]:
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    pieces = text[: len(text) // tokens * tokens].view(-1, tokens)
    return pieces[torch.randperm(len(pieces))[:count]]


def trained(size: Size, train: Tensor) -> SmallGPT:
    module = SmallGPT(size)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(train), batch_size=size.batch))
    return module.eval()


def gradients(module: SmallGPT, layout: Layout, examples: Tensor) -> tuple[Float[Tensor, "examples n"], list[float]]:
    """Return a row for each example, and its loss."""
    weights, rows, losses = layout.parameters(module), torch.empty(len(examples), layout.n), []
    for row, example in zip(rows, examples, strict=True):
        loss = module.training_step([example[None]])
        row[:] = layout.flatten(torch.autograd.grad(loss, weights), row)
        losses.append(loss.item())
    return rows, losses


def projection(kind: str, n: int, dim: int, seed: int) -> Callable[[Tensor], Float[Tensor, "rows dim"]]:
    if kind == "random mask":
        kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:dim]
        return lambda rows: rows[:, kept]
    if kind == "traker":
        from trak.projectors import BasicProjector, ProjectionType

        projector = BasicProjector(n, dim, seed, ProjectionType.normal, torch.device("cpu"), block_size=64)
        return lambda rows: projector.project(rows, model_id=0)
    return make_sketch(kind, n=n, dim=dim, seed=seed).matvec


def measure(kind: str, rows: Tensor, exact: Dots, dim: int, seeds: int) -> tuple[float, float, float, float]:
    """Return the mean r of dot products and of cosines, the range of the former, and the mean time."""
    start = time.perf_counter()
    found = [Dots.of(projection(kind, rows.shape[1], dim, seed)(rows)).fidelity(exact) for seed in range(seeds)]
    seconds = (time.perf_counter() - start) / seeds
    dots, cosines = zip(*found, strict=True)
    return statistics.mean(dots), statistics.mean(cosines), max(dots) - min(dots), seconds


def line(kind: str, values: Sequence[float], logs: range, *rest: str) -> None:
    cells = "".join(f"{value:7.3f}" for value in values) + "      -" * (len(logs) - len(values))
    known = list(zip(logs, values, strict=False))
    least = "".join(f"{next((log for log, r in known if r > level), '-'):>4}" for level in (0.95, 0.98, 0.99))
    print(f"{kind:13}{cells}  {least}{''.join(rest)}", flush=True)


def compare_sketches(rows: Tensor, exact: Dots, logs: range, dense_log: int, seeds: int) -> None:
    header = "".join(f"{f'2^{log}':>7}" for log in logs) + "   .95 .98 .99"
    print(f"\n{'dot products':13}{header}   (paper's)  s/gradient")
    of_cosines, apart = {}, {log: 0.0 for log in logs}
    for kind in ["random mask", *KINDS, *(["traker"] if importlib.util.find_spec("trak") else [])]:
        own = [log for log in logs if kind not in DENSE or log <= dense_log]
        found = [measure(kind, rows, exact, 1 << log, seeds) for log in own]
        dots, of_cosines[kind], spread, seconds = zip(*found, strict=True)
        paper = "{:>5}{:>4}{:>4}".format(*PAPER.get(kind, ("", "", "")))
        line(kind, dots, logs, paper, f"{seconds[-1] / len(rows):12.3f}")
        if kind in KINDS:
            apart |= {log: max(apart[log], r) for log, r in zip(own, spread, strict=True)}
    if seeds > 1:
        print("seeds differ " + "".join(f"{r:7.3f}" for r in apart.values()) + "   at most, in any kind of ours")
    print(f"\n{'cosines':13}{header}")
    for kind, values in of_cosines.items():
        line(kind, values, logs)


def compare_layers(module: SmallGPT, parts: dict[str, Dots], exact: Dots, size: Size) -> None:
    patterns = {"tok. embedding": "*.wte.*"} | {f"layer {i + 1}": f"*.h.{i}.*" for i in range(size.layers)}
    print(f"\n{'one layer':14}  parameters  dot products  cosines  (paper's)")
    paper = PAPER_LAYERS if len(patterns) == len(PAPER_LAYERS) else [""] * len(patterns)
    for (name, pattern), theirs in zip(patterns.items(), paper, strict=True):
        own = Layout.of(module, pattern)
        dots, cosines = Dots.sum(parts[parameter] for parameter in own.names).fidelity(exact)
        print(f"{name:14}{own.n:12,}{dots:14.3f}{cosines:9.3f}{theirs:>11}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and fewer dims, in less than a minute")
    parser.add_argument("--dense-log", type=int, default=10, help="largest log2 dim of gaussian and traker")
    parser.add_argument("--every", action="store_true", help="odd powers of two as well")
    parser.add_argument("--seeds", type=int, default=2)
    chosen = parser.parse_args()
    size, start = QUICK if chosen.quick else FULL, time.perf_counter()
    seed_everything(0, verbose=False)
    train, queries = sequences(size)
    module = trained(size, train)
    layout = Layout.of(module)
    rows, losses = gradients(module, layout, torch.cat([train[torch.randperm(len(train))[:HALF]], queries]))
    parts = dict(zip(layout.names, map(Dots.of, rows.split([s.numel() for s in layout.shapes], dim=1)), strict=True))
    exact = Dots.sum(parts.values())

    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    means = [statistics.mean(losses[:HALF]), statistics.mean(losses[HALF:])]
    print(f"{layout.n:,} parameters, {size.steps} steps of {size.batch} x {size.tokens} tokens")
    print("loss {:.2f} on the 64 of training, {:.2f} on the 64 others; ".format(*means), end="")
    cosines = exact.cosines()
    print(f"cosines {float(cosines.mean()):.3f} ± {float(cosines.std()):.3f}")
    compare_layers(module, parts, exact, size)
    compare_sketches(rows, exact, range(8, size.last + 1, 1 if chosen.every else 2), chosen.dense_log, chosen.seeds)
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
