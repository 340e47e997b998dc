"""Watch the curvature of a small network's loss while it trains on handwritten digits (a minute on two cores).

Prints a table and writes runs/quickstart/spectrum.png; the same numbers are in CSV and in an offline W&B run.
"""

import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_sketch import GradientSketchWriter, GradientStore, SpectrumMonitor

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
EPOCHS = 10


class SmallConvNet(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch):
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def digits():
    """1797 images of 8 x 8 pixels, from scikit-learn: 1437 to train on, 360 to validate."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    dataset = TensorDataset((images - images.mean()) / images.std(), torch.tensor(labels))
    train, val = random_split(dataset, [1437, 360], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=360)


def print_table(monitor, csv_logger):
    """Print a line per measurement; ± bounds the distance to an eigenvalue, * marks one that has not converged."""
    with open(f"{csv_logger.log_dir}/metrics.csv") as file:
        accuracy = {int(row["epoch"]): float(row["val_acc"]) for row in csv.DictReader(file) if row["val_acc"]}
    print(
        f"{'epoch':>5} {'loss':>7} {'val acc':>7}   {'three largest eigenvalues':<45} "
        f"{'smallest':>9} {'RNEG':>6} {'outliers':>8}"
    )
    for m in monitor.history:
        known = m.converged.tolist()
        top = "  ".join(
            f"{v:7.3f} ± {e:.0e}{' ' if ok else '*'}" for v, e, ok in zip(m.top(3), m.residuals, known, strict=False)
        )
        epoch, acc = ("start", "") if m.step == 0 else (m.epoch + 1, f"{accuracy[m.epoch]:.1%}")
        low = f"{m.lambda_min:.3f}{' ' if known[-1] else '*'}"
        print(f"{epoch:>5} {m.loss:7.4f} {acc:>7}   {top:<45} {low:>9} {m.rneg:6.3f} {m.num_outliers()!s:>8}")


def main():
    seed_everything(0, verbose=False)
    OUT.mkdir(parents=True, exist_ok=True)
    monitor = SpectrumMonitor(at_start=True)
    writer = GradientSketchWriter(dim=512)  # a sketched gradient per step, for questions asked later
    wandb_logger = WandbLogger(project="lightning-sketch", name="quickstart", save_dir=OUT, offline=True)
    csv_logger = CSVLogger(OUT, name="csv")
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=[csv_logger, wandb_logger],
        callbacks=[monitor, writer],
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    train, val = digits()
    trainer.fit(SmallConvNet(), train, val)
    wandb_logger.experiment.finish()

    print_table(monitor, csv_logger)
    monitor.plot().savefig(OUT / "spectrum.png", dpi=150)
    print(f"\npicture: {OUT / 'spectrum.png'}")
    print(f"numbers: {csv_logger.log_dir}/metrics.csv")
    print(f"steps:   {len(GradientStore.open(writer.dirpath))} sketched gradients in {writer.dirpath}")
    print(f"W&B:     wandb sync {OUT}/wandb/offline-run-*    (no account: wandb leet {OUT}/wandb/offline-run-*)")


if __name__ == "__main__":
    main()
