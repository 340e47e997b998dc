"""What the Trainer's optimizers say of stability."""

import math
from typing import NamedTuple

import torch

from lightning_sketch._compat import Trainer


class Stability(NamedTuple):
    """At the last training step."""

    lr: float
    """The learning rate, where all parameters have the same; else NaN."""
    below: float
    """Eigenvalues up to which gradient descent is stable; NaN for other optimizers."""


UNKNOWN = Stability(math.nan, math.nan)


def stability(trainer: Trainer) -> Stability:
    """Of the Trainer's optimizers as they are now."""
    return Stability(_learning_rate(trainer), _stable_below(trainer))


def _learning_rate(trainer: Trainer) -> float:
    """The learning rate, where all parameters have the same; else NaN."""
    rates = {float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups}
    return rates.pop() if len(rates) == 1 else math.nan


def _stable_below(trainer: Trainer) -> float:
    """Along an eigenvector above 2 (1 + β) / lr gradient descent with momentum β grows; NaN for other optimizers.

    With Nesterov's momentum, 2 (1 + β) / (lr (1 + 2 β)); with dampening d, which scales the steps, over 1 - d.
    Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at the edge of stability",
    ICLR 2021, arXiv:2103.00065, eqs. (1), (2) and appendix B.
    """
    lr = _learning_rate(trainer)
    if not lr > 0 or not all(type(optimizer) is torch.optim.SGD for optimizer in trainer.optimizers):
        return math.nan
    options = {
        tuple(group[name] for name in ("momentum", "nesterov", "dampening", "maximize"))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    }
    if len(options) > 1:
        return math.nan
    ((momentum, nesterov, dampening, maximize),) = options
    if maximize or dampening >= 1:
        return math.nan
    return 2 * (1 + momentum) / (lr * (1 + 2 * momentum if nesterov else 1 - (dampening if momentum else 0)))
