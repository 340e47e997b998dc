"""Dense Gaussian sketch, its entries made anew at every use.

    S_ij = g_ij / √dim,     g_ij independent standard normals

The reference for quality: Var ||S x||² = 2 ||x||⁴ / dim for every x. O(n dim) time, so for small n or
comparisons; no matrix is stored, a block of 2^18 entries at a time is scratch.

Source: Johnson & Lindenstrauss (1984); as the projector of TRAK, Park et al., ICML 2023,
arXiv:2303.14186, section 3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import CACHED
from lightning_sketch.operators.random import normals, normals_at
from lightning_sketch.operators.streaming import StreamingSketch, Which


@dataclass(frozen=True)
class Gaussian(StreamingSketch):
    """Sketch vectors of size `n` into `dim` numbers, by the textbook.

    >>> import torch
    >>> Gaussian(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "gaussian"

    @property
    def chunk(self) -> int:
        """A chunk is one coordinate."""
        return 1

    @property
    def scale(self) -> float:
        """dim^(-1/2)."""
        return self.dim**-0.5

    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """sum_j x_j g_j, with g_j the j-th column."""
        if isinstance(which, Tensor):
            self._gather_scattered(chunks, which, total)
            return
        for start, piece in self._pieces(chunks):
            total += piece.squeeze(-1) @ self._columns(which + start, piece)

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """g_jᵀ y for each coordinate."""
        for start, piece in self._pieces(chunks):
            piece[:] = (y @ self._columns(first + start, piece).T)[..., None]
        return chunks

    def _gather_scattered(self, chunks: Tensor, which: Tensor, total: Tensor) -> None:
        step = max(1, CACHED // (self.dim * len(chunks)))
        for piece, number in zip(chunks.split(step, dim=1), which.split(step, dim=1), strict=True):
            index = number[..., None] * self.dim + torch.arange(self.dim, device=number.device)
            total += (piece * normals_at(self.key("normals"), index, piece.dtype)).sum(1)

    def _pieces(self, chunks: Tensor):
        step = max(1, CACHED // self.dim)
        return zip(range(0, chunks.shape[1], step), chunks.split(step, dim=1), strict=True)

    def _columns(self, first: int, piece: Tensor) -> Float[Tensor, "coordinates dim"]:
        start, stop = first * self.dim, (first + piece.shape[1]) * self.dim
        return normals(self.key("normals"), start, stop, piece.dtype, piece.device).view(-1, self.dim)
