"""Losses of a module: the loss of its `training_step`, and the loss as a function of its output.

The Gauss-Newton matrix needs the loss as a function of the output; `OutputModel` finds out which function it is, and
compares it with the loss that is trained. The functions are here too, with their Hessians:

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

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF, copied, has_labels, labels_of
from lightning_sketch.autodiff.functional import following
from lightning_sketch.autodiff.output_roots import (
    Draws,
    Root,
    class_roots,
    label_less_mean,
    separate_roots,
    token_weights,
)


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of logits: classes along the last axis, or along the second as in `F.cross_entropy`.

    Labels are whole numbers, or real ones in the shape of the output, the probabilities of the classes.

    Args:
        ignore_index: The value of labels to ignore.
        label_smoothing: The label smoothing, as in `F.cross_entropy`.
        shift: Whether each token predicts the label of the next one, as in a causal language model of Hugging Face.
        class_axis: The axis of the classes, 1 or -1, for an output in which both axes fit the labels.
        labels_fn: batch -> the labels, if they are not the batch's "labels" or last item, or if padding is marked
            elsewhere: `lambda batch: batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)`.

    >>> loss, z = CrossEntropy(), torch.zeros(1, 2)
    >>> loss.hessian_matvec(z, (None, torch.tensor([0])), torch.tensor([[1.0, 0.0]]))
    tensor([[ 0.2500, -0.2500]])
    """

    ignore_index: int = -100
    _: KW_ONLY
    label_smoothing: float = 0.0
    shift: bool = False
    class_axis: int | None = None
    labels_fn: Callable[[Any], Tensor] | None = None

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

    def roots(self, output: Tensor, batch: Any, draws: Draws) -> Iterable[Root]:
        """Return vectors v at the output whose v vᵀ add up to the Hessian of each example's own mean loss.

        Args:
            output: The output z, of which the roots keep nothing.
            batch: The batch, for its labels; if it has none, every output has a loss.
            draws: How many roots each example gets.
        """
        if output.ndim < 2 or output.shape[-1] == 1:
            raise ValueError(
                f"an output of shape {tuple(output.shape)} has one class, whose cross-entropy is zero; pass "
                "output_loss_fn='binary_cross_entropy' or 'squared_error'."
            )
        axis, counts = -1, None
        if self.labels_fn is not None or has_labels(batch):
            axis, counts = self._counts(output, self._labels(batch))
        logits = output.detach().movedim(axis, -1)
        return class_roots(logits, axis, token_weights(logits.shape[:-1], counts), draws)

    def _labels(self, batch: Any) -> Tensor:
        labels = (self.labels_fn or labels_of)(batch)
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

    def roots(self, output: Tensor, batch: Any, draws: Draws) -> Iterable[Root]:
        """Return vectors v at the output whose v vᵀ add up to the Hessian of each example's own mean loss.

        Args:
            output: The output z, of which the roots keep nothing.
            batch: The batch, of which nothing is used.
            draws: How many roots each example gets.
        """
        weights = token_weights(_tokens(output), None)
        return separate_roots(output, weights, draws, lambda z: (z.sigmoid() * (-z).sigmoid()).sqrt_())


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

    def roots(self, output: Tensor, batch: Any, draws: Draws) -> Iterable[Root]:
        """Return vectors v at the output whose v vᵀ add up to the Hessian of each example's own mean loss.

        Args:
            output: The output z, of which the roots keep nothing.
            batch: The batch, of which nothing is used.
            draws: How many roots each example gets.
        """
        weights = token_weights(_tokens(output), None)
        return separate_roots(output, weights, draws, lambda z: torch.full_like(z, 2**0.5))


def _tokens(output: Tensor) -> tuple[int, ...]:
    """Return the shape of an output without its last axis, unless that is the only one."""
    return output.shape[: max(1, output.ndim - 1)]


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


# (module, batch) -> mean loss of the batch, a scalar.
LossFn = Callable[[nn.Module, Any], Tensor]

OutputLoss = CrossEntropy | BinaryCrossEntropy | SquaredError

# Losses of an output that can be asked for by name.
Compare = Literal["gradient", "value"] | None  # with the loss that is trained
OutputLossName = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
OUTPUT_LOSSES: dict[OutputLossName, OutputLoss] = {
    "cross_entropy": CrossEntropy(),
    "binary_cross_entropy": BinaryCrossEntropy(),
    "squared_error": SquaredError(),
}

# Two losses are taken for equal if they differ by less, relative to the larger; the second is for half precision.
_AGREE, _AGREE_HALF = 1e-3, 2e-2

