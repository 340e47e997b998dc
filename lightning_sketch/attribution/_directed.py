"""Batches with a vector at the output of each example, along which the output is differentiated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.losses import OutputModel
from lightning_sketch.autodiff.output_roots import Root


@dataclass(frozen=True)
class Directed:
    """A batch with a vector at the output of each of its examples.

    Args:
        batch: The batch.
        root: The vectors, kept as what they are made from.
    """

    batch: Any
    root: Root


@dataclass
class DirectedStructure(BatchStructure):
    """The structure of batches with vectors: that of the batches, and the first axis of what vectors are made from.

    Args:
        of_batch: The structure of the batches.
    """

    of_batch: BatchStructure = field(default_factory=BatchStructure)

    @property
    def along_first_axis(self) -> bool:
        """Whether the examples are along the first axis."""
        return self.of_batch.along_first_axis

    def count(self, directed: Directed) -> int:
        """Return the number of examples."""
        return self.of_batch.count(directed.batch)

    def parts(self, directed: Directed, size: int, examples: int | None = None) -> Iterator[tuple[Directed, int]]:
        """Yield parts of at most `size` examples with their vectors, each with its number of examples."""
        start = 0
        for part, count in self.of_batch.parts(directed.batch, size, examples):
            root = directed.root.of(*(tensor[start : start + count] for tensor in directed.root.parts))
            yield Directed(part, root), count
            start += count

    def each(self, directed: Directed) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Directed]]:
        """Return the tensors of the batch and the vectors, and a function that makes a batch of one of their slices."""
        tensors, batch_of_one = self.of_batch.each(directed.batch)

        def directed_of_one(slices: Sequence[Tensor]) -> Directed:
            root = directed.root.of(*(slice.unsqueeze(0) for slice in slices[len(tensors) :]))
            return Directed(batch_of_one(slices[: len(tensors)]), root)

        return [*tensors, *directed.root.parts], directed_of_one


def along(model: OutputModel) -> Callable[[nn.Module, Directed], Tensor]:
    """Return a loss: the sum over examples of <v, output>, differentiated for each example alone."""

    def total(module: nn.Module, directed: Directed) -> Tensor:
        output = model.forward(directed.batch)[0]
        # a product of rows and columns: that of the elements would be one more tensor of this size
        return (directed.root.vector(output).unsqueeze(-2) @ output.unsqueeze(-1)).sum()

    return total


def check_rows(output: Tensor, examples: int) -> None:
    """Refuse an output that does not have one row per example."""
    if not output.ndim or len(output) != examples:
        raise ValueError(
            f"ggn needs an output of shape (examples, classes) or (examples, tokens, classes) of {examples} examples, "
            f"got shape {tuple(output.shape)}; pass model_fn=lambda module, batch: ... that returns it, or use "
            "curvature='margin' or 'fisher', which need none."
        )
