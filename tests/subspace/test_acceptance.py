"""On real digits: d90 of a network of 55 thousand parameters, by the grid and within one run."""

import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer, val_loader
from torch import nn

from lightning_sketch.subspace import IntrinsicDimensionFinder, IntrinsicDimensionTuner, SubspaceModule

STEPS = 800


class MLP(Classifier):
    def network(self, width):
        return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


class Constant(Classifier):
    network = MLP.network


def test_d90_of_digits(tmp_path):
    """128 for three seeds of an earlier program; 64 and 256 are within the factor of two asked of every seed."""
    pl.seed_everything(0, verbose=False)
    options = {"max_steps": STEPS, "default_root_dir": tmp_path, "check_val_every_n_epoch": 10}
    tuner = IntrinsicDimensionTuner(lambda dim: trainer(**options))
    train = train_loader(slice(0, 1437), 64, shuffle=True)
    result = tuner.find(MLP(), train, val_loader(), monitor="val_acc", dims=[64, 128, 256], method="bisect")
    assert result.baseline > 0.96
    d90 = result.suggestion()
    assert d90 in (64, 128, 256)
    for seed in range(3):
        pl.seed_everything(seed, verbose=False)
        finder = IntrinsicDimensionFinder("val_acc", result.target, max_steps=2 * STEPS)
        sub = SubspaceModule(Constant(), 8, max_dim=4096, seed=seed, lr_scale=10)
        run = trainer(finder, max_steps=2 * STEPS)
        run.fit(sub, train, val_loader())
        assert finder.suggestion() in (d90 // 2, d90, 2 * d90), (seed, finder.history)
        assert run.global_step <= 2 * STEPS
