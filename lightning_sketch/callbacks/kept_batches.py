"""The first batches of training, kept so that every measurement is on the same data."""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_sketch._compat import LightningModule


class KeptBatches:
    """Copies of the first `num_batches` training batches, on the CPU.

    The loader is never read for this, so that its sampler, workers and random state stay untouched.
    """

    def __init__(self, num_batches: int):
        self.num_batches = num_batches
        self.batches: list[Any] = []
        self.complete = False

    def offer(self, module: LightningModule, batch: Any) -> None:
        """Keep a copy of the batch if there is room, before a training step can change it in place."""
        if not self.complete:
            on_cpu = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
            self.batches.append(copy.deepcopy(on_cpu))
            self.complete = len(self.batches) == self.num_batches

    def close(self) -> None:
        """Take what is there for all there will be: the epoch had no more."""
        self.complete = bool(self.batches)

    def on_device(self, module: LightningModule) -> list[Any]:
        """The batches where the module is."""
        return [module.transfer_batch_to_device(batch, module.device, 0) for batch in self.batches]

    def fingerprint(self) -> str:
        """A hash of everything in them."""
        digest = hashlib.blake2b(digest_size=8)
        for batch in self.batches:
            _update(digest, batch)
        return digest.hexdigest()


def _update(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(str(key).encode())
            _update(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    else:
        digest.update(
            repr(value).encode() if isinstance(value, str | int | float | bool) else type(value).__name__.encode()
        )
