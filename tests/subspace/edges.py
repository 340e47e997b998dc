"""Modules whose metric is told, and searches with them, for the edges of each part."""

import json

import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer, val_loader

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.subspace import IntrinsicDimensionFinder, IntrinsicDimensionTuner, SubspaceModule
from lightning_sketch.subspace._runner import FILE


def made(kind=Classifier, seed=0, **options):
    pl.seed_everything(seed, verbose=False)
    return kind(**options)


def nested(kind=Classifier, max_dim=64):
    return SubspaceModule(made(kind), 8, max_dim=max_dim, lr_scale=10)


class Given(Classifier):
    """Validation gives values of a list, one after the other, and the last one from there on."""

    values = (0.1,)

    def __init__(self):
        super().__init__()
        self.left = list(self.values)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.log("value", self.left.pop(0) if len(self.left) > 1 else self.left[0])


def searched(values, *callbacks, target=0.9, delta=0.05, steps=16, sub=None, **options):
    kind = type("Model", (Given,), {"values": tuple(values)})
    sub = nested(kind) if sub is None else sub
    finder = IntrinsicDimensionFinder("value", target, delta=delta, every_n_train_steps=4)
    run = trainer(finder, *callbacks, max_steps=steps, **options)
    run.fit(sub, train_loader(), val_loader())
    return finder, sub, run


class Judged(Classifier):
    """A metric of 0.1 before training; after that what is told of a dimension and a seed, or 1."""

    told: dict[int, float | tuple[float, ...]] = {}  # noqa: RUF012

    def validation_step(self, batch, batch_idx):
        whole = self.trainer.lightning_module
        dim = whole.directions.sketch.dim if isinstance(whole, SubspaceModule) else Layout.of(self).n
        value = self.told.get(dim, 1.0)
        value = value[torch.initial_seed()] if isinstance(value, tuple) else value
        self.log("val_acc", value if self.trainer.global_step else 0.1)


def find(model, folder, steps=4, callbacks=lambda: (), trainers=None, tuner=None, **options):
    def trainer_fn(dim):
        return trainer(*callbacks(), **{"max_steps": steps, "default_root_dir": folder, **(trainers or {})})

    searcher = IntrinsicDimensionTuner(trainer_fn, **(tuner or {}))
    given = {"dims": [4, 8], "monitor": "val_acc", **options}
    if "datamodule" not in given:
        given = {"train_dataloaders": train_loader(), "val_dataloaders": val_loader(), **given}
    return searcher.find(model, **given)


def judged(**told):
    return made(type("Model", (Judged,), {"told": {int(key[3:]): value for key, value in told.items()}}))


def noted(folder):
    return json.loads((folder / FILE).read_text())


def descending(**options):
    """SGD, which unlike Adam sees how long a gradient is."""

    class Model(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return SubspaceModule(made(Model), 16, **options)
