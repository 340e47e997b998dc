"""A hash of the contents of a batch or an example: tensors, arrays, strings, numbers, objects."""

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
    """Return 63 bits of a hash of the contents of a batch or an example: tensors, arrays, strings, numbers, objects.

    Equal contents in equal order have equal hashes on every machine; keys of mappings are not hashed.

    Raises:
        TypeError: for an object whose contents cannot be read.

    >>> content_hash(["the cat sat", torch.tensor(1)]) != content_hash(["a dog ran", torch.tensor(1)])
    True
    """
    return int.from_bytes(content_digest(value), "little") >> 1


def content_digest(value: Any) -> bytes:
    """Return the hash as eight bytes; `content_hash` is 63 bits of them."""
    digest = hashlib.blake2b(digest_size=8)
    _digest(digest, value)
    return digest.digest()


def _digest(digest: "hashlib.blake2b", value: Any) -> None:
    """Add a value to a digest, with its type and length unless it is or has a tensor, so that values stay apart."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
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
    """Return the state of an object, as pickle would store it."""
    if dataclasses.is_dataclass(value):
        return items_of(value)
    try:
        reduced = value.__reduce_ex__(2)
    except TypeError as error:
        raise TypeError(
            f"the contents of a {type(value).__name__} in a batch cannot be read ({error}); pass an index_key, or keep "
            "it out of the batch."
        ) from error
    return (
        reduced
        if isinstance(reduced, str)
        else [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]
    )
