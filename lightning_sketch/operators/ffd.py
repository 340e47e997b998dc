"""FFD: Fastfood, the sketch of implicit mode since Li et al. (2018).

    S x = √(D / dim) sum_c B_c H Πᵀ_c G_c H x_c           (here H is orthonormal)

x_c   the c-th chunk of D coordinates, D the power of two at or above dim, the last one zero-padded
H     orthonormal Walsh-Hadamard matrix of size D
G_c   D independent standard normals on a diagonal
Π_c   a random permutation
B_c   D random signs

This is the adjoint of Fastfood's map R^D -> R^n. E[SᵀS] = I.

**When not to use it.** x meets the first H with no random signs before it: if H x_c is a single spike,
||S x||² is the square of one normal variable, whatever dim is (Theorem 3.1 of the paper; a constant x
inside one chunk does it). And a permutation is a sort and a lookup, slow everywhere. `AFFD` and
`BlockSRHT` repair both. It streams; scratch: a few buffers of max(2^18, D) numbers.

Source: Le, Sarlós & Smola (2013), "Fastfood: approximating kernel expansions in loglinear time", ICML;
as a sketch: Schioppa, NeurIPS 2024, arXiv:2402.03994, section 3, its constant σ_F being 1 here.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.operators.hadamard import transform_
from lightning_sketch.operators.random import flip_, normals, words
from lightning_sketch.operators.streaming import StreamingSketch


@dataclass(frozen=True)
class FFD(StreamingSketch):
    """Sketch vectors of size `n` into `dim` numbers, as the literature before the paper did.

    >>> import torch
    >>> FFD(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "ffd"

    @property
    def chunk(self) -> int:
        """D: the power of two at or above dim."""
        return self.width

    @property
    def scale(self) -> float:
        """√(D / dim), and 1 / √D for each of the two H."""
        return (self.dim * self.chunk) ** -0.5

    def gather(self, chunks: Float[Tensor, "rows group chunk"], first: int, spare: list[Tensor], total: Tensor) -> None:
        """sum_c B_c H Πᵀ_c G_c H x_c."""
        mixed = transform_(chunks) * self._normals(first, chunks)
        mixed = transform_(mixed.gather(-1, self._permutations(first, chunks)))
        flip_(mixed.view(len(mixed), -1), self.key("signs"), first * self.chunk, spare[0])
        total += mixed.sum(1)[:, : self.dim]

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """H G_c Π_c H B_c y for each chunk."""
        chunks[:] = F.pad(y, (0, self.chunk - self.dim))[:, None]
        flip_(chunks.view(len(chunks), -1), self.key("signs"), first * self.chunk, spare[0])
        mixed = chunks.new_empty(chunks.shape)
        mixed.scatter_(-1, self._permutations(first, chunks), transform_(chunks))
        return transform_(mixed * self._normals(first, chunks))

    def _normals(self, first: int, like: Tensor) -> Float[Tensor, "group chunk"]:
        start, stop = first * self.chunk, (first + like.shape[1]) * self.chunk
        return normals(self.key("normals"), start, stop, like.dtype, like.device).view(-1, self.chunk)

    def _permutations(self, first: int, like: Tensor) -> Int[Tensor, "rows group chunk"]:
        start, stop = first * self.chunk, (first + like.shape[1]) * self.chunk
        drawn = words(self.key("permutations"), start, stop, like.device).view(-1, self.chunk)
        return drawn.argsort(dim=-1, stable=True).expand(len(like), -1, -1)
