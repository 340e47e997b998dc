"""Losses as functions of a model's output, with their Hessian in closed form.

    cross-entropy, mean over the N labels that count:     H_z u = (p ⊙ u - p (pᵀ u)) / N,    p = softmax(z)
    squared error, mean over all M numbers:               H_z u = 2 u / M

In the first, labels enter through N only, and label smoothing not at all: it moves the target, which is
linear in z.

Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", Neural
Computation 14(7), doi:10.1162/08997660260028683, section 3.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_sketch.autodiff.batches import labels_of


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of logits: classes along the last axis, or along the second as in `F.cross_entropy`.

    >>> import torch
    >>> loss, z = CrossEntropy(), torch.zeros(1, 2)
    >>> loss.hessian_matvec(z, (None, torch.tensor([0])), torch.tensor([[1.0, 0.0]]))
    tensor([[ 0.2500, -0.2500]])
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The loss, a scalar."""
        labels = labels_of(batch)
        logits = output.movedim(_class_axis(output, labels), -1).flatten(0, -2)
        return F.cross_entropy(
            logits, labels.flatten(), ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )

    def hessian_matvec(self, output: Tensor, batch: Any, u: Tensor) -> Tensor:
        """H_z u, in the shape of the output."""
        labels = labels_of(batch)
        axis = _class_axis(output, labels)
        counts = labels.ne(self.ignore_index)
        p = output.detach().softmax(axis)
        hu = p * (u - (p * u).sum(axis, keepdim=True))
        return hu * (counts.to(hu) / counts.sum().clamp(min=1)).unsqueeze(axis)


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error, as `F.mse_loss`."""

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The loss, a scalar."""
        labels = labels_of(batch)
        if labels.shape != output.shape:
            raise ValueError(
                f"squared error compares equal shapes, got output {tuple(output.shape)} and labels "
                f"{tuple(labels.shape)}; reshape one, or pass output_loss_fn=lambda output, batch: ..."
            )
        return F.mse_loss(output, labels)

    def hessian_matvec(self, output: Tensor, batch: Any, u: Tensor) -> Tensor:
        """H_z u, in the shape of the output."""
        return u * (2 / output.numel())


def usual_loss(batch: Any) -> CrossEntropy | SquaredError:
    """Cross-entropy where labels are whole numbers, squared error where they are real.

    Raises:
        ValueError: if the labels are probabilities, so that either may be meant.
    """
    labels = labels_of(batch)
    if not labels.is_floating_point():
        return CrossEntropy()
    if labels.ndim > 1 and labels.shape[1] > 1 and (labels >= 0).all() and (labels.sum(1) - 1).abs().max() < 1e-3:
        raise ValueError(
            "the labels are probabilities; say what the loss is: output_loss_fn=SquaredError(), or "
            "lambda output, batch: F.cross_entropy(output, batch[1])."
        )
    return SquaredError()


def _class_axis(output: Tensor, labels: Tensor) -> int:
    axes = [axis for axis in (1, -1) if output.ndim > 1 and output.select(axis, 0).shape == labels.shape]
    if output.ndim == 2:
        axes = axes[:1]  # the same axis twice
    if len(axes) == 1 and output.shape[axes[0]] == 1:
        raise ValueError(
            f"an output of shape {tuple(output.shape)} has one class, whose cross-entropy is zero; for two pass "
            "output_loss_fn=lambda output, batch: F.binary_cross_entropy_with_logits(...)."
        )
    if len(axes) != 1:
        raise ValueError(
            f"found {len(axes)} axes of classes in an output of shape {tuple(output.shape)} for labels of shape "
            f"{tuple(labels.shape)}; pass output_loss_fn=lambda output, batch: F.cross_entropy(...)."
        )
    return axes[0]
