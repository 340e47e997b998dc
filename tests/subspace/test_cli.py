"""A module inside a module in YAML, through the LightningCLI of either namespace, in a process of its own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")

PROGRAM = """
import torch
torch.set_num_threads(1)
from {namespace} import LightningDataModule, LightningModule
from {namespace}.cli import LightningCLI
from nets import train_loader, val_loader


class Small(LightningModule):
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
CONFIG = """
model:
  class_path: lightning_sketch.SubspaceModule
  init_args:
    dim: 64
    lr_scale: 10
    module:
      class_path: __main__.Small
      init_args:
        lr: 0.004
"""


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_fit_from_yaml(tmp_path, namespace):
    pytest.importorskip(namespace)
    (tmp_path / "program.py").write_text(PROGRAM.format(namespace=namespace))
    (tmp_path / "config.yaml").write_text(CONFIG)
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", f"--trainer.logger.save_dir={tmp_path}"]
    options.insert(0, f"--trainer.logger={namespace}.loggers.CSVLogger")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "program.py", "fit", "--config=config.yaml", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        values = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    assert len(values) == 2
    assert values[1] < values[0]
