"""The callback that finds the intrinsic dimension in one training run, by doubling the dimension at each plateau.

    every c steps, at the mean of w over the last c / 2 steps:
        metric >= target               found: the intrinsic dimension is at most dim
        better by less than delta      dim <- 2 dim
        otherwise                      continue

Source: Schioppa (2024), "Efficient sketches for training data attribution and studying the loss landscape",
NeurIPS 2024, arXiv:2402.03994, listing 9. Its rule uses the current w; the mean of several w is less noisy, and so is
the result.
"""

import itertools
import math
from typing import Any, cast, get_args

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sketch._lightning import (
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    loses_callback_state,
    print_on_rank_zero,
    set_validation_schedule,
    state_key,
    validate_now,
    validation_schedule,
)
from lightning_sketch.subspace._doubling import carry_over
from lightning_sketch.subspace.result import Mode
from lightning_sketch.subspace.subspace_module import SubspaceModule


class IntrinsicDimensionFinder(CallbackBase):
    """Double the `dim` of a `SubspaceModule(max_dim=...)` while it trains, until a metric reaches its target.

    Validation runs every `every_n_train_steps` steps, in place of the Trainer's own schedule, at the mean of w over the
    last half of these steps. If it reaches the target, the module keeps this mean. A checkpoint of an earlier
    validation contains w itself, although its metric was measured at the mean.

    The dimension found is an upper bound, typically twice the smallest one, and seeds differ by factors of up to eight
    (`benchmarks/paper/table_10.py`): verify it by a run at half of it, as
    `IntrinsicDimensionTuner(...).find(method="doubling")` does. Use a constant learning rate.

    Logged at each validation: `subspace/dim`.

    Args:
        monitor: The name of a metric that `validation_step` logs.
        target: The value to reach, in units of the metric.
        mode: "max" if larger values are better, "min" if smaller ones are.
        delta: The smallest improvement between two validations, in units of the metric, for which training continues
            at the same dim; choose it larger than the noise of the metric.
        every_n_train_steps: The number of optimizer steps between two validations.
        max_steps: The number of optimizer steps after which the search ends without a result; None for no limit but
            the Trainer's.

    Attributes:
        history: A dict for each validation: step (optimizer steps), dim, and value of the metric.
        found: The dim at which the target was reached, or None.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At setup, if the module is not a `SubspaceModule` with `max_dim`, there is no
            validation, there are two finders, gradient accumulation is scheduled, weights are averaged, or fit runs in
            spawned processes (`ddp_spawn` and similar); at the first validation, if `monitor` is not logged.

    Example::

        finder = IntrinsicDimensionFinder("val_acc", 0.89)
        trainer = Trainer(max_steps=2000, callbacks=[finder])
        trainer.fit(SubspaceModule(module, 8, max_dim=4096), datamodule=data)
        finder.suggestion()
    """

    def __init__(
        self,
        monitor: str,
        target: float | int,
        *,
        mode: Mode = "max",
        delta: float | int = 0.05,
        every_n_train_steps: int = 100,
        max_steps: int | None = None,
    ):
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} is not known; use 'max' or 'min'.")
        if not isinstance(target, float | int) or not math.isfinite(target):
            raise ValueError(f"need a finite target, got {target!r}; pass a number in units of {monitor}, such as 0.9.")
        if delta < 0 or every_n_train_steps < 1 or (max_steps is not None and max_steps < 1):
            raise ValueError(
                f"need delta >= 0, every_n_train_steps >= 1 and max_steps >= 1, got {delta}, {every_n_train_steps} and "
                f"{max_steps}."
            )
        self.monitor, self.target, self.mode, self.delta = monitor, target, mode, delta
        self.every_n_train_steps, self.max_steps = every_n_train_steps, max_steps
        self.history: list[dict[str, float]] = []
        self.found: int | None = None
        self._window: list[Any] = [0, 0.0, 0]  # number and sum of the w in the mean, and the step of the last one
        self._schedule: tuple[Any, ...] | None = None  # the Trainer's own
        self._current: list[Tensor] = []  # the blocks of w, while validation runs at their mean

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint, which contains the metric: each search has its own state."""
        return state_key(self, monitor=self.monitor)

    def suggestion(self) -> int | None:
        """Return the dimension at which the target was reached, an upper bound of the smallest; None if it was not."""
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the result, and the sum of w since the last validation."""
        return {"history": self.history, "found": self.found, "window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the search from a checkpoint."""
        self.history, self.found, self._window = list(state["history"]), state["found"], list(state["window"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the search is possible, and set the Trainer's validation schedule."""
        if stage != "fit":
            return
        if not isinstance(pl_module, SubspaceModule) or not pl_module.directions.nested:
            raise MisconfigurationException(
                f"IntrinsicDimensionFinder needs a SubspaceModule with max_dim, got {type(pl_module).__name__}; fit "
                "SubspaceModule(module, 8, max_dim=4096)."
            )
        refuse_spawning(trainer)
        if not trainer.enable_validation:
            raise MisconfigurationException(f"{self.monitor} comes from validation; pass val_dataloaders to fit.")
        state: Any = trainer  # Any: Lightning's annotations lack `callbacks` and `fast_dev_run`
        if sum(isinstance(callback, IntrinsicDimensionFinder) for callback in state.callbacks) > 1:
            raise MisconfigurationException(
                "two searches in one run would overwrite each other's w; fit twice, with one IntrinsicDimensionFinder "
                "each."
            )
        names = {base.__name__ for callback in state.callbacks for base in type(callback).__mro__}
        if "GradientAccumulationScheduler" in names:
            raise MisconfigurationException(
                "IntrinsicDimensionFinder schedules validation by batches, but GradientAccumulationScheduler changes "
                "the number of batches in a step; use Trainer(accumulate_grad_batches=...)."
            )
        if names & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise MisconfigurationException(
                "w has another scale after each doubling, so it cannot be averaged over the run; leave out the "
                "callback that averages, IntrinsicDimensionFinder validates a mean of w by itself."
            )
        if not state.fast_dev_run:
            self._schedule = validation_schedule(trainer)
            set_validation_schedule(trainer, self.every_n_train_steps * trainer.accumulate_grad_batches)
        if trainer.global_step == 0:
            self.history, self.found, self._window = [], None, [0, 0.0, 0]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the Trainer's own validation schedule."""
        if self._schedule is not None:
            set_validation_schedule(trainer, *self._schedule)
            self._schedule = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate if the checkpoint that training goes on from was saved right before a validation of the search."""
        last = self.history[-1]["step"] if self.history else 0
        if self._schedule is not None and self.found is None and trainer.global_step == last + self.every_n_train_steps:
            validate_now(trainer)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add w to the mean, in the second half of the steps between two validations."""
        step = trainer.global_step
        since = step - (self.history[-1]["step"] if self.history else 0)
        count, total, last = self._window
        if step != last and 2 * since > self.every_n_train_steps:
            w = cast(SubspaceModule, pl_module).coordinates().detach()
            self._window = [count + 1, torch.as_tensor(total, device=w.device) + w, step]
        if self.max_steps is not None and step >= self.max_steps:
            trainer.should_stop = True

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set w to its mean."""
        count, total, _ = self._window
        if self._searches(trainer) and count:
            sub = cast(SubspaceModule, pl_module)
            self._current = [block.clone() for block in sub.blocks]
            for block, mean in zip(sub.blocks, sub.cut(total / count), strict=True):
                block.copy_(mean)

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at the mean of w if it reaches the target; otherwise restore w, and double dim or continue."""
        if not self._searches(trainer):
            return
        self._window = [0, 0.0, trainer.global_step]
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"{self.monitor!r} was not logged in validation; there are "
                f"{', '.join(map(repr, trainer.callback_metrics)) or 'no metrics'}."
            )
        sub = cast(SubspaceModule, pl_module)
        value = float(trainer.strategy.reduce(trainer.callback_metrics[self.monitor].clone(), reduce_op="mean"))
        dim = sub.directions.dim
        last = self.history[-1]["value"] if self.history else math.nan
        self.history.append({"step": trainer.global_step, "dim": dim, "value": value})
        for logger in trainer.loggers:
            logger.log_metrics({"subspace/dim": float(dim)}, step=batches_done(trainer))
        better = 1 if self.mode == "max" else -1
        if better * (value - self.target) >= 0:
            self._current = []
            self.found, trainer.should_stop = dim, True
            print_on_rank_zero(
                trainer, f"{self.monitor} {value:.4g} at dim {dim}: the intrinsic dimension is at most {dim}"
            )
            return
        self._restore(sub)
        if math.isnan(value):
            trainer.should_stop = True
            print_on_rank_zero(trainer, f"{self.monitor} is NaN at dim {dim}: the search ends; lower the learning rate")
        elif better * (value - last) < self.delta:
            self._double(trainer, sub, value)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore w if a validation at its mean fails."""
        if self._current:
            self._restore(cast(SubspaceModule, pl_module))

    @torch.no_grad()
    def _restore(self, sub: SubspaceModule) -> None:
        """Set w back from its mean to its current value."""
        for block, current in zip(sub.blocks, self._current, strict=False):
            block.copy_(current)
        self._current = []

    def _double(self, trainer: Trainer, sub: SubspaceModule, value: float) -> None:
        """Double the dim of the module, and rescale the optimizers' state; do nothing if all directions are in use."""
        before = sub.directions.dim
        if before == sub.directions.sketch.dim:
            return
        sub.double_dim()
        used = 1 + list(itertools.accumulate(map(len, sub.blocks))).index(before)
        for optimizer in trainer.optimizers:
            carry_over(optimizer, sub.blocks[:used], sub.blocks[used:], (before / sub.directions.dim) ** 0.5)
        sub.ready()
        print_on_rank_zero(
            trainer, f"{self.monitor} {value:.4g} at dim {before}: continuing with dim {sub.directions.dim}"
        )

    def _searches(self, trainer: Trainer) -> bool:
        """Return whether a validation belongs to the search: it is part of fit, and not Lightning's sanity check."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking


def refuse_spawning(trainer: Trainer) -> None:
    """Check that fit runs in this process, since the callback state of spawned processes is lost.

    Raises:
        MisconfigurationException: If the Trainer fits in processes that it spawns.
    """
    if loses_callback_state(trainer):
        raise MisconfigurationException(
            "the result of IntrinsicDimensionFinder would be lost with the processes that are spawned for a fit; use "
            "strategy='ddp' in place of 'ddp_spawn', 'ddp_fork' or 'ddp_notebook'."
        )
