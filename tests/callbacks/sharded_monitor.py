"""Program that measures Hessian spectra while it trains for an epoch.

python sharded_monitor.py FOLDER DATA TENSOR PRECISION

DATA processes share the examples (FSDP2) and TENSOR processes each matrix; 1 and 1 is one process without shards.
Prints each measurement's largest eigenvalues, error bars, loss and critical factor, of H and of P^-1/2 H P^-1/2.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from models import dataset, trainer
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_sketch import SpectrumMonitor


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 10)
        )
        self.ranks = self.rank = None

    def configure_model(self):
        if self.ranks is not None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        self.ranks, self.rank = data.size(), data.get_local_rank()
        if tensor.size() > 1:
            parallelize_module(self.net, tensor, {"1": ColwiseParallel(), "3": RowwiseParallel()})
        if data.size() > 1:
            for layer in (self.net[3], self.net):
                fully_shard(layer, mesh=data)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        """Rank r of R takes r, r + R, ...: batch by batch, all ranks together see the same."""
        rows, ranks = dataset(96), self.ranks or 1
        sampler = DistributedSampler(rows, ranks, rank=self.rank or 0, shuffle=False)
        return DataLoader(rows, batch_size=24 // ranks, sampler=sampler)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def described(measured):
    return {
        "top": measured.eigenvalues[:2].tolist(),
        "errors": measured.residuals[:2].tolist(),
        "converged": measured.converged[:2].tolist(),
        "loss": measured.loss,
        "factor": measured.critical.factor if measured.critical else None,
    }


def main(folder, data, tensor, precision):
    torch.set_num_threads(1)
    seed_everything(4, verbose=False)
    sharded = data * tensor > 1
    strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo") if sharded else "auto"
    tol = 1e-2 if precision == "32-true" else 0.1
    usual = {"num_batches": 2, "num_matvecs": 24, "top_k": 2, "bottom_k": 1, "tol": tol, "on_error": "raise"}
    monitors = [SpectrumMonitor(at_start=True, **usual), SpectrumMonitor(preconditioner="optimizer", **usual)]
    options = {"strategy": strategy, "use_distributed_sampler": False, "precision": precision, "limit_val_batches": 0}
    run = trainer(folder, *monitors, devices=data * tensor, max_epochs=1, **options)
    run.fit(model := Model())
    if run.is_global_zero:
        found = {monitor.name: [described(measured) for measured in monitor.history] for monitor in monitors}
        found["logged"] = float(run.callback_metrics["hessian/lambda_max"])
        found["grads"] = all(p.grad is not None for p in model.parameters())
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
