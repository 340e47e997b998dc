"""Ids of examples, which do not depend on the order that samplers, workers and ranks bring.

An id is the example's number in a key of the batch, or a hash of the example's contents, or its index in the data set,
which an `IndexedDataset` attaches to each item.
"""

from collections.abc import Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, Column, Strings

HASH = "hash"


class Indexed(NamedTuple):
    """An item of an `IndexedDataset` or, after collation, a batch of items.

    Attributes:
        item: The item or batch of the original data set.
        index: Its index in the data set; for a batch a tensor of indices, (examples,).
    """

    item: Any
    index: Any


class IndexedDataset(Dataset):
    """A data set that attaches its index to each item; the default collation does so for batches.

    With `GradientSketchWriter` in the Trainer the module gets the plain batch, as without this class; elsewhere a
    batch is `Indexed(item, index)`. A custom collate function gets a list of `Indexed`.

    Args:
        dataset: The data set, with `__getitem__` and `__len__`.

    >>> data = IndexedDataset(["a", "b"])
    >>> data[1]
    Indexed(item='b', index=1)
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset) if isinstance(self.dataset, Sized) else 0

    def __getitem__(self, index: int) -> Indexed:
        return Indexed(self.dataset[index], index)


def batch_ids(batch: Any, index_key: str | int | None, *, structure: BatchStructure | None = None) -> Column:
    """Return the id of each example of a batch, on the CPU; -1 if it is unknown.

    Args:
        batch: An `Indexed` batch, or a batch as the module gets it.
        index_key: Where the batch has the ids: a key, or a position in a tuple. "hash" makes ids of 63 bits from the
            contents of each example. With None only an `Indexed` batch has ids.
        structure: Where the examples of the batch are, if they are not rows of tensors.

    Returns:
        int64, (examples,), or `Strings` if the ids are names.

    Raises:
        ValueError: if the batch has no such key, or the ids are not one whole number or one string per example.

    >>> batch_ids({"x": torch.zeros(2, 3), "id": torch.tensor([5, 3])}, "id")
    tensor([5, 3])
    """
    if isinstance(batch, Indexed):
        return torch.as_tensor(batch.index).long().cpu()
    structure = structure or BatchStructure()
    if index_key is None:
        return torch.full((structure.count(batch),), UNKNOWN_ID)
    if index_key == HASH:
        return torch.tensor([content_hash(example) for example, _ in structure.parts(batch, 1)])
    try:
        found = batch[index_key]
    except (KeyError, IndexError, TypeError) as error:
        keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(f"index_key={index_key!r} is not in the batch, which has {keys}.") from error
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if isinstance(found, list | tuple) and any(isinstance(name, str | None) for name in found):
        if not all(isinstance(name, str) for name in found):
            raise ValueError(f"index_key={index_key!r} gives {str(found)[:60]}; each example needs one name or number.")
        if len(found) == structure.count(batch):
            return Strings.of(found)
        raise ValueError(f"index_key={index_key!r} gives {len(found)} names for {structure.count(batch)} examples.")
    ids = torch.as_tensor(found)
    if ids.is_floating_point() or ids.shape != (structure.count(batch),):
        raise ValueError(
            f"index_key={index_key!r} gives a tensor of {ids.dtype} and shape {tuple(ids.shape)}; the batch has "
            f"{structure.count(batch)} examples, each needs one whole number."
        )
    return ids.long().cpu()


def without_index(batch: Any) -> Any:
    """Return the batch as the module expects it, without indices."""
    return batch.item if isinstance(batch, Indexed) else batch
