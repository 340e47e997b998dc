"""What the Trainer's optimizers say of stability."""

import math

import torch

from lightning_sketch._compat import Trainer


def learning_rate(trainer: Trainer) -> float:
    """The learning rate, where all parameters have the same; else NaN."""
    rates = {float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups}
    return rates.pop() if len(rates) == 1 else math.nan


def stable_below(trainer: Trainer) -> float:
    """Along an eigenvector above 2 (1 + β) / lr gradient descent with momentum β grows; NaN for other optimizers.

    With Nesterov's momentum, 2 (1 + β) / (lr (1 + 2 β)).
    Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at the edge of stability",
    ICLR 2021, arXiv:2103.00065, eqs. (1), (2) and appendix B.
    """
    lr = learning_rate(trainer)
    if not lr > 0 or not all(type(optimizer) is torch.optim.SGD for optimizer in trainer.optimizers):
        return math.nan
    momenta = {
        (group["momentum"], group["nesterov"]) for optimizer in trainer.optimizers for group in optimizer.param_groups
    }
    if len(momenta) > 1:
        return math.nan
    ((momentum, nesterov),) = momenta
    return 2 * (1 + momentum) / (lr * (1 + 2 * momentum if nesterov else 1))
