"""The sweeps that examples/sweeps.md shows, on digits; YAML through the LightningCLI of either namespace."""

import csv
import os
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from forks import run
from nets import Classifier, train_loader, val_loader
from pytorch_lightning.cli import LightningCLI

pytestmark = pytest.mark.slow

SHOWN = (Path(__file__).parents[2] / "examples" / "sweeps.md").read_text()


def block(name):
    """Return the code under a heading."""
    return re.search(rf"## {name}\n\n```\w+\n(.*?)```", SHOWN, re.DOTALL)[1]


PROGRAM = """
import torch
torch.set_num_threads(1)
from {namespace} import LightningDataModule, LightningModule
from {namespace}.cli import LightningCLI
from nets import train_loader, val_loader


class Model(LightningModule):
    def __init__(self, lr: float = 0.003):
        super().__init__()
        self.lr = lr
        self.layer = torch.nn.Linear(64, 10)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Data(LightningDataModule):
    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return val_loader()


if __name__ == "__main__":
    LightningCLI(LightningModule, Data, subclass_mode_model=True, save_config_kwargs={{"overwrite": True}})
"""


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_fit_from_yaml(tmp_path, namespace):
    pytest.importorskip("jsonargparse")
    pytest.importorskip(namespace)
    (tmp_path / "program.py").write_text(PROGRAM.format(namespace=namespace))
    (tmp_path / "config.yaml").write_text(block("LightningCLI"))
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", f"--trainer.logger.save_dir={tmp_path}"]
    options.insert(0, f"--trainer.logger={namespace}.loggers.CSVLogger")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    ran = run("program.py", "fit", "--config=config.yaml", *options, cwd=tmp_path, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        values = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    assert len(values) == 2
    assert values[1] < values[0]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return val_loader()


@pytest.mark.filterwarnings("ignore:`SubspaceModule.configure_optimizers` will be overridden")
def test_an_optimizer_of_the_command_line_is_put_to_work_on_w(tmp_path, monkeypatch):
    """It is used as the module's own would be: after a step of AdamW |w| is its rate, without decay."""
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py"])
    (tmp_path / "config.yaml").write_text(block("LightningCLI").replace("program.Model", "nets.Classifier"))
    own = {"logger": "false", "accelerator": "cpu", "max_steps": "1", "enable_progress_bar": "false"}
    optimizer = ["--optimizer=AdamW", "--optimizer.lr=0.002", "--optimizer.weight_decay=0.5"]
    cli = LightningCLI(
        pl.LightningModule,
        Data,
        subclass_mode_model=True,
        save_config_callback=None,
        seed_everything_default=3,
        args=["fit", "--config=config.yaml", *optimizer, *(f"--trainer.{name}={value}" for name, value in own.items())],
    )
    assert torch.allclose(cli.model.w.detach().abs(), torch.full((64,), 0.002), rtol=1e-3)
    assert cli.model.directions.scale == 3
    (group,) = cli.trainer.optimizers[0].param_groups
    assert (group["weight_decay"], len(group["params"])) == (0.0, 1)


def shown(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block(name).replace("max_epochs=10", "max_epochs=2, accelerator='cpu'").replace("n_trials=30", "n_trials=4")
    own = {"model": Classifier, "data": Data}
    exec(code, own)
    return own


def test_optuna(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.disable_default_handler()
    study = shown("Optuna", tmp_path, monkeypatch)["study"]
    assert len(study.trials) == 4
    assert all(0 < trial.values[0] <= 1 and trial.values[1] == trial.params["dim"] for trial in study.trials)


def test_wandb(tmp_path, monkeypatch):
    """One run of the sweep, offline; the agent needs a server."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = shown("Weights & Biases", tmp_path, monkeypatch)
    start, leave, seen = wandb.init, wandb.Run.__exit__, []

    def left(run, *error):
        seen.append((run.config["dim"], run.summary["val_acc"]))
        return leave(run, *error)

    monkeypatch.setattr(wandb, "init", lambda: start(config={"dim": 16, "scale": 3}, dir=tmp_path))
    monkeypatch.setattr(wandb.Run, "__exit__", left)
    own["train"]()
    ((dim, accuracy),) = seen
    assert dim == 16
    assert 0 < accuracy <= 1
