"""A number that identifies weights, so that gradients at different weights are never mixed up.

    fingerprint = sum_p m^p (sum_j c_j sum_i words[i W + j] + numel_p)   modulo 2^64

words   the bytes of parameter p, eight to an integer, zero-padded
c_j     an odd multiplier for place j of W
m       an odd multiplier, which makes the order of parameters matter

Integer sums are exact in every order, hence the same on each device. Swapping whole runs of W words within a
parameter is not seen; training does no such thing. One pass over the parameters.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_sketch.autodiff.functional import every_parameter
from lightning_sketch.operators.random import Key, words

_W = 4096
_M = 0x9E3779B97F4A7C15
_RUN = 8 * _W  # bytes of a run of words
_TOGETHER = 1 << 26  # bytes of tensors whose sums are computed at once


# Sums of frozen tensors by their ids, each with the version of the tensor that it is of.
Known = dict[int, tuple[int, Tensor]]


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Return a 64-bit signed integer that identifies the contents of these tensors, in their order; never 0.

    >>> fingerprint([torch.zeros(3)]) == fingerprint([torch.zeros(3)]) != fingerprint([torch.ones(3)])
    True
    """
    return int(fingerprint_on_device(tensors))


def short(fingerprint: int) -> str:
    """Return a fingerprint as messages show it: its first eight hexadecimal digits, or a small number as it is.

    >>> short(-7401121462729042896), short(0)
    ('9949ef3e', '0')
    """
    return str(fingerprint) if abs(fingerprint) < 1 << 32 else f"{fingerprint % (1 << 64):016x}"[:8]


def fingerprint_on_device(tensors: Sequence[Tensor], known: Known | None = None) -> Int[Tensor, ""]:
    """Return the fingerprint as a number on the device of the first tensor, without waiting for that device.

    Args:
        tensors: The tensors.
        known: Where the sums of frozen parameters are kept from one call to the next, as long as their versions are the
            same; a change through `.data` is not seen then.
    """
    frozen = [known is not None and isinstance(t, nn.Parameter) and not t.requires_grad for t in tensors]
    sums: dict[int, Tensor] = {}  # by the places of the tensors
    for place, tensor in enumerate(tensors):
        if known is not None and frozen[place]:  # a tensor of inference mode has no version
            version, found = known.get(id(tensor), (-1, tensor))
            if version == tensor._version:
                sums[place] = found
    places = [place for place in range(len(tensors)) if place not in sums]
    for device in {tensors[place].device for place in places}:
        here = [place for place in places if tensors[place].device == device]
        sums.update(zip(here, _sums([tensors[place] for place in here], device).unbind(), strict=True))
    if known is not None:
        known.update((id(t), (t._version, sums[place])) for place, t in enumerate(tensors) if frozen[place])
    if not tensors:
        return torch.tensor(1)
    device = tensors[0].device
    powers = _numbers(tuple(_signed(pow(_M, i, 1 << 64)) for i in reversed(range(len(tensors)))), device)
    total = (torch.stack([sums[place].to(device) for place in range(len(tensors))]) * powers).sum()
    return total + (total == 0)


def _signed(number: int) -> int:
    """Return the signed integer of 64 bits that is the same modulo 2^64."""
    return number - (1 << 64) if number >= 1 << 63 else number


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[int, ...], device: torch.device) -> Int[Tensor, " values"]:
    """Return integers on a device; kept, since copies to a device wait for it."""
    return torch.tensor(values, device=device)


@torch.no_grad()
def _sums(tensors: Sequence[Tensor], device: torch.device) -> Int[Tensor, " tensors"]:
    """Return, for each tensor, the weighted sum of its words plus its size.

    Runs of words are rows of a matrix. Tensors are copied into it as they are, except large ones: of these the sum of
    all whole runs is.
    """
    large = _RUN if device.type == "cpu" else _TOGETHER  # bytes; on a GPU copies are cheaper than many small launches
    zeros = torch.zeros(_RUN, dtype=torch.uint8, device=device)
    multipliers = words(Key(0, "fingerprint"), 0, _W, device) | 1
    found, counts = [zeros.new_zeros(1, dtype=torch.int64)], [0]
    parts: list[Tensor] = []
    size = 0

    def add_rows() -> None:
        rows = torch.cat(parts).view(torch.int64).view(-1, _W)
        found.append((rows * multipliers).sum(1))
        parts.clear()

    for tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if data.data_ptr() % 8:
            data = data.clone()
        count = 0
        if len(data) >= large:
            whole = len(data) // _RUN * _RUN
            parts.append(data[:whole].view(torch.int64).view(-1, _W).sum(0).view(torch.uint8))
            data, count = data[whole:].clone(), 1  # without the rest, which may be a copy
        padding = -len(data) % _RUN
        parts += [data, zeros[:padding]] if padding else [data]
        count += (len(data) + padding) // _RUN
        counts.append(count)
        size += count * _RUN
        if size >= _TOGETHER:
            add_rows()
            size = 0
    if size:
        add_rows()
    # Sums of all rows so far, modulo 2^64, at the ends of the tensors.
    ends = torch.cat(found).cumsum(0)[_numbers(tuple(itertools.accumulate(counts)), device)]
    return ends.diff() + _numbers(tuple(tensor.numel() for tensor in tensors), device)


def module_fingerprint(module: nn.Module) -> int:
    """Return a fingerprint of all that the loss of a module depends on: parameters, frozen ones too, and buffers.

    Counters do not count: buffers of one whole number, such as the number of batches that a batch norm has seen. It is
    0 (unknown) if parameters are sharded, since no process has all of them.

    >>> frozen = nn.Linear(2, 2).requires_grad_(False)
    >>> before = module_fingerprint(frozen)
    >>> _ = frozen.bias.add_(1)
    >>> module_fingerprint(frozen) != before
    True
    """
    return int(module_fingerprint_on_device(module))


def module_fingerprint_on_device(module: nn.Module, known: Known | None = None) -> Int[Tensor, ""]:
    """Return the fingerprint of a module as a number on its device; `known` is that of `fingerprint_on_device`."""
    parameters = every_parameter(module)
    if any(hasattr(parameter, "placements") for parameter in parameters):
        return torch.tensor(0)
    buffers = [b for b in module.buffers() if b.ndim or b.is_floating_point() or b.is_complex()]
    return fingerprint_on_device([*parameters, *buffers], known)
