"""Small modules, loaders of real digits, and a Trainer that writes nothing."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


def digits(rows=slice(None)):
    """Return images with pixels from 0 to 16, and labels, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[rows]
    return torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]


def train_loader(rows=slice(0, 256), batch_size=32, shuffle=False):
    return DataLoader(TensorDataset(*digits(rows)), batch_size=batch_size, shuffle=shuffle)


def val_loader(rows=slice(1437, None)):
    return DataLoader(TensorDataset(*digits(rows)), batch_size=180)


class Classifier(pl.LightningModule):
    """A classifier trained by Adam, which logs `train_loss`, `val_acc` and `val_loss`."""

    def __init__(self, width: int = 16, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = self.network(width)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.calls: list[str] = []

    def network(self, width):
        return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)
        self.log_dict({"val_loss": F.cross_entropy(self(batch[0]), batch[1])})

    def on_train_epoch_end(self):
        self.calls.append("on_train_epoch_end")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Convolutional(Classifier):
    """A network with batch norm and dropout."""

    def network(self, width):
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, width, 3, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(9 * width, 10),
        )


class Tied(Classifier):
    """A network that uses one matrix twice."""

    def network(self, width):
        reads, writes = nn.Linear(64, width), nn.Linear(width, 64, bias=False)
        writes.weight = nn.Parameter(torch.randn(64, width) / 8)
        back = nn.Linear(width, 64, bias=False)
        back.weight = writes.weight
        return nn.Sequential(reads, nn.Tanh(), writes, nn.Tanh(), nn.Linear(64, width), nn.Tanh(), back)


class Late(Classifier):
    """A module that makes its layers in `configure_model`."""

    def network(self, width):
        return None

    def configure_model(self):
        if self.net is None:
            self.net = Classifier.network(self, 16)


def trainer(*callbacks, **options):
    return pl.Trainer(
        **{
            "max_steps": 8,
            "max_epochs": -1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=list(callbacks),
    )
