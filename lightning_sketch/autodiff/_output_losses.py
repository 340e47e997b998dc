"""Losses as functions of a model's output, with their Hessians and roots of these.

    loss of an output z                                     Hessian H_z u
    cross-entropy, mean over the N labels                   (p ⊙ u - p (pᵀ u)) / N
    binary cross-entropy, mean over all M numbers           p (1 - p) ⊙ u / M
    squared error, mean over all M numbers                  2 u / M

p = softmax(z), or sigmoid(z). In cross-entropy, labels that are ignored are not among the N labels; labels enter the
Hessian through N only, and label smoothing not at all: it changes the target, which is linear in z. Square roots of
these Hessians: `output_roots`.

Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", Neural
Computation 14(7), doi:10.1162/08997660260028683, section 3.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sketch.autodiff.batches import has_labels, labels_of
from lightning_sketch.autodiff.output_roots import Draws, class_roots, roots_of_examples, separate_roots


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of logits: classes along the last axis, or along the second as in `F.cross_entropy`.

    Labels are whole numbers, or real ones in the shape of the output, the probabilities of the classes.

    Args:
        ignore_index: The value of labels to ignore.
        label_smoothing: The label smoothing, as in `F.cross_entropy`.
        shift: Whether each token predicts the label of the next one, as in a causal language model of Hugging Face.
        class_axis: The axis of the classes, 1 or -1, for an output in which both axes fit the labels.

    >>> loss, z = CrossEntropy(), torch.zeros(1, 2)
    >>> loss.hessian_matvec(z, (None, torch.tensor([0])), torch.tensor([[1.0, 0.0]]))
    tensor([[ 0.2500, -0.2500]])
    """

    ignore_index: int = -100
    _: KW_ONLY
    label_smoothing: float = 0.0
    shift: bool = False
    class_axis: int | None = None

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        labels = self._labels(batch)
        if labels.is_floating_point():
            labels = _of_shape(output, labels, "cross-entropy of probabilities")
            return F.cross_entropy(output, labels.to(output), label_smoothing=self.label_smoothing)
        logits = output.movedim(_class_axis(output, labels, self.class_axis), -1).flatten(0, -2)
        return F.cross_entropy(
            logits, labels.flatten(), ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )

    def hessian_matvec(self, output: Tensor, batch: Any, u: Tensor) -> Tensor:
        """Return H_z u, the Hessian of the mean loss at the output times u, in the shape of the output."""
        axis, counts = self._counts(output, self._labels(batch))
        p = output.detach().softmax(axis)
        hu = p * (u - (p * u).sum(axis, keepdim=True))
        number = counts.numel() if counts.is_floating_point() else counts.sum().clamp(min=1)
        return hu * (counts.to(hu) / number).unsqueeze(axis)

    def roots(self, output: Tensor, batch: Any, draws: Draws, counted: Tensor | None = None) -> Tensor:
        """Return vectors v at the output whose v vᵀ add up to the Hessian of each example's own loss.

        Args:
            output: The output z.
            batch: The batch, for its labels.
            draws: How many roots each example gets.
            counted: Which examples, or tokens, have a loss; None if the labels decide.

        Returns:
            The roots, (roots, *output.shape), in float64.
        """
        if output.ndim < 2 or output.shape[-1] == 1:
            raise ValueError(
                f"an output of shape {tuple(output.shape)} has one class, whose cross-entropy is zero; pass "
                "output_loss_fn='binary_cross_entropy' or 'squared_error'."
            )
        axis, counts = -1, counted
        if counted is None and has_labels(batch):
            axis, counts = self._counts(output, self._labels(batch))
        p = output.double().movedim(axis, -1).softmax(-1)
        return roots_of_examples(p, counts, draws, class_roots).movedim(-1, axis if axis < 0 else axis + 1)

    def _labels(self, batch: Any) -> Tensor:
        labels = labels_of(batch)
        if not self.shift:
            return labels
        if labels.is_floating_point() or labels.ndim < 2:
            raise ValueError(
                f"CrossEntropy(shift=True) needs integer labels of shape (examples, tokens), got {labels.dtype} of "
                f"shape {tuple(labels.shape)}; pass shift=False for other labels."
            )
        return F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)

    def _counts(self, output: Tensor, labels: Tensor) -> tuple[int, Tensor]:
        """Return the axis of the classes, and which labels are not ignored; for probabilities, their sums."""
        if labels.is_floating_point():
            total = _of_shape(output, labels, "cross-entropy of probabilities").sum(1)
            return 1, total * (1 - self.label_smoothing) + self.label_smoothing
        return _class_axis(output, labels, self.class_axis), labels.ne(self.ignore_index)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Mean binary cross-entropy of logits, as `F.binary_cross_entropy_with_logits`.

    Args:
        squeeze: Whether to accept an output (examples, 1) with labels (examples,).

    >>> BinaryCrossEntropy()(torch.zeros(1, 2), (None, torch.tensor([[0.0, 1.0]])))
    tensor(0.6931)
    """

    squeeze: bool = False

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        labels = _of_shape(output, labels_of(batch), "binary cross-entropy", self.squeeze)
        return F.binary_cross_entropy_with_logits(output, labels.to(output))

    def hessian_matvec(self, output: Tensor, batch: Any, u: Tensor) -> Tensor:
        """Return H_z u, the Hessian of the mean loss at the output times u, in the shape of the output."""
        p = output.detach().sigmoid()
        return u * p * (1 - p) / output.numel()

    def roots(self, output: Tensor, batch: Any, draws: Draws, counted: Tensor | None = None) -> Tensor:
        """Return vectors v at the output whose v vᵀ add up to the Hessian of each example's own loss.

        Args:
            output: The output z.
            batch: The batch, for its labels.
            draws: How many roots each example gets.
            counted: Which examples, or tokens, have a loss; None if the labels decide.

        Returns:
            The roots, (roots, *output.shape), in float64.
        """
        p = output.double().sigmoid()
        return roots_of_examples((p * (1 - p)).sqrt(), counted, draws, separate_roots)


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error, as `F.mse_loss`.

    Args:
        squeeze: Whether to accept an output (examples, 1) with labels (examples,).

    >>> SquaredError()(torch.zeros(1, 2), (None, torch.tensor([[0.0, 2.0]])))
    tensor(2.)
    """

    squeeze: bool = False

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        return F.mse_loss(output, _of_shape(output, labels_of(batch), "squared error", self.squeeze).to(output))

    def hessian_matvec(self, output: Tensor, batch: Any, u: Tensor) -> Tensor:
        """Return H_z u, the Hessian of the mean loss at the output times u, in the shape of the output."""
        return u * (2 / output.numel())

    def roots(self, output: Tensor, batch: Any, draws: Draws, counted: Tensor | None = None) -> Tensor:
        """Return vectors v at the output whose v vᵀ add up to the Hessian of each example's own loss.

        Args:
            output: The output z.
            batch: The batch, for its labels.
            draws: How many roots each example gets.
            counted: Which examples, or tokens, have a loss; None if the labels decide.

        Returns:
            The roots, (roots, *output.shape), in float64.
        """
        constant = torch.full_like(output, 2**0.5, dtype=torch.float64)
        return roots_of_examples(constant, counted, draws, separate_roots)


