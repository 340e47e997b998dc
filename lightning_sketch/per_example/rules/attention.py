"""Gradients of `nn.MultiheadAttention`, from the matrix products inside it.

It multiplies by its matrices through `torch.nn.functional.linear`, without calling a layer. That function is wrapped
while an attention's forward pass runs, and restored afterwards; a wrapped call returns what the plain one does. The
function belongs to the whole process: each thread records only its own calls, and the last thread restores it.

Whatever `batch_first` says, inputs inside have the shape (tokens, examples, numbers), and (tokens x examples, numbers)
before the last product. A matrix may be a slice of `in_proj_weight`.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.per_example.factors import Bias, Dense, Factor, LowRank, wide
from lightning_sketch.per_example.rules.registry import RULES, Recorder, Rule

_OWN = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# Called with (input, weight, bias, output) of each call of `torch.nn.functional.linear`.
_Listener = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]

# A parameter, and where a slice of it begins in the flat parameter.
_Place = tuple[nn.Parameter, int]


class _Listeners(threading.local):
    """The listeners of one thread."""

    def __init__(self) -> None:
        self.here: list[_Listener] = []


_listeners = _Listeners()
_lock = threading.Lock()
_calls = 0  # calls of attention that are running now, in all threads together
_plain: Callable[..., Tensor] = torch.nn.functional.linear  # what a wrapped call passes on to


def watch(module: nn.MultiheadAttention, recorder: Recorder) -> None:
    """Record the calls of `linear` inside this attention in passes of the batch, and emit factors of its matrices."""
    running: list[_Products] = []

    def before(module: nn.MultiheadAttention, args: tuple) -> None:
        if recorder.acts(module) and recorder.wanted(_matrices(module)):
            running.append(_Products(module, recorder))
            recorder.handles.append(running[-1])
            _listen(running[-1])

    def after(module: nn.MultiheadAttention, args: tuple, output: Any) -> None:
        if running:
            running.pop().remove()

    recorder.handles.append(module.register_forward_pre_hook(before))
    recorder.handles.append(module.register_forward_hook(after, always_call=True))


class _Products:
    """A listener during one call of an attention.

    Args:
        module: The attention.
        recorder: The pass that gets the factors.
    """

    def __init__(self, module: nn.MultiheadAttention, recorder: Recorder):
        self._own, self._recorder = recorder.wanted(_matrices(module)), recorder
        self._sequences: int | None = None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        recorder = self._recorder
        if input.ndim == 3:
            self._sequences = input.shape[1]
        matrix, shift = _place_of(weight, self._own), _place_of(bias, self._own)
        wanted = [place[0] for place in (matrix, shift) if place is not None]
        if not wanted or not output.requires_grad:
            return
        recorder.taken |= {id(p) for p in wanted}
        if self._sequences == recorder.examples:
            make = partial(_factors, matrix, shift, recorder.examples)
            recorder.on_gradient(output, wanted, make, None if matrix is None else input.detach())
        else:
            reason = f"the attention was called with {self._sequences} sequences, not {recorder.examples}"
            recorder.explain(wanted, reason)

    def remove(self) -> None:
        """Stop listening."""
        _stop(self)


def _matrices(module: nn.MultiheadAttention) -> list[nn.Parameter | None]:
    """Return the matrices of an attention, with their biases."""
    last = module.out_proj._parameters
    return [*(module._parameters.get(name) for name in _OWN), last.get("weight"), last.get("bias")]


def _listen(listener: _Listener) -> None:
    """Pass all calls of `linear` in this thread to the listener, from now on."""
    global _plain, _calls
    with _lock:
        if not _calls:
            _plain = torch.nn.functional.linear
            torch.nn.functional.linear = _recorded
        _calls += 1
    _listeners.here.append(listener)


def _stop(listener: _Listener) -> None:
    """Pass no more calls to the listener; restore the plain function after the last one of all threads."""
    global _calls
    if listener not in _listeners.here:
        return
    _listeners.here.remove(listener)
    with _lock:
        _calls -= 1
        if not _calls:
            torch.nn.functional.linear = _plain


def _recorded(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call `linear`, and pass the call to the listeners of this thread."""
    output = _plain(input, weight, bias)
    for listener in tuple(_listeners.here):
        listener(input, weight, bias, output)
    return output


def _place_of(part: Tensor | None, parameters: list[nn.Parameter]) -> _Place | None:
    """Return which parameter a tensor is, or is a slice of, and where the slice begins; None if it is of none."""
    if part is None:
        return None
    for parameter in parameters:
        if part is parameter or part._base is parameter:
            row = (part.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            return parameter, row * (parameter.numel() // len(parameter))
    return None


def _factors(
    matrix: _Place | None, shift: _Place | None, examples: int, input: Tensor | None, gradient: Tensor
) -> list[Factor]:
    left = _by_example(gradient, examples)
    bias = None if shift is None else Bias(shift[0], start=shift[1])
    if matrix is not None and input is not None:
        return [LowRank(matrix[0], left, _by_example(input, examples), matrix[1], bias=bias)]
    return [] if shift is None else [Dense(shift[0], left.sum(1), shift[1])]


def _by_example(tensor: Tensor, examples: int) -> Tensor:
    """Return a tensor (tokens, examples, n) or (tokens x examples, n) in the shape (examples, tokens, n)."""
    return wide(tensor).reshape(-1, examples, tensor.shape[-1]).transpose(0, 1)


RULES[nn.MultiheadAttention] = Rule(watch=watch, names=None)
