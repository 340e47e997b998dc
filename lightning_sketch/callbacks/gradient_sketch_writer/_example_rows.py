"""Rows for the examples of a training batch, computed during the backward pass of training."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, loss_scale
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import training_step_loss
from lightning_sketch.callbacks._optimizers import common_lr, param_groups
from lightning_sketch.callbacks.gradient_sketch_writer._fallback import Fallback, SecondPass
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import DuplicateFinder
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.example_sketches import ExampleSketches
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.reduction import Reduction, own_scale
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, Column, SketchedGradients, keys_of

_MAX_SUM_ERROR = 5e-2  # relative distance of the sum of the shares from the gradient


@dataclass(frozen=True, eq=False)
class _Batch:
    """Data of a batch that are computed before its forward pass.

    Attributes:
        ids: The ids of its examples.
        duplicate: Whether an example was added by a distributed sampler to even out the ranks.
        scale: The factors that turn shares of the batch's gradient into gradients of the examples' own losses.
        second: The rows of the second pass, or None if there is no such pass.
        own: The user's columns.
    """

    ids: Column
    duplicate: Bool[Tensor, " examples"]
    scale: Float[Tensor, " examples"]
    second: Float[Tensor, "examples dim"] | None
    own: Mapping[str, Column]


class TrainingExamples:
    """Compute a row per example during the backward passes of training, in the mode and precision of training.

    Args:
        trainer: The Trainer that runs the fit.
        module: The module that is trained.
        layout: The parameters that rows cover.
        sketch: The sketch of the layout's vector.
        weight_fn: batch -> its weight in a mean.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        structure: Counts and splits the examples of a batch.
        fallback: The engine of the second pass, or None for no such pass.
        unsupported: The names of the parameters that hooks do not support, which the second pass covers.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: nn.Module,
        layout: Layout,
        sketch: Sketch,
        weight_fn: Callable[[Any], float] | None,
        reduction: Reduction,
        structure: BatchStructure,
        fallback: Fallback | None,
        unsupported: Collection[str],
    ):
        self.layout, self.sketch, self.weight_fn, self.reduction = layout, sketch, weight_fn, reduction
        self.structure = structure
        self.weights = layout.parameters(module)
        named = zip(layout.names, self.weights, strict=True)
        self.parameters = {name: p for name, p in named if name not in unsupported}
        self.second: SecondPass | None = None
        if unsupported and fallback is not None:
            sketches = ExampleSketches(
                module,
                layout,
                sketch=sketch,
                loss_fn=training_step_loss,
                engine=fallback,
                weight_fn=weight_fn,
                reduction=reduction,
                names=unsupported,
                structure=structure,
            )
            self.second = SecondPass(trainer, sketches)
        self.hooks = ExampleHooks(module, self.parameters)
        self.accumulator = SketchAccumulator(sketch, layout, parameters=self.parameters)
        self.checked = False
        self.reasons: set[str] | None = None
        self.batch: _Batch | None = None
        self.epoch, self.duplicates = -1, DuplicateFinder(None, 0)

    def begin_batch(self, trainer: Trainer, batch: Any, ids: Column, own: Mapping[str, Column], recorded: bool) -> None:
        """Run the second pass and attach the hooks, if the batch is to be recorded.

        Args:
            trainer: The Trainer that runs the fit.
            batch: The batch.
            ids: The ids of its examples.
            own: The user's columns.
            recorded: Whether the batch gets rows.

        Raises:
            MisconfigurationException: If an example has no id.
        """
        if (keys_of(ids) == UNKNOWN_ID).any():
            raise MisconfigurationException(
                "per='example' needs an id for each example: pass index_key=... for one that the batch contains, "
                "index_key='hash' for hashes of the contents, or wrap the data set in IndexedDataset."
            )
        if self.epoch != trainer.current_epoch:
            self.epoch = trainer.current_epoch
            self.duplicates = DuplicateFinder(trainer.train_dataloader, trainer.global_rank)
        duplicate = self.duplicates.among(len(ids))
        if not recorded:
            return
        scale = own_scale(batch, self.reduction, self.weight_fn, self.structure)
        self.batch = _Batch(ids, duplicate, scale, None if self.second is None else self.second(batch), own)
        examples = self.structure.count(batch)
        self.accumulator.start(examples)
        self.hooks.attach(self.accumulator, examples)

    def before_backward(self, loss: Tensor) -> None:
        """Tell the hooks which loss is differentiated."""
        if self.batch is not None:
            self.hooks.before_backward(loss)

    def take_rows(self, trainer: Trainer) -> SketchedGradients | None:
        """Return the rows of the batch's examples after its backward pass; None if it is not recorded.

        Raises:
            MisconfigurationException: On the first batch, if the shares do not add up to the gradient in training mode.
        """
        if self.batch is None:
            return None
        batch, self.batch = self.batch, None
        shares = self.accumulator.rows()
        self.hooks.detach()
        self._check_reasons()
        if self.parameters and not self.checked:
            self.checked = self._check_sum(trainer, shares)
        factor = (batch.scale * trainer.accumulate_grad_batches / loss_scale(trainer)).to(shares)
        rows = (shares * factor[:, None]).float().cpu()
        if batch.second is not None:
            rows += batch.second.float().cpu()
        count = len(batch.ids)
        lr = common_lr(param_groups(trainer, trainer.optimizers))
        columns = {
            "example_id": batch.ids,
            "padded": batch.duplicate,
            "step": torch.full((count,), trainer.global_step + 1),
            "epoch": torch.full((count,), trainer.current_epoch),
            "lr": torch.full((count,), lr),
            "fingerprint": torch.full((count,), fingerprint(self.weights)),
            **batch.own,
        }
        return SketchedGradients(rows, self.sketch, columns)

    def stop(self) -> None:
        """Remove all hooks."""
        self.batch = None
        self.hooks.detach()

    def _check_reasons(self) -> None:
        """Warn of parameters that hooks support on the first batch but not on this one.

        A later batch may take another path through the module. What hooks miss of the first batch is zero, as its
        checks have shown.
        """
        if self.reasons is None:
            self.reasons = set(self.hooks.reasons)
        new = {name: reason for name, reason in self.hooks.reasons.items() if name not in self.reasons}
        if new:
            self.reasons |= set(new)
            listed = "".join(f"\n  {name}: {reason}" for name, reason in new.items())
            warnings.warn(f"from this batch on rows may lack a part of {len(new)} parameters:{listed}", stacklevel=2)

    def _check_sum(self, trainer: Trainer, shares: Tensor) -> bool:
        """Compare the sum of the first batch's shares with its gradient; return False while that is not finite."""
        total = shares.sum(0)
        if trainer.world_size > 1:
            # `.grad` may be of this rank or of all ranks, or compressed
            if trainer.accumulate_grad_batches > 1 or getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
                return True
            total = trainer.strategy.reduce(total, reduce_op="mean")
        whole = self.layout.sketch(self.sketch, {name: p.grad for name, p in self.parameters.items()})
        if not whole.isfinite().all():
            return False
        if not (total - whole).norm() <= _MAX_SUM_ERROR * whole.norm():
            raise MisconfigurationException(
                "the shares of the examples do not add up to the gradient in training mode, though they do in "
                "evaluation mode: a part of the module behaves differently there. Use per='step', or write rows at "
                "checkpoints: trainer.validate(model, train_loader)."
            )
        return True
