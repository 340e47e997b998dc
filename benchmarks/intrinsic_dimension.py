"""Compare kinds of directions by the intrinsic dimension that they find and by the cost of a step along them.

scikit-learn's digits, 1437 to train on and 360 to validate: a perceptron of 4,810 parameters, and a convolutional
network with BatchNorm of 13,802. Adam for 35 epochs of batches of 64, at a rate that falls from 3e-3 in full training
and from ten times that in subspaces, three seeds.

accuracy    in subspaces of 64, 128 and 256, mean of the seeds
d90         of each seed: the smallest of these dims with 90 % of the accuracy of full training
in one run  what `method="doubling"` finds for each seed from 8 directions up, and its steps; full training takes 805.
            It doubles at a constant rate, until it gets there: an upper bound, which a run at half of it verifies

Then the table of `intrinsic_peers`: time and memory of a step, here and in other packages. Together about 20 minutes.

python benchmarks/intrinsic_dimension.py [--quick]        --quick: one seed, and no table of costs
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings

import torch
import torch.nn.functional as F
from intrinsic_peers import table
from pytorch_lightning import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import IntrinsicDimensionTuner

KINDS = ("block_srht", "affd", "afjl", "qk", "ffd", "gaussian")
SLOW = ("gaussian",)  # in one run it would make n · 1024 normals, twice a step
DIMS, SEARCHED = (64, 128, 256), (8, 1024)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Digits(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def perceptron():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional():
    def layer(channels, out):
        return nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)

    head = nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layer(1, 16), *layer(16, 32), *head)


def loaders():
    """Pixels from 0 to 16."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]
    train, val = TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=360)


def rows(result, seed):
    """Return (dim, value, steps) of the runs of one seed."""
    columns = zip(*(result.results[key] for key in ("dim", "value", "steps", "seed")), strict=True)
    return [row[:3] for row in columns if row[3] == seed]


def line(kind, net, data, seeds, folder):
    """Print a row of the table and return the d90 of the mean."""
    start = time.perf_counter()
    tuner = IntrinsicDimensionTuner({**QUIET, "max_epochs": 35, "default_root_dir": folder}, sketch=kind)
    ask = {"monitor": "accuracy", "seeds": seeds}
    grid = tuner.find(Digits(net), *data, dims=DIMS, **ask)
    runs = [rows(grid, seed) for seed in range(seeds)]
    d90 = [next((str(dim) for dim, value, _ in run if value >= grid.target), f">{DIMS[-1]}") for run in runs]
    text = f"{kind:<12}{grid.baseline:>6.3f} "
    text += "".join(f"{statistics.fmean(value for _, value, _ in run):>7.3f}" for run in zip(*runs, strict=True))
    text += f"   {' '.join(d90):<13}"
    if kind not in SLOW:
        search = tuner.find(Digits(net), *data, dims=SEARCHED, method="doubling", **ask)
        found = [rows(search, seed)[0] for seed in range(seeds)]  # then the run at half of it
        text += f"{' '.join(str(dim) for dim, _, _ in found):<13}{' '.join(str(steps) for *_, steps in found):<15}"
    else:
        text += " " * 28
    print(f"{text}{time.perf_counter() - start:>5.0f} s", flush=True)
    return grid.suggestion()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and no table of costs")
    quick = parser.parse_args().quick
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|The number of training batches")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for make in (perceptron, convolutional):
        seed_everything(0, verbose=False)
        net, data = make(), loaders()
        print(f"\n{make.__name__}: n = {sum(p.numel() for p in net.parameters()):,}")
        print(f"{'':<12}{'full':>6} " + "".join(f"{dim:>7}" for dim in DIMS) + f"   {'d90':<13}{'in one run':<13}steps")
        with tempfile.TemporaryDirectory() as folder:
            found = {kind: line(kind, net, data, 1 if quick else 3, folder) for kind in KINDS}
        spread = "not all reached" if None in found.values() else f"{max(found.values()) / min(found.values()):g}"
        print(f"d90 of the means: {found}; largest / smallest: {spread}")
    if not quick:
        table(threads=2)


if __name__ == "__main__":
    main()
