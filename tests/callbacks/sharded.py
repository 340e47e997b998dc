"""Run as a program: five steps on parameters that are sharded over two processes, or on one whole.

python sharded.py FOLDER DEVICES [look] [ddp]

ddp: whole on each.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from models import dataset, trainer
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_sketch import GradientSketchWriter


class Model(LightningModule):
    """Seven rows on two ranks: four and three."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 10))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[1], self.net[3]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def train_dataloader(self):
        """Rank r of R takes r, r + R, ...: batch by batch, all ranks together see the same."""
        rows, ranks = dataset(160), self.trainer.world_size
        sampler = DistributedSampler(rows, ranks, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=32 // ranks, sampler=sampler)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main(folder: Path, devices: int, look: bool, ddp: bool):
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    strategy = "auto"
    if ddp:
        strategy = "ddp"
    elif devices > 1:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    writer = GradientSketchWriter(folder / "store", dim=64, dtype="float32")
    options = {"strategy": strategy, "use_distributed_sampler": False, "limit_val_batches": 1.0 if look else 0}
    run = trainer(folder, writer, devices=devices, max_steps=5, max_epochs=-1, **options)
    if look:
        run.validate(Model())
    else:
        run.fit(Model())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "look" in sys.argv, "ddp" in sys.argv)