def _of_shape(output: Tensor, labels: Tensor, what: str, squeeze: bool = False) -> Tensor:
    """Return the labels in the shape of the output, or refuse them."""
    if squeeze and output.shape == (*labels.shape, 1):
        return labels.unsqueeze(-1)
    if labels.shape != output.shape:
        raise ValueError(
            f"{what} compares equal shapes, got output {tuple(output.shape)} and labels {tuple(labels.shape)}; reshape "
            "one, or pass output_loss_fn=lambda output, batch: ..."
        )
    return labels


def _class_axis(output: Tensor, labels: Tensor, asked: int | None) -> int:
    """Return the axis of the classes, 1 or -1: the one that was asked for if both fit the labels."""
    axes = [axis for axis in (1, -1) if output.ndim > 1 and output.select(axis, 0).shape == labels.shape]
    axes = [axis for axis in axes if asked in (None, axis)] or axes
    if output.ndim == 2:
        axes = axes[:1]  # the same axis twice
    if len(axes) == 1 and output.shape[axes[0]] == 1:
        raise ValueError(
            f"an output of shape {tuple(output.shape)} has one class, whose cross-entropy is zero; for two pass "
            "output_loss_fn='binary_cross_entropy'."
        )
    if len(axes) != 1:
        raise ValueError(
            f"found {len(axes)} axes of classes in an output of shape {tuple(output.shape)} for labels of shape "
            f"{tuple(labels.shape)}; pass output_loss_fn=CrossEntropy(class_axis=-1) or 1, or a function."
        )
    return axes[0]
