"""The ids of a batch's examples, from the batch itself or from the `IndexedDataset` that it was drawn from."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning_sketch._lightning import LightningModule, changed_batches
from lightning_sketch.attribution import batch_ids
from lightning_sketch.attribution.indexed_dataset import HASH, Indexed, without_index
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.store.sketched_gradients import Column


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

    def attach(self, module: LightningModule) -> None:
        """Start to remove the ids from the batches of an `IndexedDataset` before the module gets them."""
        self.detach()
        self.structures.clear()
        self.attached.enter_context(changed_batches(module, self._note, without_index))

    def detach(self) -> None:
        """Stop to change the module's batches."""
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
