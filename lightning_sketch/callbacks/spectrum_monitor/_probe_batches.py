"""The first batches of training, kept so that every measurement is on the same data."""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor


class KeptBatches:
    """Copies of the first `num_batches` batches, on the CPU.

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

    def on_device(self, device: torch.device) -> list[tuple[int, Any]]:
        """The batches on this device, each behind its index."""
        return [(i, move_data_to_device(batch, device)) for i, batch in enumerate(self.batches)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything in them, once they are complete."""
        digest = hashlib.blake2b(digest_size=8)
        for batch in self.batches:
            _update(digest, batch)
        return digest.hexdigest()


def _update(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().to_dense().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _update(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    elif isinstance(value, str | bytes | int | float | bool | None):
        digest.update(repr(value).encode())
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        _update(digest, vars(value))
    else:
        digest.update(type(value).__name__.encode())
