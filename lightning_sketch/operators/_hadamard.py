"""The fast Walsh-Hadamard transform, by matrix products with small factors.

    H_1 = [1],   H_2m = [[H_m, H_m], [H_m, -H_m]],   H_ab = H_a ⊗ H_b        (entries ±1)

With a vector of size m = f_1 ··· f_k seen as a k-dimensional array, H_m is a product with H_f on each
axis: O(m log m) time, no stored matrix, and the same result for every choice of factors up to rounding.
H is symmetric, and H H = m I. On one CPU thread a factor of 16 costs what 4 to 5 passes of additions
would. Factors of 16, the remainder last, or a first one of 32 where the remainder were 2, are within 5 %
of the fastest choice tried for m from 2^7 to 2^18 there; on the contiguous last axis, which is transformed
first, products with less than 16 columns are slow.

Source: Fino & Algazi (1976), "Unified matrix treatment of the fast Walsh-Hadamard transform",
IEEE Trans. Computers C-25, doi:10.1109/TC.1976.1674569.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._precision import full_precision

CACHED = 1 << 18  # numbers handled at once on a CPU: 1 MB in float32, which stays in a core's second-level cache
LAUNCHED = 1 << 24  # and elsewhere: few launches of kernels, each long enough to hide the next one


def group_size(device: torch.device) -> int:
    """Return how many numbers a sketch handles at once on a device: 2^18 on a CPU, else 2^24."""
    return CACHED if device.type == "cpu" else LAUNCHED


def hadamard(x: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
    """Return H x along the last axis, unnormalized.

    Raises:
        ValueError: If the size of the last axis is no power of two.

    >>> hadamard(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    tensor([ 3., -1.,  3., -1.])
    """
    work = x.clone(memory_format=torch.contiguous_format)
    with full_precision(x.device):
        return transform_(work)


def transform_(x: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
    """Replace x by H x along the last axis, in place; x is contiguous, and its last axis any power of two.

    H_m = (H_outer ⊗ I)(I ⊗ H_inner): both steps run through pieces of `group_size` numbers, so that
    the scratch memory is three such pieces. Run it under `full_precision`.
    """
    m = x.shape[-1]
    if m < 1 or m & (m - 1):
        raise ValueError(f"hadamard needs a last axis of size 2^k, got {m}; zero-pad it to {1 << m.bit_length()}.")
    size = group_size(x.device)
    inner = min(m, size)
    spare = x.new_empty(2, min(size, x.numel()))
    rows = x.view(-1, inner)
    step = size // inner
    for piece in rows.split(step):
        result = transform(piece, spare[0, : piece.numel()].view_as(piece))
        if result.data_ptr() != piece.data_ptr():
            piece.copy_(result)
    outer = m // inner
    if outer > 1:
        width = max(1, size // outer)
        for columns in x.view(-1, outer, inner).split(width, dim=2):
            for slab in columns:
                first, second = spare[:, : slab.numel()].view(2, *slab.shape)
                first.copy_(slab)
                slab.copy_(_along_axis(first, second, outer, slab.shape[1]))
    return x


def transform(x: Float[Tensor, "... m"], spare: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
    """Return H x along the last axis of a contiguous tensor, in the memory of x or of `spare`.

    Overwrites both. Run it under `full_precision`.
    """
    return _along_axis(x, spare, x.shape[-1], 1)


def _along_axis(x: Tensor, spare: Tensor, m: int, inner: int) -> Tensor:
    """Return H x along the middle axis of x seen as (..., m, inner), in the memory of x or of `spare`."""
    for factor in _factors(m):
        matrix = _matrix(factor, x.dtype, x.device)
        if inner == 1:
            torch.mm(x.view(-1, factor), matrix, out=spare.view(-1, factor))
        else:
            blocks = x.view(-1, factor, inner)
            torch.bmm(matrix.expand(len(blocks), -1, -1), blocks, out=spare.view_as(blocks))
        x, spare = spare, x
        inner *= factor
    return x


def _factors(m: int) -> list[int]:
    """Return powers of two whose product is m, 16 where possible: 2^9 -> [32, 16], 2^11 -> [16, 16, 8]."""
    factors = []
    while m > 64:
        factors.append(32 if m.bit_length() % 4 == 2 else 16)
        m //= factors[-1]
    return [*factors, m] if m > 1 else factors


@functools.lru_cache(maxsize=16)  # at most 128 x 128 numbers each
def _matrix(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H_m as a dense matrix."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < m:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h
