"""A module of `lightning.pytorch`, in a file that a new process can import."""

import lightning.pytorch as lp
import torch
import torch.nn.functional as F
from nets import digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class InOrder(lp.LightningModule):
    """A module whose batches have the same rows on any number of ranks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def training_step(self, batch):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def train_dataloader(self):
        rows, ranks = TensorDataset(*digits(slice(0, 256))), self.trainer.world_size
        sampler = DistributedSampler(rows, ranks, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=32 // ranks, sampler=sampler)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)
