"""Gradients of convolutions, as products: each place of the output is a product with one patch of the input.

    y_t = W p_t + b        grad W = sum_t g_t p_tᵀ,  grad b = sum_t g_t

p_t    the patch under the kernel at place t, as a vector of (channels, kernel) numbers

With groups, each group of output channels reads its own input channels. Patches are a strided view of the padded
input, copied once.
"""

from typing import cast

import torch.nn.functional as F
from torch import Size, Tensor, nn

from lightning_sketch.per_example.factors import Bias, Dense, Factor, LowRank, Unsupported, wide
from lightning_sketch.per_example.rules.registry import built_in

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# The most groups that are given as a product each; with more, the gradients are small and formed at once.
_MAX_PRODUCTS = 8


@built_in(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: _Convolution, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of a convolution, with any stride, padding, dilation and groups."""
    if gradient.ndim != len(module.kernel_size) + 2:
        raise Unsupported("its input has no axis of examples")
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    out, trained = wide(gradient).flatten(2), bias if bias is not None and bias.requires_grad else None
    if weight.requires_grad and module.groups <= _MAX_PRODUCTS:
        return _products(weight, trained, module.groups, _patches(module, wide(input), gradient.shape[2:]), out)
    factors: list[Factor] = []
    if weight.requires_grad:
        patches = _patches(module, wide(input), gradient.shape[2:]).transpose(2, 3)
        factors.append(Dense(weight, (out.unflatten(1, (module.groups, -1)) @ patches).flatten(1)))
    if trained is not None:
        factors.append(Dense(trained, out.sum(2)))
    return factors


def _products(
    weight: nn.Parameter, bias: nn.Parameter | None, groups: int, patches: Tensor, out: Tensor
) -> list[Factor]:
    """Return a factor for each group from (examples, groups, numbers, places) and (examples, channels, places)."""
    left, right = out.unflatten(1, (groups, -1)).transpose(2, 3), patches.transpose(2, 3)
    size, channels = weight.numel() // groups, left.shape[3]
    biases = [None if bias is None else Bias(bias, start=i * channels) for i in range(groups)]
    return [LowRank(weight, left[:, i], right[:, i], i * size, bias=biases[i]) for i in range(groups)]


def _patches(module: _Convolution, input: Tensor, places: Size) -> Tensor:
    """Return the patches under the kernel, (examples, groups, numbers, places)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice  # also where padding is a string, such as "same"
    if any(padding):
        input = F.pad(input, padding, mode=mode)
    examples, channels, *strides = input.stride()
    size = (*input.shape[:2], *module.kernel_size, *places)
    within = [d * s for d, s in zip(module.dilation, strides, strict=True)]
    along = [step * s for step, s in zip(module.stride, strides, strict=True)]
    view = input.as_strided(size, (examples, channels, *within, *along), input.storage_offset())
    return view.reshape(len(input), module.groups, -1, places.numel())
