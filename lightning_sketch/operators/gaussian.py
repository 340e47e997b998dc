"""Dense Gaussian sketch, whose entries are drawn again at every use.

    S_ij = g_ij / √dim,     g_ij independent standard normals

The reference for quality: Var ||S x||² = 2 ||x||⁴ / dim for every x. It takes O(n dim) time and
is meant for small n and for comparisons. No matrix is stored; scratch memory is a block of 2^18 entries (on a GPU
of 2^24).

Source: Johnson & Lindenstrauss (1984); as the projector of TRAK, Park et al., ICML 2023,
arXiv:2303.14186, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import group_size
from lightning_sketch.operators.random import normals, normals_at
from lightning_sketch.operators.streaming import StreamingSketch, Which


@dataclass(frozen=True)
class Gaussian(StreamingSketch):
    """The dense Gaussian sketch: maps vectors of size `n` to `dim` numbers, as in textbooks.

    >>> import torch
    >>> Gaussian(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "gaussian"

    @property
    def chunk(self) -> int:
        """The length of a chunk, one coordinate."""
        return 1

    @property
    def scale(self) -> float:
        """The factor dim^(-1/2)."""
        return self.dim**-0.5

    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """Add sum_j x_j g_j to `total`, with g_j the j-th column."""
        if isinstance(which, Tensor):
            self._gather_scattered(chunks, which, total)
            return
        for start, piece in self._pieces(chunks):
            total += piece.squeeze(-1) @ self._columns(which + start, piece)

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """Return g_jᵀ y for each coordinate."""
        for start, piece in self._pieces(chunks):
            piece[:] = (y @ self._columns(first + start, piece).T)[..., None]
        return chunks

    def _gather_scattered(self, chunks: Tensor, which: Tensor, total: Tensor) -> None:
        step = max(1, group_size(chunks.device) // (self.dim * len(chunks)))
        for piece, number in zip(chunks.split(step, dim=1), which.split(step, dim=1), strict=True):
            index = number[..., None] * self.dim + torch.arange(self.dim, device=number.device)
            total += (piece * normals_at(self.key("normals"), index, piece.dtype)).sum(1)

    def _pieces(self, chunks: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Return slices of the chunks whose columns of the matrix fit in cache, each with its first index."""
        step = max(1, group_size(chunks.device) // self.dim)
        return zip(range(0, chunks.shape[1], step), chunks.split(step, dim=1), strict=True)

    def _columns(self, first: int, piece: Tensor) -> Float[Tensor, "coordinates dim"]:
        start, stop = first * self.dim, (first + piece.shape[1]) * self.dim
        return normals(self.key("normals"), start, stop, piece.dtype, piece.device).view(-1, self.dim)
