"""Gradients of `nn.MultiheadAttention`, from the products that it makes inside.

It multiplies by its matrices through `torch.nn.functional.linear`, without calling a layer. That function is wrapped
while its forward runs, and put back after; a wrapped call returns what the plain one does.

Whatever `batch_first` says, inputs are (tokens, examples, numbers) inside, and (tokens x examples, numbers) before the
last product. A matrix may be a slice of `in_proj_weight`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_sketch.gradients.pieces import Full, NotServed, Outer, Piece, wide

_OWN = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Listener = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""(input, weight, bias, output) of a call of `torch.nn.functional.linear`."""

_listeners: list[Listener] = []
_plain: Callable[..., Tensor] | None = None


def matrices(module: nn.MultiheadAttention) -> Iterator[nn.Parameter]:
    """The parameters that are multiplied by, with their biases."""
    own = (module._parameters.get(name) for name in _OWN)
    for parameter in (*own, module.out_proj._parameters.get("weight"), module.out_proj._parameters.get("bias")):
        if parameter is not None:
            yield parameter


def listen(listener: Listener) -> None:
    """Tell the listener of calls of `linear`, from now on."""
    global _plain
    if not _listeners:
        _plain = torch.nn.functional.linear
        torch.nn.functional.linear = _heard
    _listeners.append(listener)


def stop(listener: Listener) -> None:
    """Tell it no more; with the last one, the plain function is back."""
    global _plain
    if listener in _listeners:
        _listeners.remove(listener)
        if not _listeners:
            torch.nn.functional.linear, _plain = _plain, None


def _heard(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = _plain(input, weight, bias)
    for listener in tuple(_listeners):
        listener(input, weight, bias, output)
    return output


def within(part: Tensor | None, parameters: list[nn.Parameter]) -> tuple[nn.Parameter, int] | None:
    """The parameter that a tensor is, or is a slice of, and where it starts in it."""
    for parameter in parameters if part is not None else ():
        if part is parameter or part._base is parameter:
            return parameter, part.storage_offset() - parameter.storage_offset()
    return None


def product_pieces(
    weight: tuple[nn.Parameter, int] | None,
    bias: tuple[nn.Parameter, int] | None,
    input: Tensor | None,
    gradient: Tensor,
    examples: int,
) -> list[Piece]:
    """Pieces of one product: parameters with where they start, input (None: not needed), gradient of the output."""
    left = _by_example(gradient, examples)
    pieces: list[Piece] = []
    if weight is not None and input is not None:
        if not weight[0].is_contiguous():
            raise NotServed("its memory is not in row-major order, so a slice of it cannot be placed")
        pieces.append(Outer(weight[0], left, _by_example(input, examples), weight[1]))
    if bias is not None:
        pieces.append(Full(bias[0], left.sum(1), bias[1]))
    return pieces


def _by_example(tensor: Tensor, examples: int) -> Tensor:
    """(tokens, examples, n) or (tokens x examples, n) as (examples, tokens, n)."""
    return wide(tensor).reshape(-1, examples, tensor.shape[-1]).transpose(0, 1)
