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

from lightning_sketch.autodiff.batches import num_examples, split_batch

REDUCTIONS = ("mean", "sum")


def own_scale(
    batch: Any, reduction: str = "mean", weight_fn: Callable[[Any], float] | None = None
) -> Float[Tensor, " examples"]:
    """What turns shares into gradients, one factor per example; 0 for an example that has no weight.

    Args:
        batch: of which the loss is taken.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        weight_fn: batch -> its weight in a mean; called with one example, `num_labels` for a mean over tokens.

    >>> own_scale(torch.zeros(3, 2))
    tensor([3., 3., 3.], dtype=torch.float64)
    """
    if reduction == "sum":
        return torch.ones(num_examples(batch), dtype=torch.float64)
    if weight_fn is None:
        return torch.full((num_examples(batch),), num_examples(batch), dtype=torch.float64)
    weights = torch.tensor([float(weight_fn(example)) for example in split_batch(batch, 1)], dtype=torch.float64)
    return torch.where(weights > 0, weights.sum() / weights, 0.0)


def check_reduction(reduction: str) -> None:
    """Refuse what is neither a mean nor a sum."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; a loss is a 'mean' or a 'sum' over its examples.")
