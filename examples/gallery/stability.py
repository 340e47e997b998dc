"""A learning rate above the edge of stability, seen before the loss is: SGD at two rates, on digits (10 seconds)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import SpectrumMonitor

OUT = Path("runs/stability")
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


class Net(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 10).float(), reduction="sum") / len(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


# %% One run below the edge, one above it. Each step is on all images, and each is measured: loss and eigenvalues.
runs = {}
for lr in (0.1, 0.3):
    seed_everything(0, verbose=False)
    monitor = SpectrumMonitor(num_batches=1, every_n_train_steps=1, at_start=True, top_k=1, bottom_k=0)
    trainer = Trainer(max_steps=5, accelerator="cpu", callbacks=[monitor], logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Net(lr), DataLoader(TensorDataset(images, labels), batch_size=len(images)))
    runs[lr] = monitor.history
    first, last = monitor.history[0], monitor.history[-1]
    print(f"lr {lr}, before the first step: {first.verdict}")
    print(f"lr {lr}, after {last.step} steps: the loss is {last.loss:.3g}, from {first.loss:.3g}")

# %% Above 1, steps along the sharpest direction grow: the ratio says so at the first step, when no loss has risen yet.
figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True, layout="constrained")
for lr, history in runs.items():
    steps = [measured.step for measured in history]
    top.plot(steps, [measured.loss for measured in history], "o-", ms=4, label=f"SGD, lr {lr}")
    bottom.plot(steps, [measured.lambda_max / measured.stable_below for measured in history], "o-", ms=4)
bottom.axhline(1, color="gray", ls="--")
top.set(ylabel="loss", yscale="log")
bottom.set(ylabel="largest eigenvalue\nover the edge, 2 / lr", xlabel="step", yscale="log")
top.legend(frameon=False)
OUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUT / "stability.png", dpi=150)
print(f"picture: {OUT / 'stability.png'}")
