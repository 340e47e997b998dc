"""The intrinsic dimension from one training run: double the directions whenever training no longer gets better.

    every c steps, with the mean of w over the last c / 2:
        metric >= target               found: at most `dim`
        better by less than delta      dim <- 2 dim
        else                           train on

Source: Schioppa (2024), "Efficient sketches for training data attribution and studying the loss landscape",
NeurIPS 2024, arXiv:2402.03994, listing 9. Its rule looks at the present w; the mean of some is less noisy, and so is
the answer.
"""

import itertools
import math
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sketch._lightning import (
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    forgets,
    rhythm,
    say,
    set_rhythm,
    state_key,
)
from lightning_sketch.subspace._doubling import carry_over
from lightning_sketch.subspace.subspace_module import SubspaceModule


class IntrinsicDimensionFinder(CallbackBase):
    """Doubles the `dim` of a `SubspaceModule(max_dim=...)` while it trains, until a metric reaches its target.

    Validation runs every `every_n_train_steps` steps, in place of the Trainer's own rhythm, on the mean of w over the
    last half of that time, which is also what the module is left with where the target is reached. A checkpoint of a
    validation before that holds w itself, and is scored by its mean.

    What is found is an upper bound, typically twice the smallest dimension: verify it by a run at half of it, as
    `IntrinsicDimensionTuner(...).find(method="doubling")` does. Use a constant learning rate.

    Logged at each validation: `subspace/dim`.

    Args:
        monitor: name of the metric that `validation_step` logs.
        target: the value to reach.
        mode: "max" if larger is better, "min" if smaller is.
        delta: smallest improvement between two validations that training goes on for, in units of the metric; larger
            than the noise of the metric.
        every_n_train_steps: optimizer steps between two validations.
        max_steps: optimizer steps after which the search is given up; None leaves that to the Trainer.

    Raises:
        ValueError: if an argument is out of its range.
        MisconfigurationException: at setup, if the module is no `SubspaceModule` with `max_dim`, there is no
            validation, there are two finders, accumulation is scheduled, weights are averaged, or the strategy is
            `ddp_spawn` or alike; at the first validation, if `monitor` is not logged.

    Example::

        finder = IntrinsicDimensionFinder(monitor="val_acc", target=0.89)
        trainer = Trainer(max_steps=2000, callbacks=[finder])
        trainer.fit(SubspaceModule(module, dim=8, max_dim=4096, lr_scale=10), datamodule=data)
        finder.suggestion()
    """

    def __init__(
        self,
        monitor: str,
        target: float | int,
        mode: str = "max",
        delta: float | int = 0.05,
        every_n_train_steps: int = 100,
        max_steps: int | None = None,
    ):
        super().__init__()
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} is not known; use 'max' or 'min'.")
        if not math.isfinite(target):
            raise ValueError(f"need a finite target, got {target}.")
        if delta < 0 or every_n_train_steps < 1 or (max_steps is not None and max_steps < 1):
            raise ValueError(
                f"need delta >= 0, every_n_train_steps >= 1 and max_steps >= 1, got {delta}, {every_n_train_steps} and "
                f"{max_steps}."
            )
        self.monitor, self.target, self.mode, self.delta = monitor, target, mode, delta
        self.every_n_train_steps, self.max_steps = every_n_train_steps, max_steps
        self.history: list[dict[str, float]] = []
        """Step, dim and value of each validation."""
        self.found: int | None = None
        self._window: list[Any] = [0, 0.0, 0]  # number and sum of the w in it, and the step of the last
        self._rhythm: tuple[Any, ...] | None = None
        self._present: list[Tensor] = []

    @property
    def state_key(self) -> str:
        """A search for another metric does not go on from this one's checkpoint."""
        return state_key(self, monitor=self.monitor)

    def suggestion(self) -> int | None:
        """The dimension at which the target was reached: the smallest is at most this. None if it was not reached."""
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """The history, and the sum of w in the present window."""
        return {"history": self.history, "found": self.found, "window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if nothing had happened."""
        self.history, self.found, self._window = list(state["history"]), state["found"], list(state["window"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; validate in this rhythm."""
        if stage != "fit":
            return
        if not isinstance(pl_module, SubspaceModule) or not pl_module.directions.nested:
            raise MisconfigurationException(
                f"IntrinsicDimensionFinder needs a SubspaceModule with max_dim, got {type(pl_module).__name__}; fit "
                "SubspaceModule(module, dim=8, max_dim=4096)."
            )
        refuse_forgetful(trainer)
        if not trainer.enable_validation:
            raise MisconfigurationException(f"{self.monitor} comes from validation; pass val_dataloaders to fit.")
        if sum(isinstance(callback, IntrinsicDimensionFinder) for callback in trainer.callbacks) > 1:
            raise MisconfigurationException(
                "two searches in one run would each put back the w of the other; fit twice, with one "
                "IntrinsicDimensionFinder each."
            )
        names = {base.__name__ for callback in trainer.callbacks for base in type(callback).__mro__}
        if "GradientAccumulationScheduler" in names:
            raise MisconfigurationException(
                "IntrinsicDimensionFinder validates by batches, and GradientAccumulationScheduler changes how many "
                "make a step; use Trainer(accumulate_grad_batches=...)."
            )
        if names & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise MisconfigurationException(
                "an average of weights from before and after a doubling is one of other numbers; leave out the "
                "callback that averages, IntrinsicDimensionFinder judges the mean of w by itself."
            )
        if not trainer.fast_dev_run:
            self._rhythm = rhythm(trainer)
            set_rhythm(trainer, self.every_n_train_steps * trainer.accumulate_grad_batches)
        if trainer.global_step == 0:
            self.history, self.found, self._window = [], None, [0, 0.0, 0]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The Trainer's own rhythm again."""
        if self._rhythm is not None:
            set_rhythm(trainer, *self._rhythm)
            self._rhythm = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add w to the mean, in the second half of the time between validations."""
        step = trainer.global_step
        since = step - (self.history[-1]["step"] if self.history else 0)
        count, total, last = self._window
        if step != last and 2 * since > self.every_n_train_steps:
            w = pl_module.coordinates().detach()
            self._window = [count + 1, torch.as_tensor(total, device=w.device) + w, step]
        if self.max_steps is not None and step >= self.max_steps:
            trainer.should_stop = True

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the mean."""
        count, total, _ = self._window
        if self._searches(trainer) and count:
            self._present = [block.clone() for block in pl_module.blocks]
            for block, mean in zip(pl_module.blocks, pl_module.cut(total / count), strict=True):
                block.copy_(mean)

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at the mean; or back to the present w, and double or go on."""
        if not self._searches(trainer):
            return
        self._window = [0, 0.0, trainer.global_step]
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"{self.monitor!r} was not logged in validation; there are "
                f"{', '.join(map(repr, trainer.callback_metrics)) or 'no metrics'}."
            )
        value = float(trainer.strategy.reduce(trainer.callback_metrics[self.monitor].clone(), reduce_op="mean"))
        dim = pl_module.directions.dim
        last = self.history[-1]["value"] if self.history else math.nan
        self.history.append({"step": trainer.global_step, "dim": dim, "value": value})
        for logger in trainer.loggers:
            logger.log_metrics({"subspace/dim": float(dim)}, step=batches_done(trainer))
        better = 1 if self.mode == "max" else -1
        if better * (value - self.target) >= 0:
            self._present = []
            self.found, trainer.should_stop = dim, True
            say(trainer, f"{self.monitor} {value:.4g} at dim {dim}: the intrinsic dimension is at most {dim}")
            return
        self._return(pl_module)
        if math.isnan(value):
            trainer.should_stop = True
            say(trainer, f"{self.monitor} is not a number at dim {dim}: the search ends; lower the learning rate")
        elif better * (value - last) < self.delta:
            self._double(trainer, pl_module, value)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A validation that fails leaves w as it was."""
        if self._present:
            self._return(pl_module)

    @torch.no_grad()
    def _return(self, sub: SubspaceModule) -> None:
        """To the present w, from its mean."""
        for block, present in zip(sub.blocks, self._present, strict=False):
            block.copy_(present)
        self._present = []

    def _double(self, trainer: Trainer, sub: SubspaceModule, value: float) -> None:
        before = sub.directions.dim
        if before == sub.directions.sketch.dim:
            return  # more time is all that can help
        sub.double_dim()
        used = 1 + list(itertools.accumulate(map(len, sub.blocks))).index(before)
        for optimizer in trainer.optimizers:
            carry_over(optimizer, sub.blocks[:used], sub.blocks[used:], (before / sub.directions.dim) ** 0.5)
        sub.ready()
        say(trainer, f"{self.monitor} {value:.4g} at dim {before}: on with {sub.directions.dim}")

    def _searches(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking


def refuse_forgetful(trainer: Trainer) -> None:
    """An answer that would be lost is not asked for.

    Raises:
        MisconfigurationException: if the Trainer fits in processes that end with the fit.
    """
    if forgets(trainer):
        raise MisconfigurationException(
            "IntrinsicDimensionFinder would be lost with the processes that are made for one fit; use strategy='ddp' "
            "in place of 'ddp_spawn', 'ddp_fork' or 'ddp_notebook'."
        )
