"""The losses of single examples, from the output of their batch, where the loss is a usual one of the output."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure, has_labels, labels_of
from lightning_sketch.autodiff.losses import CrossEntropy, OutputLoss, loss_values
from lightning_sketch.per_example.weights import Weighing

_SAME_LOSS = 1e-3  # relative difference of a witness's loss, alone and from the output of its batch
_TRIES = 3  # batches on which a loss of the output is looked for


@contextmanager
def last_output(module: nn.Module, examples: int) -> Iterator[list[Tensor]]:
    """Yield a list that has, after a forward pass, the last output of the module or one of its children, or nothing.

    An output is a tensor with the examples along its first axis, or a mapping with such `logits`.
    """
    found: list[Tensor] = []

    def note(part: nn.Module, args: tuple, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, Mapping) else output
        if isinstance(logits, Tensor) and logits.shape[:1] == (examples,):
            found[:] = [logits.detach()]

    handles = [part.register_forward_hook(note) for part in (module, *module.children())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class OutputLosses:
    """A function from the output of a batch to the losses of its examples alone, if these are a usual loss of it.

    It is known by the losses of witnesses, as their own passes gave them, and by that of the batch.
    """

    def __init__(self) -> None:
        self.loss: OutputLoss | None = None
        self.missed = 0

    def __call__(
        self,
        outputs: list[Tensor],
        batch: Any,
        structure: BatchStructure,
        alone: Mapping[int, float],
        way: Weighing,
        whole: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the losses and the probabilities of the true labels, (examples,), None where they are not known.

        Args:
            outputs: The output, or nothing.
            batch: The batch.
            structure: Where its examples are.
            alone: The losses of witnesses by their places.
            way: How the loss weighs the examples.
            whole: The loss of the batch.
        """
        if not outputs or not has_labels(batch) or self.missed >= _TRIES:
            return None, None
        parts = [part for part, _ in structure.parts(batch, 1)]
        expected = torch.tensor(list(alone.values()))
        for loss in [self.loss] if self.loss else loss_values(outputs[0], batch):
            try:
                each = torch.stack([loss(outputs[0][i : i + 1], part).float() for i, part in enumerate(parts)]).cpu()
            except (ValueError, IndexError, RuntimeError):  # labels of another kind than before
                continue
            shares = (each / way.scale).where(way.weights > 0, 0.0).sum()
            both = torch.cat([each[list(alone)].double(), shares[None]]), torch.cat([expected, whole.cpu()[None]])
            if torch.allclose(both[0], both[1].double(), rtol=_SAME_LOSS, atol=_SAME_LOSS**2):
                self.loss = loss
                of_classes = isinstance(loss, CrossEntropy) and not labels_of(batch).is_floating_point()
                return each, (-each).exp() if of_classes else None
        self.loss, self.missed = None, self.missed + 1
        return None, None
