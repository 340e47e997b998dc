"""LightningCLI: a module inside a SubspaceModule has its own hyper-parameters, and a checkpoint of both loads."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from nets import train_loader
from torch import nn

from lightning_sketch import SubspaceModule

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def wide(namespace):
    """Make a class whose hyper-parameters have names that SubspaceModule has too, and names that it has not."""
    base = importlib.import_module(namespace).LightningModule

    class Wide(base):
        def __init__(self, dim: int = 32, lr: float = 0.01):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(64, self.hparams.dim), nn.Tanh(), nn.Linear(self.hparams.dim, 10))

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def train_dataloader(self):
            return train_loader()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

    return Wide


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_module_inside_saves_its_own_arguments(namespace, tmp_path, monkeypatch):
    """Its width is its own `dim`, not the dimension of the subspace; so in the checkpoint that is loaded again."""
    cli = importlib.import_module(f"{namespace}.cli")
    monkeypatch.setattr(sys, "argv", ["fit"])
    home = importlib.import_module(__name__)
    monkeypatch.setattr(home, "Wide", wide(namespace), raising=False)
    home.Wide.__module__, home.Wide.__qualname__ = __name__, "Wide"
    inner = {"class_path": f"{__name__}.Wide", "init_args": {"dim": 12, "lr": 0.02}}
    model = {"class_path": "lightning_sketch.SubspaceModule", "init_args": {"dim": 5, "module": inner}}
    trainer = {"max_steps": 2, "accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    made = cli.LightningCLI(
        importlib.import_module(namespace).LightningModule,
        subclass_mode_model=True,
        save_config_callback=None,
        args={"model": model, "trainer": {**trainer, **quiet}},
        seed_everything_default=3,
        run=False,
    )
    made.trainer.fit(made.model)
    assert dict(made.model.module.hparams)["dim"] == 12
    assert made.model.module.net[0].out_features == 12
    assert made.model.w.shape == (5,)
    assert made.model.hparams["dim"] == 5
    made.trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = home.Wide(12)
    plain.load_state_dict({name: tensor for name, tensor in made.model.theta0().items()})
    loaded = SubspaceModule.load_from_checkpoint(tmp_path / "a.ckpt", module=plain, dim=5)
    assert torch.equal(loaded.w, made.model.w)


def test_a_checkpoint_says_that_it_needs_the_module(tmp_path):
    with pytest.raises(TypeError, match=r"pass module=Model\(\.\.\.\)"):
        SubspaceModule.load_from_checkpoint(tmp_path / "a.ckpt")
