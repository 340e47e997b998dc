"""What questions are asked of: rows that can be counted, narrowed down, and read in blocks."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lightning_sketch.attribution.rows import SketchedGradients
from lightning_sketch.operators.sketch import Sketch


@runtime_checkable
class RowSource(Protocol):
    """Sketched gradients, in memory or on disk."""

    @property
    def sketch(self) -> Sketch:
        """The map that made the rows."""

    def __len__(self) -> int:
        """How many rows there are."""

    def metadata(self) -> dict[str, Tensor]:
        """The columns, without touching the sketches."""

    def where(self, mask: Tensor | None = None, **equal: Any) -> "RowSource":
        """The rows where the mask is true and columns have these values, in their order."""

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """The rows in order, at most so many at a time."""
