"""Gradients of convolutions, as products: every place of the output saw one patch of the input.

    y_t = W p_t + b        grad W = sum_t g_t p_tᵀ,  grad b = sum_t g_t

p_t    the patch under the kernel at place t, as a vector of (channels, kernel) numbers

With groups, each group of output channels saw its own channels. Patches are a strided view of the padded input,
copied once.
"""

import torch.nn.functional as F
from torch import Size, Tensor, nn

from lightning_sketch.per_example.factors import Dense, Factor, LowRank, Unsupported, wide
from lightning_sketch.per_example.rules.registry import built_in

_FEW = 8
"""Groups up to which each is a product of its own; with more, the gradients are small and made at once."""


@built_in(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Module, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Factors of `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with any stride, padding, dilation and groups."""
    if gradient.ndim != len(module.kernel_size) + 2:
        raise Unsupported("its input has no axis of examples")
    out = wide(gradient).flatten(2)
    factors: list[Factor] = []
    if module.weight.requires_grad:
        factors += _weight(module, _patches(module, wide(input), gradient.shape[2:]), out)
    if module.bias is not None and module.bias.requires_grad:
        factors.append(Dense(module.bias, out.sum(2)))
    return factors


def _weight(module: nn.Module, patches: Tensor, out: Tensor) -> list[Factor]:
    """From (examples, groups, numbers, places) and (examples, channels, places)."""
    weight, groups = module.weight, module.groups
    out = out.unflatten(1, (groups, -1))
    if groups > _FEW:
        return [Dense(weight, (out @ patches.transpose(2, 3)).flatten(1))]
    left, right, size = out.transpose(2, 3), patches.transpose(2, 3), weight.numel() // groups
    return [LowRank(weight, left[:, i], right[:, i], start=i * size) for i in range(groups)]


def _patches(module: nn.Module, input: Tensor, places: Size) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice  # that of a string, such as 'same', is worked out there too
    if any(padding):
        input = F.pad(input, padding, mode=mode)
    examples, channels, *strides = input.stride()
    size = (*input.shape[:2], *module.kernel_size, *places)
    within = [d * s for d, s in zip(module.dilation, strides, strict=True)]
    along = [step * s for step, s in zip(module.stride, strides, strict=True)]
    view = input.as_strided(size, (examples, channels, *within, *along), input.storage_offset())
    return view.reshape(len(input), module.groups, -1, places.numel())
