"""From an example's share in the gradient of a batch's loss to the gradient of its own loss.

    L = sum_i w_i l_i / sum_i w_i        so        grad l_i = (sum_j w_j / w_i) (share of i in grad L)

l_i is the example's own loss, w_i its weight in the mean: 1 for a mean over examples, the number of its labels that
count for a mean over tokens. In a sum, the share is the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.autodiff.batches import BatchStructure

REDUCTIONS = ("mean", "sum")


def own_scale(
    batch: Any,
    reduction: str = "mean",
    weight_fn: Callable[[Any], float] | None = None,
    structure: BatchStructure | None = None,
) -> Float[Tensor, " examples"]:
    """Return what turns shares into gradients, one factor per example; 0 for an example that has no weight.

    Args:
        batch: of which the loss is taken.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        weight_fn: batch -> its weight in a mean; called with one example, `num_labels` for a mean over tokens.
        structure: of the batch, where it is not rows of tensors.

    >>> own_scale(torch.zeros(3, 2))
    tensor([3., 3., 3.], dtype=torch.float64)
    """
    structure = structure or BatchStructure()
    if weight_fn is not None and reduction != "sum":
        weights = [float(weight_fn(example)) for example, _ in structure.parts(batch, 1)]
        weights = torch.tensor(weights, dtype=torch.float64)
        return torch.where(weights > 0, weights.sum() / weights, 0.0)
    examples = structure.count(batch)
    return torch.full((examples,), 1 if reduction == "sum" else examples, dtype=torch.float64)


def check_reduction(reduction: str) -> None:
    """Refuse what is neither a mean nor a sum."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; a loss is a 'mean' or a 'sum' over its examples.")
