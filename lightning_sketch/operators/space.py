"""The vectors that an operator takes: whole ones here; several processes may each have a part of them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.random import Key, normals


def chunk_size(device: torch.device) -> int:
    """Return how many numbers are worked on at once: few enough for a core's cache, or enough to occupy a GPU."""
    return 1 << 24 if device.type == "cuda" else 1 << 18


class VectorSpace:
    """What algorithms need of vectors beyond sums and multiples, which are those of the numbers that are here.

    Args:
        n: The size of a vector.
        dtype: The type of its numbers.
        device: The device that they are on.

    Attributes:
        size: How many of the n numbers this process has: all of them, unless vectors are sharded.
        sharded: Whether several processes each have a part, and have to call the same methods together.
        numbering: 0 if numbers are counted as in the flat vector, else what tells this way to count from others.
    """

    sharded = False
    numbering = 0

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device):
        self.n, self.size, self.dtype, self.device = n, n, dtype, device

    def dot(self, x: Float[Tensor, " size"], y: Float[Tensor, " size"]) -> float:
        """Return the inner product of two vectors, summed in float64."""
        return dot(x, y)

    def norm(self, x: Float[Tensor, " size"]) -> float:
        """Return the Euclidean length of a vector."""
        return self.dot(x, x) ** 0.5

    def normal(self, key: Key, dtype: torch.dtype | None = None) -> Float[Tensor, " size"]:
        """Return a vector of standard normal numbers, the same on every device and however it is sharded.

        Args:
            key: The key of the random numbers.
            dtype: Their type, if not that of the space.
        """
        v = torch.empty(self.size, dtype=dtype or self.dtype, device=self.device)
        fill_with_normals(v, key, 0)
        return v

    def anywhere(self, here: bool) -> bool:
        """Return whether something is so in any of the processes that have a part of the vectors."""
        return here

    def sketched(self, sketch: Any, x: Float[Tensor, " size"]) -> Float[Tensor, " dim"]:
        """Return S x, or all of x if the sketch S is None, in float64 on the CPU."""
        return (x if sketch is None else sketch.matvec(x)).cpu().double()


def fill_with_normals(v: Float[Tensor, " size"], key: Key, first: int) -> None:
    """Fill a part of a vector with standard normal numbers, by chunks, so that no second one is needed.

    Args:
        v: The part.
        key: The key of the random numbers.
        first: The index of its first number in the vector.
    """
    for piece in v.split(chunk_size(v.device)):
        piece[:] = normals(key, first, first + len(piece), v.dtype, v.device)
        first += len(piece)


def dot(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Return the inner product, summed in float64 by chunks, without a copy of size n."""
    return float(dot_here(x, y))


def dot_here(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the inner product as `dot` does, as a tensor on the device where it can be summed in float64."""
    size = chunk_size(x.device)
    chunks = zip(x.split(size), y.split(size), strict=True)
    if x.device.type == "mps":  # has no float64
        chunks = ((a.cpu(), b.cpu()) for a, b in chunks)  # type: ignore[assignment]
    total = torch.zeros((), dtype=torch.float64, device="cpu" if x.device.type == "mps" else x.device)
    for a, b in chunks:
        total += a.double() @ b.double()
    return total
