"""A number that identifies weights, so that gradients at different weights are never mixed up.

    fingerprint = sum_p m^p (sum_j c_j sum_i words[i W + j] + numel_p)   modulo 2^64

words   the bytes of parameter p, eight to an integer, zero-padded
c_j     an odd multiplier for place j of W
m       an odd multiplier, which makes the order of parameters matter

Integer sums are exact in every order, hence the same on each device. Swapping whole runs of W words within a
parameter is not seen; training does no such thing. One pass over the parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.functional import every_parameter
from lightning_sketch.operators.random import Key, words

_W = 4096
_M = 0x9E3779B97F4A7C15
_TOGETHER = 256  # tensors whose sums are computed at once, with at most 64 kB of memory for each


# Words of frozen tensors by their ids, each with the version of the tensor that they are of.
Known = dict[int, tuple[int, int]]


def fingerprint(tensors: Sequence[Tensor], known: Known | None = None) -> int:
    """Return a 64-bit signed integer that identifies the contents of these tensors, in their order; never 0.

    Args:
        tensors: The tensors.
        known: Where the sums of frozen parameters are kept from one call to the next, as long as their versions are the
            same; a change through `.data` is not seen then.

    >>> fingerprint([torch.zeros(3)]) == fingerprint([torch.zeros(3)]) != fingerprint([torch.ones(3)])
    True
    """
    frozen = [known is not None and isinstance(t, nn.Parameter) and not t.requires_grad for t in tensors]
    sums: dict[int, int] = {}  # by the places of the tensors
    for place, tensor in enumerate(tensors):
        if known is not None and frozen[place]:  # a tensor of inference mode has no version
            version, found = known.get(id(tensor), (-1, 0))
            if version == tensor._version:
                sums[place] = found
    places = [place for place in range(len(tensors)) if place not in sums]
    for device in {tensors[place].device for place in places}:
        here = [place for place in places if tensors[place].device == device]
        for first in range(0, len(here), _TOGETHER):
            some = here[first : first + _TOGETHER]
            sums.update(zip(some, _sums([tensors[place] for place in some], device), strict=True))
    total = 0
    for place, tensor in enumerate(tensors):
        if known is not None and frozen[place]:
            known[id(tensor)] = tensor._version, sums[place]
        total = (total * _M + sums[place]) % (1 << 64)
    return (total - (1 << 64) if total >= 1 << 63 else total) or 1


@torch.no_grad()
def _sums(tensors: Sequence[Tensor], device: torch.device) -> list[int]:
    """Return the weighted sum of the words of each tensor, and its size; the device is waited for once.

    Whole runs of words are added up; the sums and what is left of a tensor become rows of one matrix.
    """
    run = 8 * _W  # bytes
    zeros = torch.zeros(run, dtype=torch.uint8, device=device)
    parts, counts = [zeros[:0]], []
    for tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if data.data_ptr() % 8:
            data = data.clone()
        whole = len(data) // run * run
        if whole:
            parts.append(data[:whole].view(torch.int64).view(-1, _W).sum(0).view(torch.uint8))
        if whole < len(data):
            parts += [data[whole:], zeros[: run - len(data) + whole]]
        counts.append(bool(whole) + (whole < len(data)))
    rows = torch.cat(parts).view(torch.int64).view(-1, _W)
    found = iter((rows * (words(Key(0, "fingerprint"), 0, _W, device) | 1)).sum(1).tolist())
    return [sum(next(found) for _ in range(count)) + t.numel() for count, t in zip(counts, tensors, strict=True)]


def module_fingerprint(module: nn.Module, known: Known | None = None) -> int:
    """Return a fingerprint of all that the loss of a module depends on: parameters, frozen ones too, and buffers.

    Counters do not count: buffers of one whole number, such as the number of batches that a batch norm has seen. It is
    0 (unknown) if parameters are sharded, since no process has all of them.

    Args:
        module: The module.
        known: As in `fingerprint`.

    >>> frozen = nn.Linear(2, 2).requires_grad_(False)
    >>> before = module_fingerprint(frozen)
    >>> _ = frozen.bias.add_(1)
    >>> module_fingerprint(frozen) != before
    True
    """
    parameters = every_parameter(module)
    if any(hasattr(parameter, "placements") for parameter in parameters):
        return 0
    buffers = [b for b in module.buffers() if b.ndim or b.is_floating_point() or b.is_complex()]
    return fingerprint([*parameters, *buffers], known)
