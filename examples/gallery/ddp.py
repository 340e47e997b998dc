"""Two processes train together: one spectrum, the same on both, and each image has its row once (20 seconds)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset, SpectrumMonitor

OUT = Path("runs/ddp")


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main():
    seed_everything(0, verbose=False)
    digits, labels = load_digits(return_X_y=True)
    images = TensorDataset(torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels))
    loader = DataLoader(IndexedDataset(images), batch_size=32)  # Lightning gives each process its half
    monitor, writer = SpectrumMonitor(), GradientSketchWriter(OUT / "rows", dim=512, overwrite=True)
    trainer = Trainer(max_epochs=5, accelerator="cpu", devices=2, strategy="ddp", callbacks=[monitor, writer],
                      logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    model = Net()
    trainer.fit(model, loader)
    trainer.validate(model, loader, verbose=False)

    both: list = [None, None]
    torch.distributed.all_gather_object(both, [round(x, 4) for x in monitor.history[-1].top(3).tolist()])
    if trainer.is_global_zero:
        for rank, largest in enumerate(both):
            print(f"process {rank}: largest eigenvalues {largest}")
        store = GradientStore.open(writer.dirpath)
        steps, rows = (store.where(stage=stage).metadata() for stage in ("fit", "validate"))
        ids = rows["example_id"][~rows["padded"]]
        print(f"{len(steps['step'])} rows of {len(steps['step'].unique())} steps of the averaged gradient")
        print(f"{len(ids)} rows of {len(ids.unique())} images; {int(rows['padded'].sum())} drawn twice, and marked")


if __name__ == "__main__":
    main()
