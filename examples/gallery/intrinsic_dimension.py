"""How few numbers learn to read digits, and how often they can be wrong on new ones at most (40 seconds)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import IntrinsicDimensionTuner

OUT = Path("runs/intrinsic_dimension")
images, labels = torch.tensor(load_digits().data / 16, dtype=torch.float32), torch.tensor(load_digits().target)
train = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=360)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% Train in full, then in random subspaces of 8, 16, ... dimensions, until 90 % of the accuracy is reached.
seed_everything(0, verbose=False)
tuner = IntrinsicDimensionTuner({"max_epochs": 10, "accelerator": "cpu", "logger": False,
                                 "default_root_dir": OUT})  # fmt: skip
result = tuner.find(Net(), train, val, monitor="val_acc")
print(result)

# %% The smaller the dim, the shorter the network's description, and the surer that it did not learn by heart.
print(result.bound(train))

# %%
figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
result.plot(ax=axes)
OUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUT / "intrinsic_dimension.png", dpi=150)
print(f"picture: {OUT / 'intrinsic_dimension.png'}")
