"""A number that identifies weights, so that gradients at different weights are never mixed up.

    fingerprint = sum_p m^p (sum_j c_j sum_i words[i W + j] + numel_p)   modulo 2^64

words   the bytes of parameter p, eight to an integer, zero-padded
c_j     an odd multiplier for place j of W
m       an odd multiplier, which makes the order of parameters matter

Integer sums are exact in every order, hence the same on each device. Swapping whole runs of W words within a
parameter is not seen; training does no such thing. One pass over the parameters.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.functional import every_parameter
from lightning_sketch.operators.random import Key, words

_W = 4096
_M = 0x9E3779B97F4A7C15


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
    total = 0
    multipliers = functools.lru_cache(lambda device: words(Key(0, "fingerprint"), 0, _W, device) | 1)
    for tensor in tensors:
        kept = known is not None and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        version, found = (known or {}).get(id(tensor), (-1, 0)) if kept else (-1, 0)
        if not kept or version != tensor._version:  # a tensor of inference mode has no version
            found = _sum(tensor, multipliers(tensor.device))
            if kept and known is not None:
                known[id(tensor)] = tensor._version, found
        total = (total * _M + found) % (1 << 64)
    return (total - (1 << 64) if total >= 1 << 63 else total) or 1


@torch.no_grad()
def _sum(tensor: Tensor, multipliers: Tensor) -> int:
    """Return the weighted sum of the words of a tensor, and its size."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    whole = len(data) // (8 * _W) * (8 * _W)
    tail = data.new_zeros(8 * _W)
    tail[: len(data) - whole] = data[whole:]
    columns = data[:whole].view(torch.int64).view(-1, _W).sum(0) + tail.view(torch.int64)
    return int((columns * multipliers).sum()) + tensor.numel()


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
