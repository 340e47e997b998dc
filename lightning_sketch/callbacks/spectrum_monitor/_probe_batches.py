"""Copies of the first batches of training, so that every measurement uses the same data."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device

from lightning_sketch.autodiff.content_hash import content_digest


@dataclass(frozen=True)
class ProbeBatch:
    """A batch with its position in the epoch.

    Attributes:
        index: The position of the batch in the epoch, from 0.
        batch: The batch, as the data loader returned it.
    """

    index: int
    batch: Any


class ProbeBatches:
    """Copies of the first batches of an epoch, on the CPU.

    They are taken from the batches that the Trainer loads anyway, so that the sampler, the workers and the random state
    of the data loader are unaffected.

    Args:
        num_batches: The number of batches to collect.

    Attributes:
        batches: The copies that were made so far.
        complete: Whether no more batches are collected.
    """

    def __init__(self, num_batches: int):
        self.num_batches = num_batches
        self.batches: list[Any] = []
        self.complete = False

    def offer(self, batch: Any) -> None:
        """Add a copy of the batch unless complete; to be called before a training step can change it in place."""
        if not self.complete:
            with torch.inference_mode(False):  # tensors made in inference mode cannot be differentiated
                self.batches.append(copy.deepcopy(move_data_to_device(batch, torch.device("cpu"))))
            self.complete = len(self.batches) == self.num_batches

    def close(self) -> None:
        """Stop collecting because the epoch has no more batches."""
        self.complete = bool(self.batches)

    def on_device(self, device: torch.device) -> list[ProbeBatch]:
        """Return the batches on a device, each with its index."""
        return [ProbeBatch(i, move_data_to_device(batch, device)) for i, batch in enumerate(self.batches)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the contents of all batches; only to be read once they are complete."""
        return content_digest(self.batches).hex()
