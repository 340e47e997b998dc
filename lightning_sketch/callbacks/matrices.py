"""The curvature matrix that a monitor measures, made from a LightningModule and its batches."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian
from lightning_sketch.curvature.operator import CurvatureOperator
from lightning_sketch.gradients import num_examples, training_step_loss

KINDS = ("hessian", "ggn", "fisher")
_LOSSES_AGREE = 1e-3


def make_matrix(
    curvature: str,
    module: nn.Module,
    batches: Sequence[tuple[int, Any]],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    model_fn: Callable[[Any, Any], Any] | None,
    output_loss_fn: Callable[[Tensor, Any], Tensor] | None,
    weight_fn: Callable[[Any], float] | None,
    hvp: str,
    **options: Any,
) -> CurvatureOperator:
    """One of KINDS over batches that come behind their indices, by the module's own `training_step` by default."""

    def loss(module: nn.Module, indexed: tuple[int, Any]) -> Tensor:
        index, batch = indexed[0], copy.deepcopy(indexed[1])  # a step may change its batch in place
        return loss_fn(module, batch) if loss_fn else training_step_loss(module, batch, index)

    def weight(indexed: tuple[int, Any]) -> float:
        return (weight_fn or num_examples)(indexed[1])

    if curvature == "ggn":
        plain = [batch for _, batch in batches]
        return GGN(module, plain, model_fn, output_loss_fn, weight_fn=weight_fn or num_examples, **options)
    if curvature == "fisher":
        return EmpiricalFisher(loss, module, batches, weight_fn=weight, **options)
    return Hessian(loss, module, batches, weight_fn=weight, hvp=hvp, **options)


def check_loss(ggn: GGN, loss: Hessian) -> None:
    """Refuse a Gauss-Newton matrix of another loss than the one that is trained.

    Raises:
        ValueError: if the two mean losses differ.
    """
    ours, trained = ggn.loss(), loss.loss()
    if abs(ours - trained) > _LOSSES_AGREE * max(abs(ours), abs(trained)):
        raise ValueError(
            f"the Gauss-Newton matrix would be that of a loss of {ours:.6g}, but training_step returns {trained:.6g}; "
            "pass model_fn=lambda module, batch: output and output_loss_fn=lambda output, batch: loss."
        )
