"""A YAML file that contains the monitor works with the LightningCLI of either namespace, in a process of its own."""

import csv
from pathlib import Path

import pytest
from forks import run

pytest.importorskip("jsonargparse")

CONFIG = Path(__file__).parents[2] / "examples" / "monitor.yaml"
PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from {namespace} import LightningDataModule, LightningModule
from {namespace}.cli import LightningCLI
from models import loader


class Small(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, images):
        return self.layer(images.flatten(1))

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()


LightningCLI(Small, Data, save_config_kwargs={{"overwrite": True}}, args=sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_fit_from_yaml(tmp_path, namespace):
    pytest.importorskip(namespace)
    (tmp_path / "program.py").write_text(PROGRAM.format(namespace=namespace))
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}"]
    options += [f"--trainer.logger={namespace}.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    env = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ran = run(tmp_path / "program.py", "fit", f"--config={CONFIG}", *options, cwd=tmp_path, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (metrics,) = tmp_path.glob("lightning_logs/version_*/metrics.csv")
    with open(metrics) as file:
        rows = [row for row in csv.DictReader(file) if row["hessian/lambda_max"]]
    assert len(rows) == 2
    assert "ggn/lambda_max" in rows[0]
