"""Rows for the examples of a training batch, computed during the backward pass of training."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, common_lr, loss_scale, muted_loggers, param_groups
from lightning_sketch.autodiff.batches import differentiable
from lightning_sketch.autodiff.fingerprint import Known, module_fingerprint_on_device
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import on_copies, training_step_loss
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.callbacks.gradient_sketch_writer._arriving import ArrivingRows
from lightning_sketch.callbacks.gradient_sketch_writer._examples import DuplicateFinder
from lightning_sketch.callbacks.gradient_sketch_writer._preconditioned import StepPreconditioner
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.example_sketches import ExampleSketches
from lightning_sketch.per_example.factors import Factor
from lightning_sketch.per_example.hooks import Accumulator, ExampleHooks
from lightning_sketch.per_example.verify import (
    by_reason,
    classes_of,
    disagreement,
    hooks_fail,
    tolerance,
    weighings_by_losses,
)
from lightning_sketch.per_example.weights import KnownWays, Weighing, Weighings
from lightning_sketch.store.sketched_gradients import NONE, OF_STEP, UNKNOWN_ID, Column, keys_of

Fallback = Literal["loop", "vmap"]  # engines of the second pass

# How the loss weighs examples is checked on this many batches from the first on, and on this share of the later ones:
# it costs four forward passes of an example, half of the batch's own with eight examples.
_ALL_CHECKED, _CHECKED_LATER = 32, 0.25

_MAX_SUM_ERROR = 5e-2  # relative distance of the sum of the shares from the gradient


@dataclass(frozen=True, eq=False)
class _Batch:
    """Data of a batch that are computed before its forward pass.

    Attributes:
        columns: The columns of its rows that are known by then.
        scale: The factors that turn shares of the batch's gradient into gradients of the examples' own losses.
        second: The rows of the second pass, or None if there is no such pass.
    """

    columns: Mapping[str, Column]
    scale: Float[Tensor, " examples"]
    second: Float[Tensor, "examples dim"] | None


@dataclass(frozen=True, eq=False)
class _Both:
    """Two accumulators that get the same factors."""

    first: Accumulator
    second: Accumulator

    def add(self, factor: Factor) -> None:
        """Add a factor to both."""
        self.first.add(factor)
        self.second.add(factor)


class TrainingExamples:
    """Compute a row per example during the backward passes of training, in the mode and precision of training.

    How the loss weighs the examples is found from the losses of two of them alone and together, on each of the first
    batches and on some of the later ones. A batch of which this fails is marked, with all rows after it; `doubt`
    becomes true, for those before it.

    Args:
        trainer: The Trainer that runs the fit.
        module: The module that is trained.
        layout: The parameters that rows cover.
        sketch: The sketch of the layout's vector.
        weighings: Lists the ways in which the loss may weigh the examples of a batch.
        fallback: The engine of the second pass, or None for no such pass.
        unsupported: The names of the parameters that hooks do not support, which the second pass covers.
        preconditioned: Whether gradients go through the preconditioner of the optimizer.

    Attributes:
        doubt: Whether the scale of the rows up to the last batch is in doubt; the caller sets it back to False.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: nn.Module,
        layout: Layout,
        sketch: Sketch,
        weighings: Weighings,
        fallback: Fallback | None,
        unsupported: Collection[str],
        preconditioned: bool = False,
    ):
        self.module, self.layout, self.sketch, self.weighings = module, layout, sketch, weighings
        self.structure = weighings.structure
        named = zip(layout.names, layout.parameters(module), strict=True)
        self.parameters = {name: p for name, p in named if name not in unsupported}
        self.second: ExampleSketches | None = None
        if unsupported and fallback is not None:
            self.second = ExampleSketches(
                module,
                layout,
                sketch=sketch,
                loss_fn=training_step_loss,
                engine=fallback,
                weight_fn=weighings.weight_fn,
                reduction=weighings.reduction,
                names=unsupported,
                structure=self.structure,
            )
        self.hooks = ExampleHooks(module, self.parameters)
        self.accumulator = SketchAccumulator(sketch, layout, parameters=self.parameters)
        self.preconditioner = StepPreconditioner(trainer, self.parameters) if preconditioned else None
        self.plain: SketchAccumulator | None = None  # of the first batch, without the preconditioner
        self.batch: _Batch | None = None
        self.batches, self.checked, self.doubt = 0, False, False
        self.rank, self.seen = trainer.global_rank, set[tuple[Any, Any]]()  # sizes and classes of batches checked
        self.ways: KnownWays | None = KnownWays()  # None once a batch did not fit
        self.reasons: set[str] | None = None
        self.epoch, self.duplicates = -1, DuplicateFinder(None, 0)
        self.frozen: Known = {}

    def begin_batch(self, trainer: Trainer, batch: Any, ids: Column, own: Mapping[str, Column], recorded: bool) -> None:
        """Run the second pass and attach the hooks, if the batch is to be recorded.

        Args:
            trainer: The Trainer that runs the fit.
            batch: The batch.
            ids: The ids of its examples.
            own: The user's columns.
            recorded: Whether the batch gets rows.

        Raises:
            MisconfigurationException: If an example has no id, or several.
        """
        if keys_of(ids).ndim > 1:
            raise MisconfigurationException(
                "index_key names ids of packed documents, of which the backward pass of training has no shares: use "
                "per='step', or write a row per document at a checkpoint: trainer.validate(model, train_loader)."
            )
        if (keys_of(ids) == UNKNOWN_ID).any():
            raise MisconfigurationException(
                "per='example' needs an id for each example: pass index_key=... for one that the batch contains, "
                "index_key='hash' for hashes of the contents, or wrap the data set, outermost, in IndexedDataset."
            )
        if self.epoch != trainer.current_epoch:
            self.epoch = trainer.current_epoch
            self.duplicates = DuplicateFinder(trainer.train_dataloader, trainer.global_rank)
            self.frozen.clear()
        duplicate = self.duplicates.among(len(ids))
        if not recorded:
            return
        second: Tensor | None = None
        with muted_loggers(trainer), preserve_state(self.module):
            plain = differentiable(batch)
            way, known = self._weighing(plain)
            if self.second is not None:
                second = self.second(plain).rows
        count = len(ids)
        columns = {
            "example_id": ids,
            "padded": duplicate,
            "weight": way.weights.float(),
            "scale_known": torch.full((count,), known),
            **own,
        }
        self.batch = _Batch(columns, way.scale, second)
        examples = self.structure.count(batch)
        self.accumulator.start(examples)
        if self.preconditioner is not None:
            self.preconditioner.begin_batch(self.accumulator)
            if not self.checked:  # the division would turn the rounding of a gradient that is zero into a number
                self.plain = SketchAccumulator(self.sketch, self.layout, parameters=self.parameters)
                self.plain.start(examples)
        self.hooks.attach(self._accumulators(), examples)

    def before_backward(self, loss: Tensor) -> None:
        """Tell the hooks which loss is differentiated."""
        if self.batch is not None:
            self.hooks.before_backward(loss)

    def take_rows(self, trainer: Trainer) -> ArrivingRows | None:
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
            self.checked = self._check_sum(trainer, shares if self.plain is None else self.plain.rows())
            self.plain = None
        factor = (batch.scale * trainer.accumulate_grad_batches / loss_scale(trainer)).to(shares)
        if self.preconditioner is not None:
            if self.preconditioner.batches == trainer.accumulate_grad_batches:
                self.preconditioner.clip({}, loss_scale(trainer))
            factor = factor * self.preconditioner.clipped
        rows = (shares * factor[:, None]).float()
        if batch.second is not None:
            rows += batch.second.to(rows)
        count = len(rows)
        lr = common_lr(param_groups(trainer.optimizers))
        columns = {
            **batch.columns,
            "step": torch.full((count,), trainer.global_step + 1),
            "epoch": torch.full((count,), trainer.current_epoch),
            "lr": torch.full((count,), lr),
            "fingerprint": module_fingerprint_on_device(self.module, self.frozen).expand(count),
            "preconditioner": torch.full((count,), NONE if self.preconditioner is None else OF_STEP),
        }
        return ArrivingRows(rows, self.sketch, columns)

    def stop(self) -> None:
        """Remove all hooks."""
        self.batch = None
        self.hooks.detach()
        if self.preconditioner is not None:
            self.preconditioner.stop()

    def _accumulators(self) -> Accumulator:
        """Return what factors of the batch are added to."""
        if self.preconditioner is None:
            return self.accumulator
        return self.preconditioner if self.plain is None else _Both(self.preconditioner, self.plain)

    def _weighing(self, batch: Any) -> tuple[Weighing, bool]:
        """Return the way in which the loss weighs the examples of a batch, and whether that is known.

        A batch that is not checked is weighed as those before it. One is checked if it is among the first, or drawn; if
        the ways that fit those before it differ on it; or if it has another size, or a class that none of them had.
        """
        number, ways = self.batches, self.weighings(batch)
        self.batches += 1
        if self.ways is None:
            return ways[0], False
        before = self.ways.of(ways)
        new = {(len(before.weights) if before is not None else 0, None), *classes_of(batch, self.structure)} - self.seen
        if before is not None and not (_is_drawn(number, self.rank) or new or self._apart(ways)):
            return before, True
        self.seen |= new
        loss_fn, error = on_copies(training_step_loss), tolerance(self.parameters)
        found = weighings_by_losses(self.module, batch, loss_fn, ways, self.structure, number, error)
        way = None if isinstance(found, str) else self.ways.narrow(found)
        if way is not None:
            return way, len(ways[0].weights) == 1 or self.weighings.given or not self._apart(ways)
        self.ways, self.doubt = None, number > 0
        reason = found if isinstance(found, str) else "it weighs its examples in another way than before"
        warnings.warn(
            f"the scale of the rows of this fit's examples is marked as not known: {reason}. Their directions are "
            "right; rows at a checkpoint, trainer.validate(model, train_loader), have the right scale too.",
            stacklevel=2,
        )
        return ways[0], False

    def _apart(self, ways: list[Weighing]) -> bool:
        """Return whether the ways that fit all batches so far differ on a batch."""
        left = [own for own in ways if self.ways is not None and own.name in (self.ways.names or ())]
        return len({own.summed for own in left}) > 1 or bool(disagreement(left).max() > 1 + tolerance(self.parameters))

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


