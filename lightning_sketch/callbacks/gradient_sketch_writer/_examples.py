"""Which examples a batch consists of: their ids, which of them are duplicates, and the user's columns."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_sketch._lightning import LightningModule, Trainer, changed_batches, changed_loaders
from lightning_sketch.attribution.indexed_dataset import HASH, Indexed, batch_ids, indexed, without_index
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.store.sketched_gradients import DEFAULTS, Column, Strings, as_column, keys_of, unknown

_RESERVED = {*DEFAULTS, "attempt", "dataloader", "example_ids", "mask", "scale", "self", "sketch", "sketches"}
_RESERVED -= {"weight"}  # users may know better


class ExampleIds:
    """A function: batch -> the ids of its examples, see `batch_ids`.

    Args:
        index_key: The key or position of the ids in a batch, or "hash" for hashes of the examples' contents.
        structure: Returns a new `BatchStructure`, which counts the examples of a batch; called once per data loader.
    """

    def __init__(self, index_key: str | int | None, structure: Callable[[], BatchStructure] = BatchStructure):
        self.index_key, self.new_structure = index_key, structure
        self.structures: dict[Any, BatchStructure] = {}
        self.from_dataset: Column | None = None
        self.attached = ExitStack()

    def __call__(self, batch: Any, loader: Any = None) -> Column:
        """Return the ids of the batch that the Trainer works on.

        Args:
            batch: The batch.
            loader: The index of its data loader; None for the one of training.
        """
        if self.from_dataset is not None:
            return self.from_dataset
        structure = self.structures.setdefault(loader, self.new_structure())
        return batch_ids(batch, self.index_key, structure=structure)

    @property
    def known(self) -> bool:
        """Whether the examples have ids."""
        return self.index_key is not None or self.from_dataset is not None

    @property
    def hashed(self) -> bool:
        """Whether ids are hashes of contents, so that equal ids mean equal examples."""
        return self.index_key == HASH and self.from_dataset is None

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin to load the indices of an `IndexedDataset` with its batches, and to remove them before the module."""
        self.detach()
        self.structures.clear()
        self.attached.enter_context(changed_loaders(trainer, indexed))
        self.attached.enter_context(changed_batches(module, self._note, without_index))

    def detach(self) -> None:
        """Stop to change loaders and batches."""
        self.attached.close()

    def _note(self, batch: Any) -> None:
        """Remember the ids in a batch of an `IndexedDataset`."""
        items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
        if not isinstance(batch, Indexed) and any(isinstance(item, Indexed) for item in items):
            raise ValueError(
                "batches of an IndexedDataset are inside other batches, as with several data loaders at once, so that "
                "an example has no single id; use the data sets without IndexedDataset, and per='step'."
            )
        self.from_dataset = batch_ids(batch, None) if isinstance(batch, Indexed) else None


class DuplicateFinder:
    """Find the examples that a distributed sampler repeats so that all ranks have equally many.

    Of R ranks, position j of rank r is number j R + r of their common order; the numbers from the length of the data
    set on are duplicates.

    Args:
        loader: The data loader of the batches. Of other objects, such as several loaders at once, no example counts as
            a duplicate.
        rank: The rank of this process.
    """

    def __init__(self, loader: Any, rank: int):
        sampler = getattr(loader, "sampler", None)
        self.length: int | None = None  # of the data set; None if the sampler repeats no example
        self.rank, self.ranks, self.seen = rank, 1, 0
        if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            dataset: Any = sampler.dataset  # torch's Dataset does not declare __len__
            self.length, self.ranks = len(dataset), sampler.num_replicas

    def among(self, count: int) -> Bool[Tensor, " count"]:
        """Return which of the next `count` examples of this rank are duplicates."""
        positions = torch.arange(self.seen, self.seen + count)
        self.seen += count
        if self.length is None:
            return torch.zeros(count, dtype=torch.bool)
        return positions * self.ranks + self.rank >= self.length


class UserColumns:
    """A function from a batch to the user's columns of its rows.

    Args:
        columns_fn: batch -> {name: values}; None for no columns.
    """

    def __init__(self, columns_fn: Callable[[Any], Mapping[str, Any]] | None):
        self.columns_fn = columns_fn

    def __call__(self, batch: Any, count: int | None) -> dict[str, Column]:
        """Return the columns of the rows of a batch.

        Args:
            batch: The batch, as the module gets it.
            count: The number of its examples; None for the one row of a step, whose value is unknown where the examples
                have several.

        Raises:
            ValueError: If a name or the number of values does not fit.
        """
        if self.columns_fn is None:
            return {}
        found = self.columns_fn(batch)
        if not isinstance(found, Mapping):
            raise ValueError(f"columns_fn returned a {type(found).__name__}; return a dict: {{'source': values}}.")
        return {name: _column(name, values, count) for name, values in found.items()}


def _column(name: Any, values: Any, count: int | None) -> Column:
    """Return one column, from a value per row or one for all rows."""
    if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
        taken = f"; {name!r} is a column of every row" if name in _RESERVED else ""
        raise ValueError(f"columns_fn names a column {name!r}{taken}; use another name, such as 'source'.")
    single = isinstance(values, str | bool | int | float) or getattr(values, "ndim", 1) == 0
    column = Strings.of([values]) if isinstance(values, str) else as_column([values] if single else values, name)
    if single and isinstance(column, torch.Tensor):
        column = column.reshape(1)
    column = column if isinstance(column, Strings) else column.detach().cpu()
    if single:
        return column[torch.zeros(count or 1, dtype=torch.long)]
    if count is None and len(column):
        keys = keys_of(column)
        return column[:1] if bool((keys == keys[0]).all()) else unknown(column, 1)
    if len(column) != count or (isinstance(column, torch.Tensor) and column.ndim != 1):
        shape = f"{len(column)} values" if isinstance(column, Strings) else f"shape {tuple(column.shape)}"
        raise ValueError(
            f"columns_fn returned {shape} for column {name!r}; return one value, or one for each of {count} examples."
        )
    return column
