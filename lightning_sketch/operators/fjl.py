"""FJL: the Fast Johnson-Lindenstrauss transform, the paper's reference for quality.

    S x = √(N / (dim q)) P H B x,     P_ij sparse: q = 64 standard normals in each row     (H orthonormal)

B   N random signs, after zero-padding from n to N, the next power of two
H   orthonormal Walsh-Hadamard matrix of size N
P   each row reads q = 64 coordinates, drawn with replacement, with independent normal weights

E[SᵀS] = I; Var ||S x||² is about 2 / dim (1 + 3 / q) for ||x|| = 1. The theory asks for q of order log² M
to keep M vectors apart, which is 64 at M = 3000; q is a fixed part of the map. Reading at random places is
slow on accelerators, which is why the paper replaces this sketch.

Source: Ailon & Chazelle (2009), "The fast Johnson-Lindenstrauss transform and approximate nearest
neighbors", SIAM J. Comput. 39(1), doi:10.1137/060673096; as in Schioppa, arXiv:2402.03994, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import group_size
from lightning_sketch.operators.full import FullSketch
from lightning_sketch.operators.random import normals, words

_NONZEROS_PER_ROW = 64


@dataclass(frozen=True)
class FJL(FullSketch):
    """The FJL sketch: maps vectors of size `n` to `dim` numbers, reading 64 coordinates for each.

    >>> import torch
    >>> FJL(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "fjl"

    @property
    def scale(self) -> float:
        """The factor √(N / (dim q)), times 1 / √N for H."""
        return (self.dim * _NONZEROS_PER_ROW) ** -0.5

    def reduce(self, u: Float[Tensor, " padded"]) -> Float[Tensor, " dim"]:
        """Return P u."""
        y = u.new_empty(self.dim)
        for rows, columns, weights in self._entries(u):
            y[rows] = (u[columns] * weights).sum(-1)
        return y

    def expand(self, y: Float[Tensor, " dim"]) -> Float[Tensor, " padded"]:
        """Return Pᵀ y."""
        u = y.new_zeros(self.padded)
        for rows, columns, weights in self._entries(y):
            u.index_add_(0, columns.view(-1), (weights * y[rows, None]).view(-1))
        return u

    def _entries(self, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows of P in groups: their range, their columns, their weights."""
        q = _NONZEROS_PER_ROW
        step = group_size(like.device) // q
        for row in range(0, self.dim, step):
            rows = slice(row, min(row + step, self.dim))
            low, high = (
                words(self.key("columns"), 2 * q * rows.start, 2 * q * rows.stop, like.device).view(-1, q, 2).unbind(-1)
            )
            columns = (low | (high & 0x7FFFFFFF) << 32) & (self.padded - 1)
            weights = normals(self.key("normals"), q * rows.start, q * rows.stop, like.dtype, like.device)
            yield rows, columns, weights.view(-1, q)
