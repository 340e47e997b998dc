"""The rows of the examples of a training batch, from the backward pass that trains anyway."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, loss_scale
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import training_step_loss
from lightning_sketch.callbacks._optimizers import groups_of_step, one_rate
from lightning_sketch.callbacks.gradient_sketch_writer._fallback import SecondPass
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import DuplicateFinder
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.example_sketches import ExampleSketches
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.reduction import own_scale
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, SketchedGradients

_SUM_AGREES = 5e-2


@dataclass(frozen=True, eq=False)
class _Batch:
    """What is known of a batch before its forward pass: its examples' numbers and factors, and the second pass."""

    ids: Int[Tensor, " examples"]
    padded: Bool[Tensor, " examples"]
    scale: Float[Tensor, " examples"]
    second: Float[Tensor, "examples dim"] | None


class TrainingExamples:
    """Watches the backward passes of training; gives a row per example, in the mode and precision of training.

    Args:
        trainer: that trains,
        module: this.
        layout: of the parameters that rows cover.
        sketch: of the layout's vector.
        weight_fn: batch -> its weight in a mean.
        reduction: "mean" or "sum".
        structure: how many examples a batch has, and where.
        fallback: engine of a second pass, or None,
        left: for these parameters, by name, which hooks leave.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: nn.Module,
        layout: Layout,
        sketch: Sketch,
        weight_fn: Callable[[Any], float] | None,
        reduction: str,
        structure: BatchStructure,
        fallback: str | None,
        left: Collection[str],
    ):
        self.layout, self.sketch, self.weight_fn, self.reduction = layout, sketch, weight_fn, reduction
        self.structure = structure
        self.weights = layout.parameters(module)
        named = zip(layout.names, self.weights, strict=True)
        self.parameters = {name: p for name, p in named if name not in left}
        self.second = None
        if left and fallback is not None:
            own = ExampleSketches(
                module,
                layout,
                sketch=sketch,
                loss_fn=training_step_loss,
                engine=fallback,
                weight_fn=weight_fn,
                reduction=reduction,
                names=left,
                structure=structure,
            )
            self.second = SecondPass(trainer, own)
        self.hooks = ExampleHooks(module, self.parameters)
        self.accumulator = SketchAccumulator(sketch, layout, parameters=self.parameters)
        self.checked, self.reasons = False, None
        self.batch: _Batch | None = None
        self.epoch, self.copies = -1, DuplicateFinder(None, 0)

    def begin_batch(self, trainer: Trainer, batch: Any, ids: Tensor, wanted: bool) -> None:
        """If it is wanted: a second pass now, and from here to the end of the backward pass hooks are on.

        Raises:
            MisconfigurationException: if it is not known which examples these are.
        """
        if (ids == UNKNOWN_ID).any():
            raise MisconfigurationException(
                "per='example' needs to know which example each row is of: pass index_key=... for a number that "
                "the batch holds, index_key='hash' for numbers made of the contents, or wrap the data set in "
                "IndexedDataset."
            )
        if self.epoch != trainer.current_epoch:
            self.epoch, self.copies = (
                trainer.current_epoch,
                DuplicateFinder(trainer.train_dataloader, trainer.global_rank),
            )
        padded = self.copies.among(len(ids))
        if not wanted:
            return
        scale = own_scale(batch, self.reduction, self.weight_fn, self.structure)
        self.batch = _Batch(ids, padded, scale, None if self.second is None else self.second(batch))
        examples = self.structure.count(batch)
        self.accumulator.start(examples)
        self.hooks.attach(self.accumulator, examples)

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
        one, self.batch = self.batch, None
        shares = self.accumulator.rows()
        self.hooks.detach()
        self._check_reasons()
        if self.parameters and not self.checked:
            self.checked = self._check_sum(trainer, shares)
        factor = (one.scale * trainer.accumulate_grad_batches / loss_scale(trainer)).to(shares)
        rows = (shares * factor[:, None]).float().cpu()
        if one.second is not None:
            rows += one.second.float().cpu()
        count = len(one.ids)
        rate = one_rate(groups_of_step(trainer, trainer.optimizers))
        columns = {
            "example_id": one.ids,
            "padded": one.padded,
            "step": torch.full((count,), trainer.global_step + 1),
            "epoch": torch.full((count,), trainer.current_epoch),
            "lr": torch.full((count,), rate),
            "fingerprint": torch.full((count,), fingerprint(self.weights)),
        }
        return SketchedGradients(rows, self.sketch, columns)

    def stop(self) -> None:
        """Take all hooks away."""
        self.batch = None
        self.hooks.detach()

    def _check_reasons(self) -> None:
        """What the first batch could be split in, a later one may not be: it may take another way through the module.

        The checks of the first batch have shown that what hooks did not see of it was nothing.
        """
        if self.reasons is None:
            self.reasons = set(self.hooks.reasons)
        more = {name: reason for name, reason in self.hooks.reasons.items() if name not in self.reasons}
        if more:
            self.reasons |= set(more)
            listed = "".join(f"\n  {name}: {reason}" for name, reason in more.items())
            warnings.warn(f"from this batch on rows may lack a part of {len(more)} parameters:{listed}", stacklevel=2)

    def _check_sum(self, trainer: Trainer, shares: Tensor) -> bool:
        """The first batch's gradient is all there is in `.grad`; while a loss scale is too large it says nothing."""
        total = shares.sum(0)
        if trainer.world_size > 1:
            # Of this rank, or of all, or compressed?
            if trainer.accumulate_grad_batches > 1 or getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
                return True
            total = trainer.strategy.reduce(total, reduce_op="mean")
        whole = self.layout.sketch(self.sketch, {name: p.grad for name, p in self.parameters.items()})
        if not whole.isfinite().all():
            return False
        if not (total - whole).norm() <= _SUM_AGREES * whole.norm():
            raise MisconfigurationException(
                "the shares of the examples do not add up to the gradient in training mode, though they do in "
                "evaluation mode: a part of the module works differently there. Use per='step', or write rows at "
                "checkpoints: trainer.validate(model, train_loader)."
            )
        return True
