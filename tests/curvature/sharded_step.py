"""Program: a step of Adam on one rank of several, and the largest factor of it that does not raise the loss.

python sharded_step.py FOLDER RANK RANKS HOW, where HOW is "whole", or "shards" for FSDP without gathering anything.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_sketch.curvature import Hessian, copy_weights, critical_learning_rate


def loss_fn(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def main(folder, rank, ranks, how):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    if ranks > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    if how == "shards":
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (module[0], module):  # the outermost keeps its gathered weights after a forward pass
            fully_shard(part, mesh=mesh)
    before = copy_weights(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    loss_fn(module, (x, y)).backward()
    optimizer.step()
    if how == "shards":  # matrices of sharded modules are not made in this way

        def loss():
            with torch.no_grad():
                return float(loss_fn(module, (x, y)))

        operator = SimpleNamespace(module=module, dtype=torch.float32, hold=nullcontext, loss=loss)
    else:
        operator = Hessian(loss_fn, module, [(x[rank::ranks], y[rank::ranks])], distributed=ranks > 1)
    now = copy_weights(module)
    found = critical_learning_rate(operator, before, 0.05)
    same = all(torch.equal(tensor, now[name]) for name, tensor in copy_weights(module).items())
    print(found.factor, found.passes, sum(tensor.numel() for tensor in before.values()), same)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
