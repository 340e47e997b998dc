"""The first batches of training, kept so that every measurement is on the same data."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device

from lightning_sketch.autodiff.content_hash import content_digest


@dataclass(frozen=True)
class ProbeBatch:
    """A batch, and which one of the epoch it was."""

    index: int
    batch: Any


class ProbeBatches:
    """DuplicateFinder of the first `num_batches` batches, on the CPU.

    The loader is never read for this, so that its sampler, workers and random state stay untouched.
    """

    def __init__(self, num_batches: int):
        self.num_batches = num_batches
        self.batches: list[Any] = []
        self.complete = False

    def offer(self, batch: Any) -> None:
        """Keep a copy of the batch if there is room, before a training step can change it in place."""
        if not self.complete:
            with torch.inference_mode(False):  # a copy made inside could not be differentiated
                self.batches.append(copy.deepcopy(move_data_to_device(batch, torch.device("cpu"))))
            self.complete = len(self.batches) == self.num_batches

    def close(self) -> None:
        """Take what is there for all there will be: the epoch had no more."""
        self.complete = bool(self.batches)

    def on_device(self, device: torch.device) -> list["ProbeBatch"]:
        """The batches on this device, each with its index."""
        return [ProbeBatch(i, move_data_to_device(batch, device)) for i, batch in enumerate(self.batches)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything in them, once they are complete."""
        return content_digest(self.batches).hex()
