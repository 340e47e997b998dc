"""Measure how a sketch's scores approach those of whole gradients as `dim` grows, for an image and a language model.

A convolutional network on scikit-learn's digits and a byte-level GPT on the standard library's sources
(`paper/language_model.py`) are trained; gradients of 400 training examples and 40 others are kept whole, and sketched
by BlockSRHT. Three seeds of the sketch.

r            correlation over the training examples of sketched and whole dot products, mean over queries
said         what `top_k(...).reliability` says r is, from the two halves of the sketch, without whole gradients
best 10      of the 10 largest whole products of a query, the share among the 10 largest sketched ones

    python benchmarks/choosing_dim.py [picture.png]          # needs transformers and lightning-sketch[plots]; minutes
"""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parent / "paper"))
from language_model import SMALL, pieces, trained
from sketch_speed import machine, print_table

from lightning_sketch import BlockSRHT
from lightning_sketch.attribution import SketchedGradients, top_k

TRAIN, QUERIES, SEEDS, DIMS = 400, 40, 3, [2**power for power in range(6, 15, 2)]


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def whole(module: nn.Module, batches: list, loss) -> Tensor:
    """Return the gradients of examples, (examples, n)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss(b), parameters)]) for b in batches])


def of_images() -> tuple[Tensor, Tensor]:
    seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    module = Net()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=5, **quiet).fit(module, DataLoader(TensorDataset(x[:1400], y[:1400]), 32, shuffle=True))
    one = [(x[i : i + 1], y[i : i + 1]) for i in [*range(TRAIN), *range(1400, 1400 + QUERIES)]]
    found = whole(module, one, module.training_step)
    return found[:TRAIN], found[TRAIN:]


def of_language() -> tuple[Tensor, Tensor]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    train, others = [path for i, path in enumerate(files) if i % 8], files[::8]
    module = trained(SMALL, pieces(train, SMALL.tokens, SMALL.steps * SMALL.batch), "cpu")
    one = [*pieces(train, SMALL.tokens, TRAIN).split(1), *pieces(others, SMALL.tokens, QUERIES).split(1)]
    found = whole(module, one, lambda batch: module.training_step([batch]))
    return found[:TRAIN], found[TRAIN:]


def measure(name: str, train: Tensor, queries: Tensor) -> list[list[str]]:
    exact, lines = queries @ train.T, []
    for dim in (dim for dim in DIMS if dim <= train.shape[1]):
        seen = []
        for seed in range(SEEDS):
            sketch = BlockSRHT(train.shape[1], dim, seed=seed)
            rows, asked = (SketchedGradients(sketch.matvec(g), sketch) for g in (train, queries))
            scores = asked.sketches @ rows.sketches.T
            r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(scores, exact, strict=True)])
            said = top_k(asked, rows, 10, group=None).reliability
            best, true = (set_of(values) for values in (scores, exact))
            hits = torch.tensor([len(a & b) / 10 for a, b in zip(best, true, strict=True)])
            seen.append([float(r.mean()), float(said.mean()), float(hits.mean())])
        mean = torch.tensor(seen).mean(0).tolist()
        lines.append([name, f"{train.shape[1]:,}", f"{dim:,}", *(f"{value:.4f}" for value in mean)])
        print(*lines[-1], file=sys.stderr, flush=True)
    return lines


def set_of(scores: Tensor) -> list[set[int]]:
    return [set(row.tolist()) for row in scores.topk(10).indices]


def draw(lines: list[list[str]], path: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, color in (("images", "C0"), ("language", "C1")):
        own = [line for line in lines if line[0] == name]
        dims = [int(line[2].replace(",", "")) for line in own]
        axes.plot(dims, [1 - float(line[3]) for line in own], f"{color}o-", label=f"{name}: measured")
        axes.plot(dims, [1 - float(line[4]) for line in own], f"{color}x:", label=f"{name}: said by reliability")
    axes.set(xlabel="dim", ylabel="1 - correlation with whole gradients", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    torch.set_num_threads(1)
    lines = measure("images", *of_images()) + measure("language", *of_language())
    print(f"{machine()}\n")
    print_table(["gradients", "parameters", "dim", "r", "said", "best 10"], lines)
    if len(sys.argv) > 1:
        draw(lines, sys.argv[1])


if __name__ == "__main__":
    main()
