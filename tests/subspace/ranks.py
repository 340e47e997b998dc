"""Program: train ten steps in a subspace, on one process or two; each rank prints w and the weights as JSON.

python ranks.py FOLDER DEVICES alone|ddp|shards [differ] [hooks] [accumulate] [head] [freeze]

differ:      The ranks make different weights.
hooks:       Hooks of the module change gradients of the weights: noise, and clipping.
accumulate:  Two batches a step.
head:        The last layer is trained in full.
freeze:      The first layer is frozen amid the run.
"""

import json
import sys

import torch
import torch.nn.functional as F
from nets import Classifier, digits, trainer
from pytorch_lightning import Callback, seed_everything
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_sketch.subspace import SubspaceModule

moved: list[int] = []


def counted(state, bucket):
    moved.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(state, bucket)


class Count(Callback):
    def on_train_start(self, trainer, pl_module):
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model.register_comm_hook(None, counted)


class Model(Classifier):
    """A classifier with a layer of seventeen rows: nine on one rank, eight on the other."""

    def __init__(self):
        super().__init__(width=17)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self):
        rows, ranks = TensorDataset(*digits(slice(0, 320))), self.trainer.world_size
        sampler = DistributedSampler(rows, ranks, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=32 // ranks, sampler=sampler)


class Hooked(Model):
    """The same, with hooks that see gradients of the mean of all losses."""

    def on_after_backward(self):
        for p in self.net.parameters():
            p.grad += 1e-3 * torch.arange(p.numel()).sin().view_as(p)

    def on_before_optimizer_step(self, optimizer):
        self.norms = [*getattr(self, "norms", []), float(clip_grad_norm_(self.net[0].parameters(), 0.05))]


class Freezes(Model):
    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].requires_grad_(self.trainer.global_step < 4)


def main(folder, devices, kind, *flags):
    torch.set_num_threads(1)
    strategy = {
        "alone": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "shards": ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            save_distributed_checkpoint=False,
        ),
    }[kind]
    run = trainer(
        Count(),
        default_root_dir=folder,
        devices=devices,
        strategy=strategy,
        max_steps=10,
        accumulate_grad_batches=2 if "accumulate" in flags else 1,
        use_distributed_sampler=False,
    )
    seed_everything(run.global_rank if "differ" in flags else 3, verbose=False)
    made = Hooked if "hooks" in flags else Freezes if "freeze" in flags else Model
    sub = SubspaceModule(made(), 64, scale=10, head="net.2.*" if "head" in flags else None)
    run.fit(sub)
    theta = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in sub.weights.parameters()]
    run.save_checkpoint(f"{folder}/a.ckpt")
    found = {
        "w": sub.w.tolist(),
        "theta": torch.cat([p.detach().flatten() for p in theta]).tolist(),
        "moved": moved,
        "n": sub.n,
        "head": [p.tolist() for p in sub.weights.head],
        "norms": getattr(sub.module, "norms", []),
        "sharded": [hasattr(p, "placements") for p in sub.weights.parameters()],
    }
    print("\nFOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
