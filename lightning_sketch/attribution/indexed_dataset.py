"""Ids of examples, which do not depend on the order that samplers, workers and ranks bring.

An id is the example's number or name in a key of the batch, or a hash of the example's contents, or its index in the
data set, which an `IndexedDataset` tells.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from lightning_sketch._arguments import kind_of
from lightning_sketch.autodiff.batches import BatchStructure, has_labels, labels_of
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, Column, Strings

HASH = "hash"
DOCUMENTS = "document_ids"  # the entry of a batch that has the ids of packed documents, one for each label


class Indexed(NamedTuple):
    """A batch of an `IndexedDataset`, with the indices of its examples.

    Attributes:
        item: The batch, as the data loader's collate function made it.
        index: The indices of its examples in the data set, int64, (examples,).
    """

    item: Any
    index: Any


class IndexedDataset(Dataset):
    """A data set whose batches can tell which examples they consist of.

    It has the items of the original data set, so that any collate function, module and callback works with it as with
    the original. `GradientSketchWriter` and `sketch_gradients` read the indices of a batch beside it; in a loop of your
    own use `indexed(loader)`. `random_split` and `Subset` of it keep the indices of the whole.

    Args:
        dataset: The data set, with `__getitem__` and `__len__`.

    Raises:
        TypeError: for a data set that streams, whose items have no index; use `index_key` with it.

    >>> data = IndexedDataset(torch.arange(10, 16))
    >>> len(data), data[1]
    (6, tensor(11))
    >>> loader = DataLoader(data, batch_size=2, sampler=[5, 0, 3, 1])
    >>> [batch.tolist() for batch in loader]
    [[15, 10], [13, 11]]
    >>> [batch.index.tolist() for batch in indexed(loader)]
    [[5, 0], [3, 1]]
    """

    def __init__(self, dataset: Any):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"IndexedDataset takes a data set with a length, got {kind_of(dataset)}, which has none, so that its "
                "items have no index; use index_key=... for ids that its batches contain, or index_key='hash'."
            )
        if not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"IndexedDataset takes a data set, got {kind_of(dataset)}, whose items have no index; for a data "
                "loader wrap what it reads: DataLoader(IndexedDataset(dataset), batch_size=...)."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> "_Items":
        """Return items in a list that knows their indices."""
        several = getattr(self.dataset, "__getitems__", None)
        return _Items(several(indices) if several else [self.dataset[i] for i in indices], indices)


class _Items(list):
    """Items of a data set, with their indices.

    Args:
        items: The items.
        indices: Their indices.
    """

    def __init__(self, items: Iterable[Any], indices: Iterable[int]):
        super().__init__(items)
        self.indices = torch.tensor([int(i) for i in indices])


class _Collate:
    """A collate function that keeps the indices of the items beside the batch.

    Args:
        collate_fn: The collate function of the data loader.
    """

    def __init__(self, collate_fn: Any):
        self.collate_fn = collate_fn

    def __call__(self, items: Any) -> Any:
        """Return an `Indexed` batch."""
        if not isinstance(items, _Items):  # the loader does not batch, or something between took the items one by one
            return self.collate_fn(items)
        return Indexed(self.collate_fn(list(items)), items.indices)


def indexed(loader: Any) -> Any:
    """Return a data loader whose batches are `Indexed`, if its data set is an `IndexedDataset`; others as they are.

    The given loader is left as it is.

    Args:
        loader: A data loader, or any iterable of batches.

    Raises:
        ValueError: if parts of the data set are indexed, as in a `ConcatDataset`, but not the whole.

    Warns:
        UserWarning: if the loader does not batch items itself.
    """
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset) and any(isinstance(part, IndexedDataset) for part in dataset.datasets):
        raise ValueError(
            "the parts of a ConcatDataset are IndexedDatasets, so that examples of several parts have the same index; "
            "use IndexedDataset(ConcatDataset([...]))."
        )
    if not isinstance(loader, DataLoader) or not isinstance(dataset, IndexedDataset):
        return loader
    if isinstance(loader.collate_fn, _Collate):
        return loader
    if loader.batch_sampler is None:
        warnings.warn(
            "a data loader with batch_size=None takes items as batches, of which an IndexedDataset has no indices: let "
            "the loader batch the items, or pass index_key=....",
            stacklevel=2,
        )
        return loader
    own = copy.copy(loader)
    own.__dict__["_iterator"] = None  # of persistent workers, which collate as before
    own.collate_fn = _Collate(loader.collate_fn)
    return own


def batch_ids(batch: Any, index_key: str | int | None, *, structure: BatchStructure | None = None) -> Column:
    """Return the id of each example of a batch, on the CPU; -1 if it is unknown.

    Args:
        batch: An `Indexed` batch, or a batch as the module gets it.
        index_key: Where the batch has the ids: a key, or a position in a tuple. "hash" makes ids of 63 bits from the
            contents of each example, without the padding that an "attention_mask" shows. With None an `Indexed` batch
            has ids, and one with an entry "document_ids".
        structure: Where the examples of the batch are, if they are not rows of tensors.

    Returns:
        int64, (examples,), or `Strings` if the ids are names; (examples, tokens) if the batch has one for each token,
        as packed documents have.

    Raises:
        ValueError: if the batch has no such key, or the ids are not one whole number or one string per example.

    >>> batch_ids({"x": torch.zeros(2, 3), "id": torch.tensor([5, 3])}, "id")
    tensor([5, 3])
    """
    plain = without_index(batch)
    if index_key is None and isinstance(plain, Mapping) and DOCUMENTS in plain and has_labels(plain):
        batch, index_key = plain, DOCUMENTS
    if isinstance(batch, Indexed):
        return torch.as_tensor(batch.index).long().cpu()
    structure = structure or BatchStructure()
    if index_key is None:
        return torch.full((structure.count(batch),), UNKNOWN_ID)
    if index_key == HASH:
        return torch.tensor([content_hash(_without_padding(example)) for example, _ in structure.parts(batch, 1)])
    try:
        found = batch[index_key]
    except (KeyError, IndexError, TypeError) as error:
        keys = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is {kind_of(batch)}"
        keys += f" of {len(batch)} items" if isinstance(batch, list | tuple) else ""
        raise ValueError(
            f"index_key={index_key!r} is not in the batch, which {keys}; name the key or the position of the ids, or "
            "use IndexedDataset(data)."
        ) from error
    found = found.tolist() if isinstance(found, np.ndarray) and found.dtype.kind in "OUS" else found
    if isinstance(found, list | tuple) and any(isinstance(name, str | None) for name in found):
        if not all(isinstance(name, str) for name in found):
            raise ValueError(f"index_key={index_key!r} gives {str(found)[:60]}; each example needs one name or number.")
        if len(found) == structure.count(batch):
            return Strings.of(found)
        raise ValueError(f"index_key={index_key!r} gives {len(found)} names for {structure.count(batch)} examples.")
    ids = torch.as_tensor(found)
    of_tokens = has_labels(batch) and ids.ndim > 1 and ids.shape == labels_of(batch).shape
    if ids.is_floating_point() or ids.is_complex() or not (of_tokens or ids.shape == (structure.count(batch),)):
        raise ValueError(
            f"index_key={index_key!r} gives a tensor of {ids.dtype} and shape {tuple(ids.shape)}; the batch has "
            f"{structure.count(batch)} examples, each needs one whole number, or one for each of its labels if "
            "documents are packed."
        )
    if ids.dtype == torch.uint64 and bool((ids.view(torch.int64) < 0).any()):
        raise ValueError(
            f"index_key={index_key!r} gives ids of 2^63 or more, which int64 cannot hold; pass them as strings, or "
            "shifted right by one bit."
        )
    return ids.long().cpu()


def _without_padding(example: Any) -> Any:
    """Return a batch of one text without its padding, which depends on the other texts of the batch."""
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or len(mask) != 1 or bool(mask.all()):
        return example
    kept = mask[0] != 0

    def cut(value: Any) -> Any:
        of_tokens = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == len(kept)
        return value[:, kept] if of_tokens else value

    return {key: cut(value) for key, value in example.items()}


def without_index(batch: Any) -> Any:
    """Return the batch as the module expects it, without indices."""
    return batch.item if isinstance(batch, Indexed) else batch
