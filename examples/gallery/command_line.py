"""Stores on the command line: verify, top-k, report, export and info, and what they print (20 seconds)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter, IndexedDataset

OUT = Path("runs/command_line")


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step  # for trainer.validate, which makes the rows

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def run(command):
    """Run a command, and print it and what it says, as a shell would."""
    done = subprocess.run([sys.executable, "-m", *command.replace("-", "_", 1).split()], capture_output=True, text=True)
    print(f"$ {command}\n{done.stdout or done.stderr}")


seed_everything(0, verbose=False)
digits, labels = load_digits(return_X_y=True)
images = TensorDataset(torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels))
model, loader = Net(), DataLoader(IndexedDataset(images), batch_size=64, shuffle=True)
writer = GradientSketchWriter(OUT / "rows", dim=256, overwrite=True)
trainer = Trainer(max_epochs=5, accelerator="cpu", callbacks=[writer], logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
trainer.fit(model, loader)
trainer.validate(model, loader, verbose=False)

store = OUT / "rows"
run(f"lightning-sketch verify {store}")
run(f"lightning-sketch top-k {store} 0,7 --k 4 --stage validate")
np.save(OUT / "images.npy", digits.reshape(-1, 8, 8) / 16)
run(f"lightning-sketch report {store} {OUT / 'page.html'} 0,7 --train {OUT / 'images.npy'} --stage validate")
run(f"lightning-sketch export {store} parquet {OUT / 'rows.parquet'}")
run("lightning-sketch info")  # for a bug report
