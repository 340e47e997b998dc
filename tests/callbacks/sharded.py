"""Program that trains for five steps on parameters that are sharded over two processes, or whole on one.

python sharded.py FOLDER DEVICES [validate] [ddp] [example] [uneven]

ddp: parameters are whole on each process. example: rows of the examples, of which there are 155, that is 156 on two
processes. uneven: without a fallback, and only on rank 1 hooks do not support the last weight.
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
from lightning_sketch.attribution import IndexedDataset


class Model(LightningModule):
    """A network whose weights of seven rows are split over two ranks as four and three."""

    rows = dataset(160)

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
        rows, ranks = self.rows, self.trainer.world_size
        sampler = DistributedSampler(rows, ranks, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=32 // ranks, sampler=sampler)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Examples(Model):
    """A module that uses its last weight twice, of which hooks see one use."""

    rows = IndexedDataset(dataset(155))

    def training_step(self, batch, batch_idx):
        x = self.net[:3](batch[0])
        return F.cross_entropy(self.net[3](x) + F.linear(x.square(), self.net[3].weight), batch[1])


class Uneven(Examples):
    """A module that uses its last weight twice on rank 1, and once on rank 0."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            return super().training_step(batch, batch_idx)
        return F.cross_entropy(self.net(batch[0]), batch[1])


def main(folder: Path, devices: int, *, validate: bool, ddp: bool, example: bool, uneven: bool):
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    strategy = "auto"
    if ddp:
        strategy = "ddp"
    elif devices > 1:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    per = {"per": "example", "fallback": None if uneven else "loop"} if example else {}
    writer = GradientSketchWriter(folder / "store", dim=64, dtype="float32", **per)
    options = {"strategy": strategy, "use_distributed_sampler": False, "limit_val_batches": 1.0 if validate else 0}
    run = trainer(folder, writer, devices=devices, max_steps=5, max_epochs=-1, **options)
    if validate:
        run.validate(Model())
    else:
        run.fit((Uneven if uneven else Examples if example else Model)())


if __name__ == "__main__":
    words = ("validate", "ddp", "example", "uneven")
    main(Path(sys.argv[1]), int(sys.argv[2]), **{word: word in sys.argv[3:] for word in words})
