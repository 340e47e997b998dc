"""Modules whose validation metric is scripted, and small fits and searches that several files share."""

import json

import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer, val_loader

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.subspace import IntrinsicDimensionFinder, IntrinsicDimensionTuner, SubspaceModule
from lightning_sketch.subspace._ledger import FOLDER


def made(kind=Classifier, seed=0, **options):
    pl.seed_everything(seed, verbose=False)
    return kind(**options)


def nested(kind=Classifier):
    return SubspaceModule(made(kind), 8, max_dim=50, lr_scale=10)


class Scripted(Classifier):
    """A module whose validation logs the values of a list, one after the other, and then repeats the last one."""

    values = (0.1,)

    def __init__(self):
        super().__init__()
        self.left = list(self.values)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.seen.append(torch.cat([p.detach().flatten() for p in self.net.parameters()]))
            self.log("value", self.left.pop(0) if len(self.left) > 1 else self.left[0])


def searched(values, *callbacks, sub=None, steps=16, target=0.9, mode="max", delta=0.05, max_steps=None, **options):
    """Search by a finder that validates every four steps; return the finder, the module and the Trainer."""
    sub = nested(type("Model", (Scripted,), {"values": tuple(values)})) if sub is None else sub
    finder = IntrinsicDimensionFinder(
        "value", target, mode=mode, delta=delta, every_n_train_steps=4, max_steps=max_steps
    )
    run = trainer(finder, *callbacks, max_steps=steps, **options)
    run.fit(sub, train_loader(), val_loader())
    return finder, sub, run


class ByDimension(Classifier):
    """A module whose validation logs 0.1 before training, and later the value of the dimension and seed, or 1."""

    values: dict[int, float | tuple[float, ...]] = {}  # noqa: RUF012

    def validation_step(self, batch, batch_idx):
        whole = self.trainer.lightning_module
        dim = whole.directions.sketch.dim if isinstance(whole, SubspaceModule) else Layout.of(self).n
        value = self.values.get(dim, 1.0)
        value = value[torch.initial_seed()] if isinstance(value, tuple) else value
        self.log("val_acc", value if self.trainer.global_step else 0.1)


def by_dimension(**values):
    """Make a module whose metric is given for each dimension, as in dim8=0.2."""
    values = {int(name.removeprefix("dim")): value for name, value in values.items()}
    return made(type("Model", (ByDimension,), {"values": values}))


def search(model, folder, steps=4, callbacks=lambda: (), trainers=None, tuner=None, **options):
    """Search with a few steps a run, at one rate; options of Trainers, of the tuner, and of `find`."""

    def trainer_fn(dim):
        every = {"val_check_interval": steps, "check_val_every_n_epoch": None}
        return trainer(*callbacks(), **{"max_steps": steps, "default_root_dir": folder, **every, **(trainers or {})})

    searcher = IntrinsicDimensionTuner(trainer_fn, **{"rates": 10, **(tuner or {})})
    given = {"dims": [4, 8], "monitor": "val_acc", **options}
    if "datamodule" not in given:
        given = {"train_dataloaders": train_loader(), "val_dataloaders": val_loader(), **given}
    return searcher.find(model, **given)


def recorded(folder):
    """Return what a search has recorded of its runs, in the order in which they ended, and kind and dim asked for."""
    files = sorted((folder / FOLDER).glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    return [{"run": json.loads(path.read_text()), "asked": path.parent.name.split("-")[:2]} for path in files]


LADDER = [4, 32, 128, 512]


def tuner(folder, steps=104, **options):
    """Make a tuner of runs that are long enough to learn at one rate, and the list of dims it makes Trainers for.

    Validation is at the end of each epoch of eight steps, or of shorter runs.
    """

    def trainer_fn(dim):
        made_for.append(dim)
        every = {"val_check_interval": min(steps, 8), "check_val_every_n_epoch": None}
        return trainer(max_steps=steps, default_root_dir=folder, **every)

    made_for: list[int] = []
    return IntrinsicDimensionTuner(trainer_fn, **{"rates": 10, **options}), made_for


def find(searcher, model, **options):
    """Search among the dims of the ladder, on shuffled digits, for 70 % of full training."""
    options = {"dims": LADDER, "monitor": "val_acc", "threshold": 0.7, **options}
    return searcher.find(model, train_loader(shuffle=True), val_loader(), **options)
