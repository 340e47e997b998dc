"""A hash of all that a batch, or an example, holds: tensors, arrays, strings, numbers, objects."""

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.autodiff.batches import items_of, leaves_of


def content_hash(value: Any) -> int:
    """Return 63 bits of a hash of all that a batch, or an example, holds: tensors, arrays, strings, numbers, objects.

    Equal contents in equal order have equal hashes on every machine; keys of mappings do not count.

    Raises:
        TypeError: for an object that tells nothing of its contents.

    >>> content_hash(["the cat sat", torch.tensor(1)]) != content_hash(["a dog ran", torch.tensor(1)])
    True
    """
    return int.from_bytes(content_digest(value), "little") >> 1


def content_digest(value: Any) -> bytes:
    """Return the eight bytes that `content_hash` takes its bits from."""
    digest = hashlib.blake2b(digest_size=8)
    _digest(digest, value)
    return digest.digest()


def _digest(digest: "hashlib._Hash", value: Any) -> None:
    """Add a value; all but tensors and what holds them with its type and length, so that no two values run together."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping | list | tuple | np.ndarray):
        items = list(value.values()) if isinstance(value, Mapping) else list(value)
        if not any(isinstance(leaf, Tensor) for _, _, leaf in leaves_of(items)):
            digest.update(f"[{len(items)}".encode())
        for item in items:
            _digest(digest, item)
    elif isinstance(value, set | frozenset):
        _digest(digest, sorted(content_hash(item) for item in value))
    elif value is None or isinstance(value, str | bytes | int | float | complex | np.generic):
        text = repr(value)
        digest.update(f"{type(value).__name__}{len(text)}:{text}".encode())
    elif isinstance(value, type) or inspect.isroutine(value):
        digest.update(value.__qualname__.encode())
    else:
        _digest(digest, type(value).__qualname__)
        _digest(digest, _state_of(value))


def _state_of(value: Any) -> Any:
    """Return what tells an object from others of its class, as pickle would keep it."""
    if dataclasses.is_dataclass(value):
        return items_of(value)
    try:
        reduced = value.__reduce_ex__(2)
    except TypeError as error:
        raise TypeError(
            f"a {type(value).__name__} in a batch tells nothing of its contents ({error}); pass an index_key, or keep "
            "it out of the batch."
        ) from error
    return (
        reduced
        if isinstance(reduced, str)
        else [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]
    )
