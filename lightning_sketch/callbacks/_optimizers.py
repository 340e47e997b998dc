"""What the Trainer's optimizers say of their rates, and of stability."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_sketch._lightning import Trainer
from lightning_sketch.subspace import SubspaceModule


class Stability(NamedTuple):
    """At the last training step."""

    lr: float
    """The learning rate, where all parameters have the same; else NaN."""
    below: float
    """Eigenvalues up to which gradient descent is stable; NaN for other optimizers."""


UNKNOWN = Stability(math.nan, math.nan)


def stability(trainer: Trainer) -> Stability:
    """Of the Trainer's optimizers as they are now."""
    return Stability(one_rate(groups_of_step(trainer, trainer.optimizers)), _stable_below(trainer))


def groups_of_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> list[Mapping[str, Any]]:
    """The groups of optimizers as a step has them."""
    module = trainer.lightning_module
    if isinstance(module, SubspaceModule):
        return module.groups(optimizers)
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def one_rate(groups: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of groups, where all have the same; else NaN."""
    rates = {float(group["lr"]) for group in groups}
    return rates.pop() if len(rates) == 1 else math.nan


def _stable_below(trainer: Trainer) -> float:
    """Along an eigenvector above 2 (1 + β) / lr gradient descent with momentum β grows; NaN for other optimizers.

    With Nesterov's momentum, 2 (1 + β) / (lr (1 + 2 β)); with dampening d, which scales the steps, over 1 - d.
    Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at the edge of stability",
    ICLR 2021, arXiv:2103.00065, eqs. (1), (2) and appendix B.
    """
    found = groups_of_step(trainer, trainer.optimizers)
    lr = one_rate(found)
    if not lr > 0 or not all(type(optimizer) is torch.optim.SGD for optimizer in trainer.optimizers):
        return math.nan
    options = {tuple(group[name] for name in ("momentum", "nesterov", "dampening", "maximize")) for group in found}
    if len(options) > 1:
        return math.nan
    ((momentum, nesterov, dampening, maximize),) = options
    if maximize or dampening >= 1:
        return math.nan
    return 2 * (1 + momentum) / (lr * (1 + 2 * momentum if nesterov else 1 - (dampening if momentum else 0)))
