"""The numbers of a batch's examples, from the batch itself or from the data set that it was drawn from."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from lightning_sketch._lightning import LightningModule, changed_batches
from lightning_sketch.attribution import batch_ids
from lightning_sketch.attribution.indexed_dataset import HASH, Indexed, without_index
from lightning_sketch.autodiff.batches import BatchStructure


class BatchNumbers:
    """A function: batch -> the numbers of its examples, see `batch_ids`.

    Args:
        index_key: where a batch keeps them, or "hash".
        structure: makes what says how many examples a batch has.
    """

    def __init__(self, index_key: str | int | None, structure: Callable[[], BatchStructure] = BatchStructure):
        self.index_key, self.new_structure = index_key, structure
        self.structures: dict[Any, BatchStructure] = {}
        self.handed_along: Tensor | None = None
        self.attached = ExitStack()

    def __call__(self, batch: Any, loader: Any = None) -> Tensor:
        """Return those of the batch that the Trainer works on, from this loader; None for that of training."""
        if self.handed_along is not None:
            return self.handed_along
        structure = self.structures.setdefault(loader, self.new_structure())
        return batch_ids(batch, self.index_key, structure)

    @property
    def known(self) -> bool:
        """Whether there is a way to them."""
        return self.index_key is not None or self.handed_along is not None

    @property
    def hashed(self) -> bool:
        """Whether they are made of contents, so that equal ones are of equal examples."""
        return self.index_key == HASH and self.handed_along is None

    def attach(self, module: LightningModule) -> None:
        """From here on take the index off the batches of an `IndexedDataset`, before the module gets them."""
        self.detach()
        self.structures.clear()
        self.attached.enter_context(changed_batches(module, self._note, without_index))

    def detach(self) -> None:
        """The module gets its batches as they are."""
        self.attached.close()

    def _note(self, batch: Any) -> None:
        items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
        if not isinstance(batch, Indexed) and any(isinstance(item, Indexed) for item in items):
            raise ValueError(
                "batches of an IndexedDataset come inside other batches, as of several data loaders at once, whose "
                "examples have no common number; use the data sets without IndexedDataset, and per='step'."
            )
        self.handed_along = batch_ids(batch, None) if isinstance(batch, Indexed) else None
