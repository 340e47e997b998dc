"""Program: print w after three steps of a module that is not compiled, compiled, and compiled with its wrapper."""

import json

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Classifier, train_loader, trainer

from lightning_sketch.subspace import SubspaceModule


class Unlogged(Classifier):
    """Lightning's own `log` cannot be compiled."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def trained(inner, outer):
    pl.seed_everything(0, verbose=False)
    sub = SubspaceModule(inner(Unlogged()), 24, scale=10)
    trainer(max_steps=3).fit(outer(sub), train_loader())
    return sub.w.tolist()


def as_it_is(module):
    return module


def compiled(module):
    return torch.compile(module, backend="eager")


if __name__ == "__main__":
    print(json.dumps([trained(as_it_is, as_it_is), trained(compiled, as_it_is), trained(as_it_is, compiled)]))
