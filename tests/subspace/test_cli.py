"""LightningCLI: a module inside a SubspaceModule has its own hyper-parameters, and a checkpoint of both resumes."""

import importlib
import json
import subprocess
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


def test_a_checkpoint_says_that_it_needs_the_module(tmp_path):
    with pytest.raises(TypeError, match=r"pass module=Model\(\.\.\.\)"):
        SubspaceModule.load_from_checkpoint(tmp_path / "a.ckpt")


PROGRAM = """
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0][:, : self.hparams.width]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 4, generator=draw), torch.randint(3, (64,), generator=draw)
        return DataLoader(TensorDataset(x, y), batch_size=16)


if __name__ == "__main__":
    LightningCLI()
"""


@pytest.mark.slow
def test_a_run_from_a_configuration_resumes_from_its_checkpoint(tmp_path):
    """Two epochs and two more give the weights of four; and the checkpoint loads without LightningCLI."""
    (tmp_path / "program.py").write_text(PROGRAM)
    inner = {"class_path": "program.Net", "init_args": {"width": 4}}
    model = {"class_path": "lightning_sketch.SubspaceModule", "init_args": {"dim": 6, "module": inner}}
    config = {"seed_everything": 1, "model": model, "data": {"class_path": "program.Data"}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))

    def fit(folder, epochs, *more):
        command = [sys.executable, "program.py", "fit", "--config", "run.yaml", "--trainer.accelerator", "cpu"]
        command += ["--trainer.max_epochs", epochs, "--trainer.default_root_dir", folder, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (path,) = (tmp_path / folder).rglob("*.ckpt")
        return path

    half = fit("half", "2")
    resumed, whole = fit("resumed", "4", "--ckpt_path", str(half)), fit("whole", "4")
    found, expected = (torch.load(path, weights_only=True)["state_dict"] for path in (resumed, whole))
    assert torch.equal(found["w"], expected["w"])
    before = torch.load(half, weights_only=True)["state_dict"]["w"]
    assert not torch.equal(found["w"], before)
    load = f"""
from pytorch_lightning import seed_everything
from program import Net
from lightning_sketch import SubspaceModule
seed_everything(1)
print(SubspaceModule.load_from_checkpoint({str(half)!r}, module=Net(4)).w.tolist())
"""
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout) == before.tolist(), done.stderr[-3000:]
