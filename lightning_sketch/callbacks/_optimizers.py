"""Learning rates of the Trainer's optimizers, and the curvature up to which they are stable."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sketch._lightning import LightningModule, Trainer, param_groups
from lightning_sketch.autodiff.optimizer_state import check_adaptive
from lightning_sketch.curvature import CriticalLearningRate, Preconditioned, Stability, stability_edge
from lightning_sketch.curvature.critical_learning_rate import copy_weights, critical_learning_rate
from lightning_sketch.curvature.operator import CurvatureOperator

UNKNOWN = Stability(math.nan, math.nan, "", "no optimizer is training")


def stability(trainer: Trainer, preconditioned: bool = False) -> Stability:
    """Return the learning rate and the edge of stability of the Trainer's optimizers as they are now."""
    groups = param_groups(trainer.optimizers)
    return stability_edge(list(trainer.optimizers), preconditioned=preconditioned, groups=groups)


def groups_now(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the param groups of the Trainer's optimizers with their present options, which a scheduler may change."""
    return [dict(group) for group in param_groups(trainer.optimizers)]


def preconditioned(
    trainer: Trainer, operator: CurvatureOperator, groups: Sequence[Mapping[str, Any]] | None = None
) -> Preconditioned:
    """Return P^-1/2 A P^-1/2 with the diagonal P of the Trainer's optimizers.

    Args:
        trainer: The Trainer.
        operator: The matrix A.
        groups: The param groups with the options of the last step; those that they have now if None.

    Raises:
        ValueError: If they have none, or have not stepped yet.
    """
    groups = groups or param_groups(trainer.optimizers)
    return Preconditioned.from_optimizer(operator, list(trainer.optimizers), groups=groups)


def check_preconditioner(trainer: Trainer) -> None:
    """Check that the Trainer's optimizers divide their steps by a diagonal that is known, before training.

    Raises:
        MisconfigurationException: If one does not; the message says why.
    """
    for optimizer in trainer.optimizers:
        if type(optimizer) is not torch.optim.SGD:
            try:
                check_adaptive(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"preconditioner='optimizer': {error}") from error


class LastStep:
    """The weights before the Trainer's last step, copied only if the next measurement comes right after it.

    Costs one copy of the trainable parameters, for as long as that step lasts. Under gradient accumulation it is the
    step of all accumulated batches; of several optimizers, or one with closures, all that a batch does.

    Args:
        every_n_train_steps: The number of optimizer steps between measurements; None if they are at ends of epochs.
        every_n_epochs: The number of epochs between them.
    """

    def __init__(self, every_n_train_steps: int | None, every_n_epochs: int | None):
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.weights: dict[str, Tensor] = {}
        self.groups: list[dict[str, Any]] = []  # param groups of the step under way
        self.clipped = 1.0  # the factor by which its gradient was clipped; NaN if not known
        self.lr, self.step = math.nan, -1  # of the copy: the rate, and the number of steps before it
        self._seen, self._steps_of_batch = -1, 1  # manual optimization may take several

    def batch_starts(self, trainer: Trainer, module: LightningModule, batch_idx: int, lr: float) -> None:
        """Copy the weights if a measurement is due after this batch; forget an earlier copy.

        Args:
            trainer: The Trainer.
            module: The module that it trains.
            batch_idx: The number of the batch in its epoch.
            lr: The learning rate of the step.
        """
        step, self.clipped = trainer.global_step, 1.0
        self.groups = groups_now(trainer)
        if self._seen >= 0 and step > self._seen:
            self._steps_of_batch = step - self._seen
        self._seen = step
        if self.step == step and self.weights:
            return  # another batch of the same step
        self.weights = {}
        if self._is_due(trainer, batch_idx, step, step + self._steps_of_batch):
            self.weights, self.lr, self.step = copy_weights(module), lr, step

    def before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Note by how much the Trainer will clip the gradient, which makes the steps smaller and the edge larger."""
        clip: Any = trainer
        if not clip.gradient_clip_val:
            return
        if str(clip.gradient_clip_algorithm or "norm").rpartition(".")[-1].lower().strip("'\">") != "norm":
            self.clipped = math.nan
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        try:
            size: Any = torch.nn.utils.get_total_norm(gradients) if gradients else 0.0
        except RuntimeError:  # whole gradients beside shards, which PyTorch cannot clip by norm either
            self.clipped = math.nan
            return
        size = float(size.full_tensor() if hasattr(size, "full_tensor") else size)  # of shards, summed over ranks
        self.clipped *= min(1.0, float(clip.gradient_clip_val) / (size + 1e-6))

    def of_clipped(self, now: Stability) -> Stability:
        """Return the stability of steps whose gradient was clipped: by a factor c, the edge is at 1 / c of it."""
        if math.isnan(self.clipped):
            return now._replace(edge=math.nan, reason=now.reason or "gradients are clipped by value")
        if self.clipped == 1 or not self.clipped:
            return now
        return now._replace(edge=now.edge / self.clipped, optimizer=f"{now.optimizer}, clipped to {self.clipped:.2g}")

    def _is_due(self, trainer: Trainer, batch_idx: int, before: int, after: int) -> bool:
        """Return whether a measurement follows a batch before which there were `before` steps."""
        if self.every_n_train_steps:
            return after // self.every_n_train_steps > before // self.every_n_train_steps
        if (trainer.current_epoch + 1) % (self.every_n_epochs or 1):
            return False
        ends = 0 < trainer.max_steps <= after
        return ends or batch_idx + 1 >= trainer.num_training_batches  # infinite for a stream of unknown length

    def critical(self, operator: CurvatureOperator, step: int) -> CriticalLearningRate:
        """Return the critical learning rate of the last step, or the reason why it is not known.

        Args:
            operator: The curvature operator, whose loss counts.
            step: The Trainer's number of steps so far.
        """
        weights, self.weights = self.weights, {}
        if not weights or not self.step < step:
            why = "the weights before the last step were not copied: that it was the last was not known"
            return CriticalLearningRate(math.nan, math.nan, reason=why)
        try:  # a trial step may be far off, and the spectrum is there; ranks fail together inside
            return critical_learning_rate(operator, weights, self.lr)
        except Exception as error:
            return CriticalLearningRate(math.nan, self.lr, reason=f"the loss failed at a trial step: {error}")
