"""Gradients of `nn.MultiheadAttention`, from the products that it makes inside.

It multiplies by its matrices through `torch.nn.functional.linear`, without calling a layer. That function is wrapped
while its forward runs, and put back after; a wrapped call returns what the plain one does. The function is the whole
process's: each thread hears of its own calls only, and the last of all threads puts it back.

Whatever `batch_first` says, inputs are (tokens, examples, numbers) inside, and (tokens x examples, numbers) before the
last product. A matrix may be a slice of `in_proj_weight`.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.per_example.factors import Dense, Factor, LowRank, wide
from lightning_sketch.per_example.rules.registry import RULES, Recorder, Rule

_OWN = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Listener = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""(input, weight, bias, output) of a call of `torch.nn.functional.linear`."""


class _Listeners(threading.local):
    """Those of one thread."""

    def __init__(self):
        self.here: list[Listener] = []


_listeners = _Listeners()
_lock = threading.Lock()
_calls = 0  # of attention, going on in all threads together
_plain: Callable[..., Tensor] | None = None


def watch(module: nn.MultiheadAttention, one: Recorder) -> None:
    """Record F.linear calls inside this attention in forward passes of the pass, and emit factors of its matrices."""
    heard: list[_Products] = []

    def before(module: nn.MultiheadAttention, args: tuple) -> None:
        if one.acts(module) and one.wanted(_matrices(module)):
            heard.append(_Products(module, one))
            one.handles.append(heard[-1])
            listen(heard[-1])

    def after(module: nn.MultiheadAttention, args: tuple, output: Any) -> None:
        if heard:
            heard.pop().remove()

    one.handles.append(module.register_forward_pre_hook(before))
    one.handles.append(module.register_forward_hook(after, always_call=True))


class _Products:
    """Listens during one call of an attention."""

    def __init__(self, module: nn.MultiheadAttention, one: Recorder):
        self._own, self._pass = one.wanted(_matrices(module)), one
        self._sequences: int | None = None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        one = self._pass
        if input.ndim == 3:
            self._sequences = input.shape[1]
        matrix, shift = _within(weight, self._own), _within(bias, self._own)
        wanted = [place[0] for place in (matrix, shift) if place is not None]
        if not wanted or not output.requires_grad:
            return
        one.taken |= {id(p) for p in wanted}
        if self._sequences == one.examples:
            make = partial(_pieces, matrix, shift, one.examples)
            one.on_gradient(output, wanted, make, None if matrix is None else input.detach())
        else:
            one.explain(wanted, f"the attention was called with {self._sequences} sequences, not {one.examples}")

    def remove(self) -> None:
        """Stop listening."""
        stop(self)


def _matrices(module: nn.MultiheadAttention) -> list[nn.Parameter | None]:
    """Return the parameters that are multiplied by, with their biases."""
    last = module.out_proj._parameters
    return [*(module._parameters.get(name) for name in _OWN), last.get("weight"), last.get("bias")]


def listen(listener: Listener) -> None:
    """Tell the listener of calls of `linear` in this thread, from now on."""
    global _plain, _calls
    with _lock:
        if not _calls:
            _plain = torch.nn.functional.linear
            torch.nn.functional.linear = _heard
        _calls += 1
    _listeners.here.append(listener)


def stop(listener: Listener) -> None:
    """Tell it no more; with the last one of all threads, the plain function is back."""
    global _calls
    if listener not in _listeners.here:
        return
    _listeners.here.remove(listener)
    with _lock:
        _calls -= 1
        if not _calls:
            torch.nn.functional.linear = _plain


def _heard(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = _plain(input, weight, bias)
    for listener in tuple(_listeners.here):
        listener(input, weight, bias, output)
    return output


Place = tuple[nn.Parameter, int]
"""A parameter, and where a slice of it begins."""


def _within(part: Tensor | None, parameters: list[nn.Parameter]) -> Place | None:
    for parameter in parameters if part is not None else ():
        if part is parameter or part._base is parameter:
            row = (part.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            return parameter, row * (parameter.numel() // len(parameter))
    return None


def _pieces(
    matrix: Place | None, shift: Place | None, examples: int, input: Tensor | None, gradient: Tensor
) -> list[Factor]:
    left = _by_example(gradient, examples)
    factors: list[Factor] = []
    if matrix is not None:
        factors.append(LowRank(matrix[0], left, _by_example(input, examples), matrix[1]))
    if shift is not None:
        factors.append(Dense(shift[0], left.sum(1), shift[1]))
    return factors


def _by_example(tensor: Tensor, examples: int) -> Tensor:
    """(tokens, examples, n) or (tokens x examples, n) as (examples, tokens, n)."""
    return wide(tensor).reshape(-1, examples, tensor.shape[-1]).transpose(0, 1)


RULES[nn.MultiheadAttention] = Rule(watch=watch, names=None)
