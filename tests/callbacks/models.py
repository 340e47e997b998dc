"""Models, data and Trainers for the tests of the callbacks, on handwritten digits."""

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Digits(LightningModule):
    """A network with everything that a measurement could change: dropout, batch norm, a metric, lists, logs."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10)
        self.losses = []
        self.calls = {"steps": 0}

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.losses.append(loss.item())
        self.calls["steps"] += 1
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def dataset(count: int = 256) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images[:count] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:count])
    )


def loader(workers: int = 0, shuffle: bool = True, batch_size: int = 32) -> DataLoader:
    return DataLoader(dataset(), batch_size=batch_size, shuffle=shuffle, num_workers=workers)


class DigitsData(LightningDataModule):
    def train_dataloader(self):
        return loader()


def trainer(tmp_path, *callbacks, logger=False, **arguments) -> Trainer:
    arguments = {"max_epochs": 2, "enable_checkpointing": False, **arguments}
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def fit(tmp_path, *callbacks, model=None, data=None, logger=False, ckpt_path=None, **arguments) -> LightningModule:
    """Seed, train a module, or one made from a class after seeding, and return it with its `trainer`."""
    seed_everything(3, verbose=False)
    model = (model or Digits)() if model is None or isinstance(model, type) else model
    run = trainer(tmp_path, *callbacks, logger=logger, **arguments)
    if isinstance(data, LightningDataModule):
        run.fit(model, datamodule=data)
    else:
        run.fit(model, loader() if data is None else data, ckpt_path=ckpt_path)
    return model
