"""Scales that turn an example's share in the gradient of a batch's loss into the gradient of its own loss.

    L = sum_i w_i l_i / sum_i w_i        so        grad l_i = (sum_j w_j / w_i) (share of i in grad L)

l_i is the loss of example i alone, w_i its weight in the mean: 1 for a mean over examples, the number of its labels
that are not ignored for a mean over tokens. In a sum, the share is the gradient.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.autodiff.batches import BatchStructure

# What a loss does over the examples of a batch.
Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def own_scale(
    batch: Any,
    reduction: Reduction = "mean",
    weight_fn: Callable[[Any], float] | None = None,
    structure: BatchStructure | None = None,
) -> Float[Tensor, " examples"]:
    """Return the scales that turn shares into gradients, one per example; 0 for an example without weight.

    Args:
        batch: The batch that the loss is computed on.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        weight_fn: (batch) -> its weight in a mean; called with one example, `num_labels` for a mean over tokens.
        structure: Where the examples are, unless they are rows of tensors.

    >>> own_scale(torch.zeros(3, 2))
    tensor([3., 3., 3.], dtype=torch.float64)
    """
    structure = structure or BatchStructure()
    if weight_fn is not None and reduction != "sum":
        found = [float(weight_fn(example)) for example, _ in structure.parts(batch, 1)]
        weights = torch.tensor(found, dtype=torch.float64)
        return torch.where(weights > 0, weights.sum() / weights, 0.0)
    examples = structure.count(batch)
    return torch.full((examples,), 1 if reduction == "sum" else examples, dtype=torch.float64)


def check_reduction(reduction: Reduction) -> None:
    """Raise a ValueError unless the reduction is a mean or a sum."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; a loss is a 'mean' or a 'sum' over its examples.")
