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
from torch import Tensor

from lightning_sketch.operators.random import Key, words

_W = 4096
_M = 0x9E3779B97F4A7C15


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Return a 64-bit signed integer that identifies the contents of these tensors, in their order; never 0.

    >>> fingerprint([torch.zeros(3)]) == fingerprint([torch.zeros(3)]) != fingerprint([torch.ones(3)])
    True
    """
    total = 0
    multipliers = functools.lru_cache(lambda device: words(Key(0, "fingerprint"), 0, _W, device) | 1)
    for tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if data.data_ptr() % 8:
            data = data.clone()
        whole = len(data) // (8 * _W) * (8 * _W)
        tail = data.new_zeros(8 * _W)
        tail[: len(data) - whole] = data[whole:]
        columns = data[:whole].view(torch.int64).view(-1, _W).sum(0) + tail.view(torch.int64)
        total = (total * _M + int((columns * multipliers(data.device)).sum()) + tensor.numel()) % (1 << 64)
    return (total - (1 << 64) if total >= 1 << 63 else total) or 1
