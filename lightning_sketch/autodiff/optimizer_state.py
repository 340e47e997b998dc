"""The diagonal P by which Adam and its like divide their steps, read from an optimizer's state.

    Adam       P_t = sqrt(v_t / (1 - b^t)) + epsilon,      v_t = b v_{t-1} + (1 - b) g_t²
    RMSprop    P_t = sqrt(v_t) + epsilon,                  v_t the same, with alpha for b
    Adamax     P_t = u_t,                                  u_t = max(b u_{t-1}, |g_t| + epsilon)
    Adagrad    P_t = (sqrt(s_t) + epsilon) (1 + (t - 1) d),    s_t = s_{t-1} + g_t²

g_t    the gradient of step t, clipped, with the weight decay in it unless this is decoupled, as AdamW's is
b      the second of `betas`
d      the decay of Adagrad's learning rate

Source: Kingma and Ba (2015), arXiv:1412.6980, algorithms 1 and 2; Loshchilov and Hutter (2019), arXiv:1711.05101, for
decay; Duchi, Hazan and Singer (2011), JMLR 12, for Adagrad.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The entry of an optimizer's state from which P is computed, by the name of its class.
_ENTRIES = {
    "Adam": "exp_avg_sq",
    "AdamW": "exp_avg_sq",
    "NAdam": "exp_avg_sq",
    "RMSprop": "square_avg",
    "Adamax": "exp_inf",
    "Adagrad": "sum",
}

# Why an optimizer has no such P, by a part of the name of its class in lower case.
_WITHOUT = {
    "8bit": "keeps its mean squares in 8 bits, in blocks that only its own kernels decode",
    "4bit": "keeps its mean squares in 4 bits, in blocks that only its own kernels decode",
    "adafactor": "keeps sums of squares over rows and columns instead of one mean square per number",
    "lbfgs": "multiplies the gradient by an inverse Hessian that is not diagonal, and may search along a line",
    "lion": "steps by the sign of its momentum, which no diagonal divides",
    "muon": "makes the momentum of each matrix orthogonal, which no diagonal divides",
    "shampoo": "multiplies the gradient of each matrix from both sides, by matrices that are not diagonal",
    "soap": "runs Adam in the eigenvectors of Shampoo's matrices, where its mean squares are not of parameters",
    "sgd": "has no mean square of gradients: it divides its steps by nothing, and needs no preconditioner",
}


def divisors(optimizer: torch.optim.Optimizer, gradients: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
    """Return the diagonal P of each parameter that has taken a step, by the parameter's id.

    Args:
        optimizer: Adam, AdamW, NAdam, Adamax, RMSprop or Adagrad of PyTorch, perhaps wrapped by Lightning.
        gradients: The gradients of the step under way, by the parameter's id: P is then that of this step, and a
            parameter needs no state before it. If None, P is that of the last step.

    Returns:
        Tensors in the shapes of the parameters, in float32, or float64 where the state is.

    Raises:
        ValueError: if the optimizer is of another kind.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    entry = check_adaptive(optimizer)
    found: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if gradients is None and (entry not in state or not float(state.get("step", 1))):
                continue
            gradient = None if gradients is None else gradients.get(id(parameter))
            if gradients is not None and gradient is None:
                continue
            if gradient is not None and not _is_decoupled(optimizer, group):  # then P has the decay in it too
                gradient = gradient + group["weight_decay"] * parameter.detach()
            found[id(parameter)] = divisor(optimizer, group, state, gradient)
    return found


def divisor(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor | None = None
) -> Tensor:
    """Return the diagonal P of a parameter, by which an optimizer divides its step.

    Args:
        optimizer: The optimizer.
        group: The group of the parameter.
        state: The state of the parameter.
        gradient: The gradient of the step under way, which P is to have in it; None for P of the last step.
    """
    entry = check_adaptive(optimizer)
    steps, kept = float(state.get("step", 0)), state.get(entry)
    kept = None if kept is None else _wide(kept)
    if gradient is not None:
        kept, steps = _updated(entry, group, kept, _wide(gradient.detach())), steps + 1
    assert kept is not None
    if entry == "exp_inf":
        return kept
    if entry == "sum":
        return (kept.sqrt() + group["eps"]) * (1 + (steps - 1) * group["lr_decay"])
    if entry == "square_avg":
        if group["centered"]:
            center = _wide(state["grad_avg"]) if "grad_avg" in state else torch.zeros_like(kept)
            center = center if gradient is None else center.lerp(_wide(gradient.detach()), 1 - group["alpha"])
            kept = (kept - center.square()).clamp(min=0)
        return kept.sqrt() + group["eps"]
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        kept = torch.maximum(kept, _wide(state["max_exp_avg_sq"]))
    return (kept / (1 - group["betas"][1] ** steps)).sqrt() + group["eps"]


def check_adaptive(optimizer: torch.optim.Optimizer) -> str:
    """Return the entry of an optimizer's state from which P is computed.

    Raises:
        ValueError: if none is known; the message says why.
    """
    names = [kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim")]
    entry = next((_ENTRIES[name] for name in names if name in _ENTRIES), None)
    if entry is None:
        own = type(optimizer).__name__
        why = next((reason for part, reason in _WITHOUT.items() if part in own.lower()), None)
        raise ValueError(
            f"{own} {why or 'has no mean square of gradients that is known here'}; known are PyTorch's own "
            f"{', '.join(_ENTRIES)}. Use another kind of preconditioner, or none."
        )
    return entry


def with_optimizers(
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> list[tuple[torch.optim.Optimizer, Mapping[str, Any]]]:
    """Return each param group that has parameters, with its optimizer.

    Args:
        optimizers: One optimizer or several, perhaps wrapped by Lightning.
        groups: The groups with the options that steps use, where they are not those of `param_groups`; every one has a
            parameter of one of the optimizers.
    """
    several = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    plain = [getattr(one, "optimizer", one) for one in several]
    own = [(one, group) for one in plain for group in one.param_groups if group["params"]]
    if groups is None:
        return own
    owner = {id(parameter): one for one, group in own for parameter in group["params"]}
    return [(owner[id(group["params"][0])], group) for group in groups if group["params"]]


def _updated(entry: str, group: Mapping[str, Any], kept: Tensor | None, gradient: Tensor) -> Tensor:
    """Return an entry of the state as it is after a step with this gradient; None is an entry before the first."""
    if entry == "exp_inf":
        own = gradient.abs() + group["eps"]
        return own if kept is None else torch.maximum(kept * group["betas"][1], own)
    if entry == "sum":
        own = gradient.square()
        return own if kept is None else own + kept
    decay = group["alpha"] if entry == "square_avg" else group["betas"][1]
    own = gradient.square() * (1 - decay)
    return own if kept is None else own.add_(kept * decay)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether weight decay is no part of the gradient."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