def _is_drawn(number: int, rank: int = 0) -> bool:
    """Return whether a batch of a rank is checked whatever is in it: it is among the first, or one that is drawn."""
    drawn = torch.rand((), generator=torch.Generator().manual_seed(number * 4099 + rank))
    return number < _ALL_CHECKED or float(drawn) < _CHECKED_LATER


def unsupported_by_hooks(
    trainer: Trainer,
    module: nn.Module,
    layout: Layout,
    batch: Any,
    weighings: Weighings,
    fallback: Fallback | None,
) -> dict[str, str]:
    """Find the parameters whose gradients hooks cannot split into examples, with the reasons, and warn of them.

    Those of all ranks are returned, since their first batches may take different paths through the module.

    Args:
        trainer: The Trainer that runs the fit.
        module: The module that is trained.
        layout: The parameters that rows are to cover.
        batch: The first batch.
        weighings: Lists the ways in which the loss may weigh the examples of a batch.
        fallback: The engine of the second pass, or None for no such pass.

    Raises:
        MisconfigurationException: If hooks support no parameter, and there is no fallback.
        ValueError: If the module is compiled, and there is no fallback.
    """
    parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
    with muted_loggers(trainer), preserve_state(module):
        try:
            loss_fn = on_copies(training_step_loss)
            structure = weighings.structure
            reasons = hooks_fail(module, differentiable(batch), parameters, loss_fn, structure, weighings)
        except ValueError as error:
            if fallback is None:
                raise
            reasons = dict.fromkeys(layout.names, str(error))
    unsupported: dict[str, str] = {}
    for rank in range(trainer.world_size):
        unsupported = {**trainer.strategy.broadcast(reasons, rank), **unsupported}
    if fallback is None and len(unsupported) == len(parameters):
        raise MisconfigurationException(
            f"no gradient of {type(module).__name__} can be split into examples: {next(iter(unsupported.values()))}. "
            "Use fallback='loop', which takes a pass for each example, or per='step', or write rows at checkpoints: "
            "trainer.validate(model, train_loader)."
        )
    if unsupported and trainer.is_global_zero:
        many = f"{len(unsupported)} of {len(layout.names)} parameters"
        examples = weighings.structure.count(batch)
        passes = "a vectorized pass" if fallback == "vmap" else f"a pass for each of its {examples} examples"
        summary = (
            f"rows leave out {many}; fallback='loop' would cover them"
            if fallback is None
            else f"fallback={fallback!r} covers {many}, at the cost of {passes} more for every batch like the first, "
            "in evaluation mode"
        )
        warnings.warn(f"{summary}:{by_reason(unsupported)}", stacklevel=2)
    return unsupported


def without(layout: Layout, names: Collection[str]) -> Layout:
    """Return the layout of all parameters but those with these names."""
    pairs = zip(layout.names, layout.shapes, strict=True)
    return Layout(*zip(*((name, shape) for name, shape in pairs if name not in names), strict=True))
