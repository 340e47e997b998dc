"""The diagonal by which Adam and its like divide their steps, sqrt(v) + epsilon.

    v_t = b v_{t-1} + (1 - b) g_t²,    P_t = sqrt(v_t / (1 - b^t)) + epsilon

g_t    the gradient of step t, clipped, with the weight decay in it unless this is decoupled, as AdamW's is
b      the second of `betas`; RMSprop calls it alpha, and has no correction 1 - b^t

Source: Kingma and Ba (2015), arXiv:1412.6980, algorithm 1; Loshchilov and Hutter (2019), arXiv:1711.05101, for decay.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The entry of an optimizer's state that has the mean square of the gradient, by the name of its class.
_MEAN_SQUARES = {
    "Adam": "exp_avg_sq",
    "AdamW": "exp_avg_sq",
    "NAdam": "exp_avg_sq",
    "RMSprop": "square_avg",
}


def divisors(optimizer: torch.optim.Optimizer, gradients: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
    """Return sqrt(v) + epsilon with bias correction for each parameter that has a state, by the parameter's id.

    Args:
        optimizer: Adam, AdamW, NAdam or RMSprop of PyTorch, perhaps wrapped by Lightning.
        gradients: The gradients of the step under way, by the parameter's id: v is then that after this step, and a
            parameter needs no state before it. If None, v is that of the last step.

    Raises:
        ValueError: if the optimizer is of another kind.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    entry = check_adaptive(optimizer)
    found: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if gradients is None and entry not in state:
                continue
            gradient = None if gradients is None else gradients.get(id(parameter))
            if gradients is not None and gradient is None:
                continue
            if gradient is not None and not _is_decoupled(optimizer, group):  # then v has the decay in it too
                gradient = gradient + group["weight_decay"] * parameter.detach()
            found[id(parameter)] = divisor(optimizer, group, state, gradient)
    return found


def divisor(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor | None = None
) -> Tensor:
    """Return sqrt(v) + epsilon of a parameter, by which an optimizer divides its step.

    Args:
        optimizer: The optimizer.
        group: The group of the parameter.
        state: The state of the parameter.
        gradient: The gradient of the step under way, which v is to have in it; None for v as it is.
    """
    entry = check_adaptive(optimizer)
    decay = group["alpha"] if entry == "square_avg" else group["betas"][1]
    steps, square = float(state.get("step", 0)), state.get(entry)
    if gradient is not None:
        own = gradient.detach().float().square() * (1 - decay)
        square, steps = own if square is None else own.add_(square.float() * decay), steps + 1
    assert square is not None
    mean = square.float()
    if entry == "square_avg":
        if group["centered"] and "grad_avg" in state:
            mean = (mean - state["grad_avg"].float().square()).clamp(min=0)
        return mean.sqrt() + group["eps"]
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        mean = torch.maximum(mean, state["max_exp_avg_sq"].float())
    return (mean / (1 - decay**steps)).sqrt() + group["eps"]


def check_adaptive(optimizer: torch.optim.Optimizer) -> str:
    """Return the entry of an optimizer's state that has the mean square of the gradient.

    Raises:
        ValueError: if none is known.
    """
    names = [kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim")]
    entry = next((_MEAN_SQUARES[name] for name in names if name in _MEAN_SQUARES), None)
    if entry is None:
        raise ValueError(
            f"{type(optimizer).__name__} has no mean square of gradients that is known here, as PyTorch's own "
            f"{', '.join(_MEAN_SQUARES)} have; use fit_preconditioner(module, batches), or none: SGD needs none."
        )
    return entry


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether weight decay is no part of the gradient."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
