"""The intrinsic dimension d90 of networks on real digits, by bisection and within one run."""

import pytest
import pytorch_lightning as pl
import torch
from nets import Classifier, digits, trainer, val_loader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_sketch.subspace import IntrinsicDimensionFinder, IntrinsicDimensionTuner, SubspaceModule

pytestmark = pytest.mark.slow

STEPS, DIMS = 600, [16, 32, 64, 128, 256, 512, 1024]


def train_loader():
    """Return a loader that takes 64 rows at once; one by one they make a step a third longer."""
    rows = TensorDataset(*digits(slice(0, 1437)))
    return DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), 64, drop_last=False), batch_size=None)


class MLP(Classifier):
    def network(self, width):
        return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


class Constant(Classifier):
    network = MLP.network


def test_d90_of_digits(tmp_path):
    """An earlier program found 128 for three seeds; 64 and 256 are within the factor of two allowed for every seed.

    The smallest of the dimensions are not enough; within one run the largest is 4096, and three times the rate of full
    training is the best of 1, 3 and 10.
    """
    pl.seed_everything(0, verbose=False)
    options = {"max_steps": STEPS, "default_root_dir": tmp_path, "check_val_every_n_epoch": 10}
    tuner = IntrinsicDimensionTuner(lambda dim: trainer(**options))
    train = train_loader()
    result = tuner.find(MLP(), train, val_loader(), monitor="val_acc", dims=DIMS, method="bisect")
    assert result.baseline > 0.96
    d90 = result.suggestion()
    assert d90 in (64, 128, 256)
    for seed in range(3):
        pl.seed_everything(seed, verbose=False)
        finder = IntrinsicDimensionFinder("val_acc", result.target, max_steps=2 * STEPS)
        sub = SubspaceModule(Constant(), 8, max_dim=4096, seed=seed, scale=3)
        run = trainer(finder, max_steps=2 * STEPS)
        run.fit(sub, train, val_loader())
        assert finder.suggestion() in (d90 // 2, d90, 2 * d90), (seed, finder.history)
        assert run.global_step <= 2 * STEPS


class CNN(MLP):
    """A network with batch norm, whose statistics follow the weights."""

    def network(self, width):
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )


def test_kinds_agree_on_a_network_with_batch_norm(tmp_path):
    """They agree within a factor of two, as all kinds do over three seeds in benchmarks/intrinsic_dimension.py."""
    pl.seed_everything(0, verbose=False)
    options = {"max_steps": 400, "default_root_dir": tmp_path, "check_val_every_n_epoch": 17}
    train, d90 = train_loader(), {}
    for kind in ("block_srht", "qk"):
        tuner = IntrinsicDimensionTuner(lambda dim: trainer(**options), sketch=kind)
        d90[kind] = tuner.find(
            CNN(), train, val_loader(), monitor="val_acc", dims=DIMS, method="bisect", baseline=0.97
        ).suggestion()
    assert all(DIMS[0] < dim < DIMS[-1] for dim in d90.values()), d90
    assert max(d90.values()) <= 2 * min(d90.values()), d90
