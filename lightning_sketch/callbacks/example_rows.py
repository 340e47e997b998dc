"""The rows of the examples of a training batch, from the backward pass that trains anyway."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._compat import Trainer, loss_scale, muted_loggers
from lightning_sketch.attribution import SketchedGradients
from lightning_sketch.attribution.rows import UNKNOWN_ID
from lightning_sketch.callbacks.step_rows import one_rate
from lightning_sketch.gradients import (
    differentiable,
    fingerprint,
    num_examples,
    own_scale,
    training_step_loss,
    undisturbed,
)
from lightning_sketch.gradients.checks import hooks_fail
from lightning_sketch.gradients.hooks import ExampleHooks
from lightning_sketch.gradients.sinks import SketchSink
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.params import Layout

_SUM_AGREES = 5e-2


def served_layout(
    trainer: Trainer,
    module: nn.Module,
    layout: Layout,
    batch: Any,
    weight_fn: Callable[[Any], float] | None,
    reduction: str,
) -> tuple[Layout, dict[str, str]]:
    """The parameters whose gradients hooks split into examples, and the others with the reason; told by a first batch.

    Raises:
        MisconfigurationException: if there are none of the first.
        ValueError: if the module is compiled.
    """

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return training_step_loss(module, copy.deepcopy(batch))

    parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
    with muted_loggers(trainer), undisturbed(module):
        scale = own_scale(batch, reduction, weight_fn)
        left_out = hooks_fail(module, differentiable(batch), parameters, loss_fn, scale)
    left_out = trainer.strategy.broadcast(left_out)
    kept = [(name, shape) for name, shape in zip(layout.names, layout.shapes, strict=True) if name not in left_out]
    if not kept:
        raise MisconfigurationException(
            f"no gradient of {type(module).__name__} can be split into examples: {next(iter(left_out.values()))}. Use "
            "per='step', or write rows at checkpoints: trainer.validate(model, train_loader)."
        )
    if left_out:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
        warnings.warn(f"rows leave out {len(left_out)} of {len(layout.names)} parameters:{listed}", stacklevel=2)
    return Layout(*zip(*kept, strict=True)), left_out


class TrainingExamples:
    """Watches the backward passes of training; gives a row per example, in the mode and precision of training.

    Args:
        module: that is trained.
        layout: of the served parameters.
        sketch: of the layout's vector.
        weight_fn: batch -> its weight in a mean.
        reduction: "mean" or "sum".
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        sketch: Sketch,
        weight_fn: Callable[[Any], float] | None,
        reduction: str,
    ):
        self.layout, self.sketch, self.weight_fn, self.reduction = layout, sketch, weight_fn, reduction
        self.parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        self.hooks = ExampleHooks(module, self.parameters)
        self.sink = SketchSink(sketch, layout, self.parameters)
        self.checked = False
        self.batch: tuple[Any, Tensor] | None = None

    def begin_batch(self, batch: Any, ids: Tensor) -> None:
        """From here to the end of the backward pass hooks are on.

        Raises:
            MisconfigurationException: if it is not known which examples these are.
        """
        if (ids == UNKNOWN_ID).any():
            raise MisconfigurationException(
                "per='example' needs to know which example each row is of: pass index_key=... for a number that "
                "the batch holds, index_key='hash' for numbers made of the contents, or wrap the data set in "
                "IndexedDataset."
            )
        self.batch = copy.copy(batch), ids
        examples = num_examples(batch)
        self.sink.start(examples)
        self.hooks.attach(self.sink, examples)

    def before_backward(self, loss: Tensor) -> None:
        """The loss that goes backward."""
        if self.batch is not None:
            self.hooks.before_backward(loss)

    def done(self, trainer: Trainer) -> SketchedGradients | None:
        """After the backward pass: the rows of the batch's examples.

        Raises:
            MisconfigurationException: on the first batch, if the shares do not add up to the gradient in training mode.
        """
        if self.batch is None:
            return None
        (batch, ids), self.batch = self.batch, None
        shares = self.sink.rows()
        self.hooks.detach()
        if not self.checked and trainer.world_size == 1:
            self._check_sum(shares)
        self.checked = True
        scale = own_scale(batch, self.reduction, self.weight_fn) * trainer.accumulate_grad_batches / loss_scale(trainer)
        count = len(ids)
        rate = one_rate([group for optimizer in trainer.optimizers for group in optimizer.param_groups])
        columns = {
            "example_id": ids,
            "step": torch.full((count,), trainer.global_step + 1),
            "epoch": torch.full((count,), trainer.current_epoch),
            "lr": torch.full((count,), rate),
            "fingerprint": torch.full((count,), fingerprint(list(self.parameters.values()))),
        }
        return SketchedGradients((shares * scale.to(shares)[:, None]).float().cpu(), self.sketch, columns)

    def stop(self) -> None:
        """Take all hooks away."""
        self.batch = None
        self.hooks.detach()

    def _check_sum(self, shares: Tensor) -> None:
        """The first batch's gradient is all there is in `.grad`."""
        whole = self.layout.sketch(self.sketch, {name: p.grad for name, p in self.parameters.items()})
        if not (shares.sum(0) - whole).norm() <= _SUM_AGREES * whole.norm() and whole.isfinite().all():
            raise MisconfigurationException(
                "the shares of the examples do not add up to the gradient in training mode, though they do in "
                "evaluation mode: a part of the module works differently there. Use per='step', or write rows at "
                "checkpoints: trainer.validate(model, train_loader)."
            )
