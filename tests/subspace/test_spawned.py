"""Processes that the Trainer spawns for one fit, to which the module is sent, and from which it returns, pickled."""

import copy
import importlib
import pickle

import pytest
import pytorch_lightning as pl
import torch
from nets import train_loader, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from searches import InOrder

from lightning_sketch.subspace import IntrinsicDimensionFinder, IntrinsicDimensionTuner, SubspaceModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
]


def made(namespace):
    """Make a module in a subspace, and a function that makes a Trainer of its namespace."""
    lightning = pytest.importorskip(namespace)
    kind = InOrder if lightning is pl else importlib.import_module("other_namespace").InOrder
    pl.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)

    def trainer_of(**options):
        return lightning.Trainer(accelerator="cpu", max_steps=10, max_epochs=-1, **quiet, **options)

    return SubspaceModule(kind(), 64, lr_scale=10), trainer_of


def theta(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_two_spawned_processes_train_what_one_does(namespace):
    """w, its weights and the logged metrics return; the tolerance is for sums in other orders over ten steps."""
    sub, trainer_of = made(namespace)
    alone = copy.deepcopy(sub)
    trainer_of().fit(alone, val_dataloaders=val_loader())
    run = trainer_of(devices=2, strategy="ddp_spawn")
    run.fit(sub, val_dataloaders=val_loader())
    assert {"train_loss", "val_loss"} <= run.callback_metrics.keys()
    assert (sub.w - alone.w).norm() <= 2e-3 * alone.w.norm()
    assert torch.equal(theta(sub.module), theta(sub.materialize()))
    start = torch.cat([tensor.flatten() for tensor in sub.theta0().values()])
    assert torch.allclose(theta(sub.module), start + sub.directions.rmatvec(sub.w.detach()), atol=1e-6)
    assert sub.w.norm() > 0.01


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_a_pickled_module_trains_as_the_one_that_it_was(namespace):
    sub, trainer_of = made(namespace)
    twin = pickle.loads(pickle.dumps(sub))
    for module in (sub, twin):
        run = trainer_of()
        run.fit(module, train_loader(), val_loader())
        assert "val_loss" in run.callback_metrics
    assert torch.equal(sub.w, twin.w)
    assert torch.equal(theta(sub.module), theta(twin.module))
    assert sub.w.norm() > 0.01


LOST = r"would be lost.*use strategy='ddp'"


def test_a_finder_that_would_be_lost_is_refused_in_the_process_that_is_made():
    sub = SubspaceModule(InOrder(), 8, max_dim=64, lr_scale=10)
    run = trainer(IntrinsicDimensionFinder("val_acc", 0.9), devices=2, strategy="ddp_spawn")
    with pytest.raises(Exception, match=LOST):
        run.fit(sub, val_dataloaders=val_loader())


def test_a_tuner_trains_in_spawned_processes(tmp_path):
    """Values, steps and checkpoints come back, and the runs are found again."""

    def trainer_fn(dim):
        places = {"devices": 2, "strategy": "ddp_spawn", "default_root_dir": tmp_path}
        return trainer(max_steps=8, enable_checkpointing=True, **places)

    def find():
        pl.seed_everything(0, verbose=False)
        tuner = IntrinsicDimensionTuner(trainer_fn, rates=10)
        return tuner.find(InOrder(), None, val_loader(), monitor="val_loss", mode="min", dims=[64])

    first, again = find(), find()
    assert first.results == again.results
    assert first.results["steps"] == [8]
    assert 0 < first.baseline < first.results["value"][0] < first.start
    assert first.results["checkpoint"][0].endswith("step=8.ckpt")


def test_a_tuner_whose_finder_would_be_lost_refuses_before_training(tmp_path):
    tuner = IntrinsicDimensionTuner(lambda dim: trainer(devices=2, strategy="ddp_spawn", default_root_dir=tmp_path))
    with pytest.raises(MisconfigurationException, match=LOST):
        tuner.find(InOrder(), None, val_loader(), monitor="val_acc", method="doubling")
    assert not list(tmp_path.iterdir())