# The same for their gradients, whose rounding is larger.
_GRADIENTS_AGREE, _GRADIENTS_AGREE_HALF = 1e-2, 1e-1

# A gradient that is smaller than this, relative to the loss, is rounding.
_FLAT = 1e-6


def training_step_loss(module: nn.Module, batch: Any, *, batch_idx: int = 0) -> Tensor:
    """Return the loss that the module's own `training_step` returns, without its logging.

    Args:
        module: A LightningModule, or any module with a `training_step`.
        batch: The batch.
        batch_idx: The index of the batch, for a step that takes it.

    Returns:
        The loss, a scalar with a graph where gradients are on.

    Raises:
        ValueError: if the step uses manual optimization, fetches its own batches, or returns no loss.
        RuntimeError: if the step fails; the message names its error.

    >>> class Model(nn.Linear):
    ...     def training_step(self, batch):
    ...         return self(batch).square().mean()
    >>> training_step_loss(Model(3, 2), torch.ones(4, 3)).shape
    torch.Size([])
    """
    step = cast(Callable[..., Any], module.training_step)
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} uses manual optimization, so its training_step has side effects and need not "
            "return a loss; pass loss_fn=lambda module, batch: ..."
        )
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            "training_step(dataloader_iter) fetches its own batches; pass loss_fn=lambda module, batch: ..."
        )
    with _silent(module):
        try:
            output = call_step(step, batch, batch_idx)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            mode = "training" if module.training else "evaluation"
            raise RuntimeError(
                f"training_step of {type(module).__name__} failed when called for its loss, in {mode} mode: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Pass loss_fn=lambda module, batch: ..."
            ) from error
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ValueError(
            f"training_step of {type(module).__name__} returned no loss for this batch; return a scalar, "
            "or pass loss_fn=lambda module, batch: ..."
        )
    return loss


