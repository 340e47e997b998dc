"""The curvature up to which an optimizer's steps are stable, and one sentence about a learning rate.

On a quadratic loss with Hessian H an optimizer whose step divides by a constant diagonal P diverges along eigenvectors
of P^-1/2 H P^-1/2 with an eigenvalue above

    SGD                    2 / lr                         P = 1
    SGD, momentum β        (2 + 2β) / ((1 - d) lr)        with dampening d
    SGD, Nesterov          (2 + 2β) / ((1 + 2β) lr)
    Adam, AdamW, Adamax    (2 + 2β) / ((1 - β) lr)        with β the first of the betas
    NAdam                  (2 + 2β) / (((1 + β) a + (1 - β) b) lr)
    RMSprop                (2 + 2β) / lr                  its momentum β is not damped
    Adagrad                2 / lr

a, b    the weights of the gradient and of its mean in the last step of NAdam, which its momentum schedule changes

Each is where z = -1 is a root of the characteristic polynomial: the step overshoots, and the error changes its sign.
It is of the full loss; the noise of small batches makes steps unstable earlier, and decoupled weight decay w moves the
edge by a factor of 1 - lr w / 2.

Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at the edge of stability",
arXiv:2103.00065, eqs. (1), (2) and appendix B; Cohen et al. (2022), "Adaptive gradient methods at the edge of
stability", arXiv:2207.14484, for Adam.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_sketch.autodiff.optimizer_state import with_optimizers
from lightning_sketch.curvature.critical_learning_rate import CriticalLearningRate

_PLAIN = (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad)
_MEANS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax)


class Stability(NamedTuple):
    """Learning rate of an optimizer, and its edge of stability.

    Attributes:
        lr: The learning rate. Where param groups have different ones, the largest of a preconditioned matrix, whose P
            has the others in it, else NaN.
        edge: The eigenvalue above which steps diverge, in units of the matrix; NaN if it is not known.
        optimizer: The name of the optimizer's class.
        reason: Why the edge is NaN; empty if it is a number.
    """

    lr: float
    edge: float
    optimizer: str = ""
    reason: str = ""


def stability_edge(
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    preconditioned: bool = True,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> Stability:
    """Return the largest stable eigenvalue of an optimizer at its present learning rate.

    Args:
        optimizers: The optimizer, or several that train parts of the parameters.
        preconditioned: Whether it is compared with eigenvalues of P^-1/2 H P^-1/2, of `Preconditioned.from_optimizer`;
            if False, with those of H, for which only SGD with one learning rate has an edge.
        groups: The param groups with the options that steps use, where they are not the optimizer's own.

    Returns:
        The edge, NaN with the reason where there is none that is known.

    >>> module = torch.nn.Linear(2, 1)
    >>> round(stability_edge(torch.optim.Adam(module.parameters(), lr=0.1)).edge, 6)
    380.0
    >>> stability_edge(torch.optim.Adam(module.parameters(), lr=0.1), preconditioned=False).reason
    "Adam divides its steps by a diagonal; pass preconditioner='optimizer'"
    """
    pairs = with_optimizers(optimizers, groups)
    name = " and ".join(dict.fromkeys(type(one).__name__ for one, _ in pairs))
    rates = {float(group["lr"]) for _, group in pairs if "lr" in group}
    lr = max(rates) if rates and (preconditioned or len(rates) == 1) else math.nan
    try:
        if not preconditioned:
            _check_plain([one for one, _ in pairs], rates)
        if not rates or not max(rates) > 0:
            raise _Unknown(f"the learning rate of {name or 'no optimizer'} is not positive")
        factors = {_edge_times_lr(one, group) for one, group in pairs}
        if len(factors) > 1:
            listed = " and ".join(f"{factor:.4g} / lr" for factor in sorted(factors))
            raise _Unknown(f"param groups with different betas or momentum have different edges: {listed}")
    except _Unknown as unknown:
        return Stability(lr, math.nan, name, str(unknown))
    return Stability(lr, factors.pop() / lr, name)


def verdict(lambda_max: float, stability: Stability, critical: CriticalLearningRate | None = None) -> str:
    """Say in one sentence how far a learning rate is from being too high.

    Args:
        lambda_max: The largest eigenvalue of the matrix that the edge is one of; NaN if it has not converged.
        stability: What `stability_edge` returned.
        critical: What `critical_learning_rate` returned; None if it was not asked for.

    >>> verdict(266.0, Stability(0.1, 380.0, "Adam"), CriticalLearningRate(2.1, 0.1))
    'stability: 0.7 of the edge (Adam, lr 0.1); the largest step that still lowers the loss is 2.1 times yours.'
    """
    rate = "different learning rates" if math.isnan(stability.lr) else f"lr {_short(stability.lr)}"
    who = f"({stability.optimizer}, {rate})"
    if math.isnan(stability.edge):
        parts = [f"stability: no edge is known {who}, since {stability.reason or 'no optimizer was asked'}"]
    elif math.isnan(lambda_max):
        parts = [f"stability: not known {who}, since the largest eigenvalue has not converged"]
    else:
        ratio = lambda_max / stability.edge
        parts = [f"stability: {_short(ratio)} {'times' if ratio >= 1 else 'of'} the edge {who}"]
    if critical is not None:
        parts.append(_said(critical))
    return "; ".join(parts) + "."


def _said(critical: CriticalLearningRate) -> str:
    """Return what a critical learning rate means for the last step."""
    factor = _short(critical.factor)
    if math.isnan(critical.factor):
        return f"no critical learning rate, since {critical.reason}"
    if critical.factor == 0:
        return (
            "the last step was not downhill on these batches, as is common with momentum and small batches, so that "
            "it says nothing about the rate"
        )
    if critical.at_least:
        return f"even {factor} times the last step would still lower the loss"
    if critical.factor < 1:
        return f"the last step raised the loss; the largest that still lowers it is {factor} times yours"
    return f"the largest step that still lowers the loss is {factor} times yours"


def _short(number: float) -> str:
    """Return a number with two digits, a small or a large one with its power of ten, such as 3e-4."""
    if not number or not math.isfinite(number) or 0.01 <= abs(number) < 1e5:
        return f"{number:.0f}" if abs(number) >= 100 else f"{number:.2g}"
    mantissa, power = f"{number:.1e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


class _Unknown(Exception):
    """There is no edge that is known, for the reason in the message."""


def _check_plain(optimizers: Sequence[torch.optim.Optimizer], rates: set[float]) -> None:
    """Raise if an edge is none of H itself."""
    adaptive = next((one for one in optimizers if type(one) in (*_PLAIN, *_MEANS, torch.optim.NAdam)[1:]), None)
    if adaptive is not None:
        raise _Unknown(f"{type(adaptive).__name__} divides its steps by a diagonal; pass preconditioner='optimizer'")
    if len(rates) > 1:
        raise _Unknown("param groups have different learning rates (preconditioner='optimizer' has them in P)")


def _edge_times_lr(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """Return the edge of a param group, times its learning rate.

    Raises:
        _Unknown: If there is none that is known.
    """
    kind = type(optimizer)
    if group.get("maximize"):
        raise _Unknown(f"{kind.__name__} with maximize=True climbs the loss, whose curvature does not stop it")
    if kind in _MEANS:
        beta = float(group["betas"][0])
        return (2 + 2 * beta) / (1 - beta)
    if kind is torch.optim.NAdam:
        return _edge_of_nadam(optimizer, group)
    if kind not in _PLAIN:
        raise _Unknown(f"no edge of stability is known for {kind.__name__}")
    beta = float(group.get("momentum", 0))
    if group.get("nesterov"):
        return (2 + 2 * beta) / (1 + 2 * beta)
    dampening = float(group.get("dampening", 0)) if beta else 0.0
    if dampening >= 1:
        raise _Unknown(f"{kind.__name__} with dampening={dampening:g} takes no steps down the gradient")
    return (2 + 2 * beta) / (1 - dampening)


def _edge_of_nadam(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """Return the edge of NAdam at its last step, times its learning rate.

    With the weights a of the gradient and b of its mean m, held as they are,

        x' = x - lr P^-1 (a g + b m'),    m' = β m + (1 - β) g
    """
    beta, decay = float(group["betas"][0]), group["momentum_decay"]
    states = [state for p in group["params"] if "mu_product" in (state := optimizer.state.get(p, {}))]
    known = {(float(state["step"]), float(state["mu_product"])) for state in states}
    if len(known) != 1:
        what = "has not stepped yet" if not known else "has taken different numbers of steps for different parameters"
        raise _Unknown(f"NAdam {what}, on which its momentum depends")
    ((step, product),) = known
    now, following = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    a, b = (1 - now) / (1 - product), following / (1 - product * following)
    return (2 + 2 * beta) / ((1 + beta) * a + (1 - beta) * b)
