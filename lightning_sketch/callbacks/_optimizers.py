"""Learning rates of the Trainer's optimizers, and the curvature up to which they are stable."""

import math
from typing import NamedTuple

import torch

from lightning_sketch._lightning import Trainer, common_lr, param_groups


class Stability(NamedTuple):
    """Learning rate and edge of stability at a training step.

    Attributes:
        lr: The learning rate if all parameters have the same; otherwise NaN.
        below: The eigenvalue up to which gradient descent is stable, in loss per squared parameter; NaN for optimizers
            other than SGD.
    """

    lr: float
    below: float


UNKNOWN = Stability(math.nan, math.nan)


def stability(trainer: Trainer) -> Stability:
    """Return the learning rate and the edge of stability of the Trainer's optimizers as they are now."""
    return Stability(common_lr(param_groups(trainer, trainer.optimizers)), _stable_below(trainer))


def _stable_below(trainer: Trainer) -> float:
    """Return the eigenvalue above which SGD diverges along the eigenvector; NaN for other optimizers.

    It is 2 (1 + β) / lr with momentum β, and 2 (1 + β) / (lr (1 + 2 β)) with Nesterov's momentum. Dampening d scales
    the steps of momentum, hence 2 (1 + β) / (lr (1 - d)).

    Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at the edge of stability",
    ICLR 2021, arXiv:2103.00065, eqs. (1), (2) and appendix B.
    """
    found = param_groups(trainer, trainer.optimizers)
    lr = common_lr(found)
    if not lr > 0 or not all(type(optimizer) is torch.optim.SGD for optimizer in trainer.optimizers):
        return math.nan
    options = {tuple(group[name] for name in ("momentum", "nesterov", "dampening", "maximize")) for group in found}
    if len(options) > 1:
        return math.nan
    ((momentum, nesterov, dampening, maximize),) = options
    if maximize or dampening >= 1:
        return math.nan
    return 2 * (1 + momentum) / (lr * (1 + 2 * momentum if nesterov else 1 - (dampening if momentum else 0)))