def call_step(step: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a step with as many of the positional arguments as it takes, as Lightning does; `batch_idx` is optional."""
    parameters = inspect.signature(step).parameters.values()
    if any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters):
        return step(*args, **kwargs)
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return step(*args[: len(places)], **kwargs)


def on_copies(loss_fn: LossFn) -> LossFn:
    """Return the same loss on a copy of the batch, without logging, for a step that is called once more than it trains.

    A step may change its batch in place.
    """

    def on_copy(module: nn.Module, batch: Any) -> Any:
        with _silent(module), following(module):
            return loss_fn(module, copied(batch))

    return on_copy


def call_model(module: nn.Module, batch: Any) -> Any:
    """Call a module on a batch in the usual way.

    That is `module(**batch)` for a mapping, without the keys that `forward` does not take, or `module(batch)` where
    `forward` takes the batch itself; else `module(x)` with x the first item of the batch. For a LightningModule without
    `forward`, its only child that has parameters is called; of a subspace, the module inside.

    Raises:
        ValueError: if the module cannot be called so; the message names `model_fn`.
    """
    part: Any = module.module if hasattr(type(module), "following") else module  # a subspace takes any arguments
    callee = part if _has_forward(part) else _only_child(part)
    try:
        with following(module):
            return _call(callee, batch)
    except TypeError as error:
        keys = (
            ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"the first item of a {type(batch).__name__}"
        )
        raise ValueError(
            f"{type(callee).__name__} cannot be called with {keys}: {error}. Pass model_fn=lambda module, batch: "
            "output."
        ) from error


def _call(callee: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return callee(batch[0] if isinstance(batch, list | tuple) else batch)
    parameters = inspect.signature(callee.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return callee(**batch)
    if len(required) == 1 and required[0] not in batch:
        return callee(batch)
    return callee(**{name: value for name, value in batch.items() if name in parameters})


def _has_forward(module: nn.Module) -> bool:
    """Return whether the module or its class defines `forward`, not only `nn.Module` or LightningModule."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    of_lightning = owner.__name__ == "LightningModule" and owner.__module__.split(".")[0].endswith("lightning")
    return "forward" in vars(module) or not (owner is nn.Module or of_lightning)


def _only_child(module: nn.Module) -> nn.Module:
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    if len(children) == 1:
        return next(iter(children.values()))
    raise ValueError(
        f"{type(module).__name__} has no forward, and {len(children)} children with parameters "
        f"({', '.join(children) or 'none'}), so that it is not clear what its output is; pass "
        "model_fn=lambda module, batch: output."
    )


class OutputModel:
    """A module split into its output and a loss of that output; the one place that decides which loss it is.

    It is the loss that is given. By default it is the loss that a Hugging Face model returns beside its logits, or the
    loss of `OUTPUT_LOSSES` that has the value of the loss that is trained; if that loss is unknown, cross-entropy for
    whole-number labels and squared error for real ones. A default is compared, on every batch, with the loss that is
    trained.

    Args:
        module: The module.
        model_fn: (module, batch) -> output; `call_model` by default.
        output_loss_fn: A name of `OUTPUT_LOSSES`, or (output, batch) -> mean loss.
        loss_fn: The loss that is trained, (module, batch) -> mean loss; the module's `training_step` if None.

    Attributes:
        given: The loss that was given, as a function (output, batch) -> mean loss, or None.

    Raises:
        ValueError: if the name is unknown.
    """

    def __init__(
        self,
        module: nn.Module,
        model_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_loss_fn: OutputLossName | Callable[[Tensor, Any], Tensor] | None = None,
        loss_fn: LossFn | None = None,
    ):
        if isinstance(output_loss_fn, str):
            if output_loss_fn not in OUTPUT_LOSSES:
                known = ", ".join(map(repr, OUTPUT_LOSSES))
                raise ValueError(f"output_loss_fn={output_loss_fn!r} is not known; use one of {known}, or a function.")
            output_loss_fn = OUTPUT_LOSSES[output_loss_fn]
        self.module, self.model_fn, self.given = module, model_fn or call_model, output_loss_fn
        by_step = training_step_loss if hasattr(module, "training_step") else None
        self.loss_fn = loss_fn or by_step
        self._chosen: OutputLoss | None = None

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the loss that the model itself returns beside it, or None.

        Raises:
            ValueError: if the output is not a tensor.
        """
        with following(self.module):
            returned = self.model_fn(self.module, batch)
        output, own = _entry(returned, "logits", returned), _entry(returned, "loss", None)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the model returned a {type(returned).__name__}; pass model_fn=lambda module, batch: ... that returns "
                "its output as one tensor."
            )
        return output, own if isinstance(own, Tensor) else None

    def loss_of(
        self, output: Tensor, own: Tensor | None, batch: Any, *, compare: bool = True
    ) -> Callable[[Tensor, Any], Tensor] | None:
        """Return the loss as a function (output, batch), or None if it is known only as the tensor the model returned.

        Args:
            output: The output for the batch; with a graph if `compare`.
            own: The loss that the model returned, if any; with a graph too.
            batch: The batch; a step gets a copy of it.
            compare: Whether to compare a default with the loss that is trained, by its value and by its gradient. This
                costs about one gradient.

        Raises:
            ValueError: if the loss is not the one that is trained, or it is ambiguous which one that is.
        """
        if self.given is not None:
            return self.given
        if not compare and (own is not None or self._chosen is not None):
            return self._chosen
        trained = self._trained(batch)
        if own is None:
            return self._find(output, batch, trained)
        if trained is not None:
            difference = self._difference(self._gradient(own), trained, output)
            if difference:
                raise ValueError(self._mismatch(difference, trained.value))
        return None

    def output_and_loss(self, batch: Any, *, compare: Compare = "gradient") -> tuple[Tensor, OutputLoss]:
        """Return the output for the batch, without a graph, and its loss, one of `OUTPUT_LOSSES` unless it is given.

        A default is compared with the loss that is trained, or else with the one that the model itself returns. One
        graph at a time, and beside the output and its gradient one tensor of this size.

        Args:
            batch: The batch.
            compare: What is compared of every batch: "gradient", and with it the value; "value" alone, but for the
                first batch, which saves two backward passes; None for batches that were compared before.

        Raises:
            ValueError: if the loss is not the one that is trained, or it is ambiguous which one that is.
        """
        with torch.enable_grad():  # without gradients bitsandbytes drops those of its layers
            if self.given is not None:
                return self.forward(batch)[0].detach(), cast(OutputLoss, self.given)
            if compare is None and self._chosen is not None:
                return self.forward(batch)[0].detach(), self._chosen
            if compare == "value" and self._chosen is not None and self.loss_fn is not None:
                known = _Gradient(float(self._trained_loss(batch).detach().mean()))
                output = self.forward(batch)[0].detach()
                return output, self._find(output, batch, known)
            trained = self._trained(batch)
            output, own = self.forward(batch)
            if trained is None and own is not None:
                del output
                trained = self._gradient(own)
                output = self.forward(batch)[0]
            del own  # and its graph
            loss = self._find(output, batch, trained)
        return output.detach(), loss

    def _find(self, output: Tensor, batch: Any, trained: "_Gradient | None") -> OutputLoss:
        """Return the loss of `OUTPUT_LOSSES`, with its options, that is the one that is trained."""
        if trained is None:
            self._chosen = self._chosen or usual_loss(batch)
            return self._chosen
        z = output.detach()
        values = {self._chosen: float(self._chosen(z, batch).mean())} if self._chosen else loss_values(z, batch)
        agreeing = [loss for loss, value in values.items() if _agree(value, trained.value, self._half(z))]
        if not agreeing:
            listed = " or ".join(f"{value:.6g} ({_name(loss)})" for loss, value in values.items())
            raise ValueError(self._mismatch(listed or "no known kind, which none fits the labels", trained.value))
        if math.isnan(trained.value):  # no labels: the roots of any loss are zero, and which one it is remains open
            return agreeing[0]
        differences = {loss: self._difference(self._at(output, loss, batch), trained, output) for loss in agreeing}
        found = [loss for loss, difference in differences.items() if not difference]
        if not found:
            raise ValueError(self._mismatch(differences[agreeing[0]], trained.value))
        if len(found) > 1:
            raise ValueError(
                f"{' and '.join(dict.fromkeys(map(_name, found)))} both have the value and the gradient of the loss "
                f"that is trained, {trained.value:.6g}, so that it is ambiguous which one it is; pass output_loss_fn, "
                "such as 'cross_entropy' or lightning_sketch.curvature.CrossEntropy(shift=True)."
            )
        self._chosen = found[0]
        return found[0]

    def _difference(self, mine: "_Gradient", trained: "_Gradient", output: Tensor) -> str:
        """Return how a loss of this output differs from the one that is trained, in words; "" if it does not."""
        half = self._half(output)
        if not _agree(mine.value, trained.value, half):
            return f"{mine.value:.6g}"
        off = mine.relative_difference(trained)
        known = off <= (_GRADIENTS_AGREE_HALF if half else _GRADIENTS_AGREE)
        return "" if known else f"{mine.value:.6g} with a gradient that differs by {off:.1%}"

    def _at(self, output: Tensor, loss: OutputLoss, batch: Any) -> "_Gradient":
        """Return the value of a loss of the output, and its gradient if the output has a graph, which is kept."""
        weights, value = self._weights(), float(loss(output.detach(), batch).mean())
        if not (output.requires_grad and weights):
            return _Gradient(value)
        back = _gradient_at(output, loss, batch)
        return _Gradient(value, torch.autograd.grad(output, weights, back, retain_graph=True, allow_unused=True))

    def _gradient(self, loss: Tensor) -> "_Gradient":
        """Return the value of a loss, and its gradient if it has one; its graph is kept."""
        weights, value = self._weights(), float(loss.detach().mean())
        if not (loss.requires_grad and weights) or math.isnan(value):
            return _Gradient(value)
        with torch.enable_grad():
            mean = loss.mean()
        return _Gradient(value, torch.autograd.grad(mean, weights, retain_graph=True, allow_unused=True))

    def _weights(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _half(self, output: Tensor) -> bool:
        return output.dtype in HALF or any(p.dtype in HALF for p in self._weights())

    def _mismatch(self, found: str, trained: float) -> str:
        who = "training_step returns" if self.loss_fn is training_step_loss else "the loss that is trained is"
        return (
            f"the Gauss-Newton matrix would be of a loss of {found}, but {who} {trained:.6g}; pass "
            "model_fn=lambda module, batch: output, or output_loss_fn: a lightning_sketch.curvature.CrossEntropy with "
            "its ignore_index, shift or labels_fn (GGN also takes a function (output, batch) -> loss). With class "
            "weights pass 'cross_entropy': rows are of examples' own losses, in which class weights cancel. Pass it "
            "too if the curvature is the same, as with label smoothing or a regularizer of the weights."
        )

    def _trained(self, batch: Any) -> "_Gradient | None":
        """Return the value and the gradient of the loss that is trained, or None if it is unknown."""
        return None if self.loss_fn is None else self._gradient(self._trained_loss(batch))

    def _trained_loss(self, batch: Any) -> Tensor:
        """Return the loss that is trained, with its graph."""
        try:
            with torch.enable_grad():
                return cast(LossFn, self.loss_fn)(self.module, copied(batch))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "when called for its loss" not in str(error):
                raise
            raise ValueError(
                f"the loss of the output that is trained is unknown: {error} Or pass output_loss_fn, such as "
                "'cross_entropy'."
            ) from error


def usual_loss(batch: Any) -> OutputLoss:
    """Return cross-entropy for labels that are whole numbers, squared error for real ones.

    Raises:
        ValueError: if real labels are probabilities, or all of them 0 or 1, so that another loss may be meant.
    """
    labels = labels_of(batch)
    if not labels.is_floating_point():
        return CrossEntropy()
    if labels.ndim > 1 and labels.shape[1] > 1 and (labels >= 0).all() and (labels.sum(1) - 1).abs().max() < 1e-3:
        raise ValueError(
            "the labels are probabilities; say what the loss is: output_loss_fn=SquaredError(), CrossEntropy(), or "
            "lambda output, batch: F.cross_entropy(output, batch[1])."
        )
    if ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            "the labels are real numbers, all of them 0 or 1, of which binary cross-entropy or squared error may be "
            "meant; say which: output_loss_fn='binary_cross_entropy' or 'squared_error'."
        )
    return SquaredError()


def _name(loss: OutputLoss) -> str:
    if isinstance(loss, CrossEntropy):
        return "cross-entropy of the next token" if loss.shift else "cross-entropy"
    return "squared error" if isinstance(loss, SquaredError) else "binary cross-entropy"


def _agree(value: float, trained: float, half: bool) -> bool:
    both_nan = math.isnan(value) and math.isnan(trained)  # a batch without labels
    return both_nan or abs(value - trained) <= (_AGREE_HALF if half else _AGREE) * max(abs(value), abs(trained))


def loss_values(output: Tensor, batch: Any) -> dict[OutputLoss, float]:
    """Return the losses of `OUTPUT_LOSSES`, with their options, that these shapes allow, and their values."""
    labels, found = labels_of(batch), dict[OutputLoss, float]()
    classes: tuple[int | None, ...] = (
        (-1, 1) if output.ndim > 2 and output.select(1, 0).shape == output.select(-1, 0).shape else (None,)
    )
    if labels.is_floating_point():
        classes = (None,)
    entropies = [CrossEntropy(shift=shift, class_axis=axis) for axis in classes for shift in (False, True)]
    squeeze = output.shape == (*labels.shape, 1)
    losses: list[OutputLoss] = [*entropies, SquaredError(squeeze), BinaryCrossEntropy(squeeze)]
    for loss in losses:
        with contextlib.suppress(ValueError, IndexError, RuntimeError):  # labels of another kind or shape
            found[loss] = float(loss(output, batch))
    return found


@dataclass(frozen=True)
class _Gradient:
    """The value of a loss, and its gradient with respect to the trainable parameters, if it has one."""

    value: float
    parts: Sequence[Tensor | None] | None = None

    def relative_difference(self, other: "_Gradient") -> float:
        """Return the distance of the gradients relative to the other; 0 if one has none."""
        if self.parts is None or other.parts is None:
            return 0.0
        pairs = [(a, b) for a, b in zip(self.parts, other.parts, strict=True) if a is not None or b is not None]
        off = math.hypot(*(_distance(a, b) for a, b in pairs))
        size = math.hypot(*(_norm(b) for _, b in pairs if b is not None))
        return off / max(size, _FLAT * abs(other.value), torch.finfo(torch.float32).tiny)


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return _norm(cast(Tensor, one if other is None else other))
    return _norm(one.to_dense() - other.to_dense())


def _norm(gradient: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(gradient.to_dense(), dtype=torch.promote_types(gradient.dtype, torch.float32))
    )


def _gradient_at(output: Tensor, loss: OutputLoss, batch: Any) -> Tensor:
    """Return the gradient of a loss at the output; with labels, without a further tensor of its size."""
    z = output.detach()
    if isinstance(loss, CrossEntropy) and not loss.label_smoothing:
        labels = loss._labels(batch)
        if not labels.is_floating_point():
            axis, counts = loss._counts(z, labels)
            return label_less_mean(z, counts / -counts.sum(), labels.where(counts, 0), axis=axis)
    with torch.enable_grad():
        return torch.autograd.grad(loss(z.requires_grad_(), batch), z)[0]


def _entry(returned: Any, name: str, default: Any) -> Any:
    return returned.get(name, default) if isinstance(returned, Mapping) else getattr(returned, name, default)


@contextlib.contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Disable `log` and `log_dict` of every submodule: a second call would overwrite what the user logged."""
    parts = [part for part in module.modules() if hasattr(type(part), "log_dict")]
    names = ("log", "log_dict")
    before: list[dict[str, Any]] = [{n: vars(part)[n] for n in names if n in vars(part)} for part in parts]
    for part in parts:
        part.__dict__["log"] = part.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            del part.__dict__["log"], part.__dict__["log_dict"]
            part.__dict__.update(own)
