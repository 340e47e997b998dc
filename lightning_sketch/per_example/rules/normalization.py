"""Gradients of the scale and shift of normalizations, and which normalizations couple examples.

    y = w . z + b        z = normalized x        grad w = sum z . g,  grad b = sum g

over the axes along which w and b are repeated; z is computed again from x.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sketch.per_example.factors import Dense, Factor, Unsupported, wide
from lightning_sketch.per_example.rules.registry import built_in

_Function = Callable[[Tensor], Tensor]


def couples(module: nn.Module) -> list[str]:
    """Return the names of layers that normalize by statistics of the whole batch, as batch norm does in training.

    The gradient of the batch's loss is then no sum of gradients of losses of one example each: an example's row is
    its contribution, which depends on the other examples.

    >>> couples(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()))
    ['1']
    """
    return [name for name, part in module.named_modules() if isinstance(part, _BatchNorm) and _of_the_batch(part)]


@built_in(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `nn.LayerNorm`."""
    shape = list(module.normalized_shape)
    return _trailing(module, len(shape), input, gradient, lambda x: F.layer_norm(x, shape, eps=module.eps))


@built_in(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `nn.RMSNorm`."""
    shape, eps = list(module.normalized_shape), torch.finfo(input.dtype).eps if module.eps is None else module.eps
    return _trailing(module, len(shape), input, gradient, lambda x: F.rms_norm(x, shape, eps=eps))


@built_in(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `nn.GroupNorm`."""
    return _channels(module, input, gradient, lambda x: F.group_norm(x, module.num_groups, eps=module.eps))


@built_in(_BatchNorm)
def batch_norm(module: _BatchNorm, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `nn.BatchNorm1d`, `2d`, `3d`, whose scale and shift split exactly in either mode."""
    statistics = (None, None) if _of_the_batch(module) else (module.running_mean, module.running_var)

    def normalized(x: Tensor) -> Tensor:
        mean, variance = (None if t is None else t.to(x.dtype) for t in statistics)
        return F.batch_norm(x, mean, variance, training=mean is None, eps=module.eps)

    return _channels(module, input, gradient, normalized)


def _of_the_batch(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def _trailing(module: nn.Module, axes: int, input: Tensor, gradient: Tensor, normalized: _Function) -> list[Factor]:
    """Return the factors of parameters that lie along the last axes."""
    if gradient.ndim <= axes:
        raise Unsupported(f"it normalizes all {axes} axes of its input, which leaves none for examples")
    size = cast(Tensor, module.weight).numel()
    return _scale_and_shift(module, input, gradient, normalized, lambda t: t.reshape(len(t), -1, size).sum(1))


def _channels(module: nn.Module, input: Tensor, gradient: Tensor, normalized: _Function) -> list[Factor]:
    """Return the factors of parameters that lie along the second axis."""
    return _scale_and_shift(module, input, gradient, normalized, lambda t: t.flatten(2).sum(2) if t.ndim > 2 else t)


def _scale_and_shift(
    module: nn.Module, input: Tensor, gradient: Tensor, normalized: _Function, total: _Function
) -> list[Factor]:
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, getattr(module, "bias", None))
    gradient = wide(gradient)
    factors: list[Factor] = []
    if weight.requires_grad:
        factors.append(Dense(weight, total(normalized(wide(input)) * gradient)))
    if bias is not None and bias.requires_grad:
        factors.append(Dense(bias, total(gradient)))
    return factors
