"""Which example of the data set a row belongs to, whatever sampler, workers or ranks did to the order.

Three ways: a key of the batch that holds the number; a hash of the example's contents; or a data set that hands its
index along, `IndexedDataset`.
"""

from collections.abc import Mapping, Sized
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID

HASH = "hash"


class Indexed(NamedTuple):
    """An item, or a batch of them, with the index of each in the data set."""

    item: Any
    index: Any


class IndexedDataset(Dataset):
    """A data set whose items carry their index; the default collation makes batches of it that do.

    With `GradientSketchWriter` in the Trainer, the module gets the plain batch, as without this class; elsewhere a
    batch is `Indexed(item, index)`. A collate function of one's own gets a list of `Indexed`.

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


def batch_ids(
    batch: Any, index_key: str | int | None, structure: BatchStructure | None = None
) -> Int[Tensor, " examples"]:
    """A number per example, on the CPU; -1 where there is no way to tell.

    Args:
        batch: `Indexed`, or what the module gets.
        index_key: where the batch keeps the numbers, a key or a place; "hash" for 63 bits of each example's contents.
        structure: of the batch, where its examples are not rows of tensors.

    Raises:
        ValueError: if the batch has no such key, or its numbers are no whole ones, one each.
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
    ids = torch.as_tensor(found)
    if ids.is_floating_point() or ids.shape != (structure.count(batch),):
        raise ValueError(
            f"index_key={index_key!r} gives a tensor of {ids.dtype} and shape {tuple(ids.shape)}; the batch has "
            f"{structure.count(batch)} examples, each needs one whole number."
        )
    return ids.long().cpu()


def without_index(batch: Any) -> Any:
    """The batch as the module expects it."""
    return batch.item if isinstance(batch, Indexed) else batch
