"""FFD: Fastfood, the random map of intrinsic-dimension studies since Li et al. (2018).

    S x = √(D / dim) sum_c B_c H Πᵀ_c G_c H x_c           (here H is orthonormal)

x_c   the c-th chunk of D coordinates, D the power of two at or above dim, the last one zero-padded
H     orthonormal Walsh-Hadamard matrix of size D
G_c   D independent standard normals on a diagonal
Π_c   a random permutation
B_c   D random signs

This is the adjoint of Fastfood's map R^D -> R^n. E[SᵀS] = I.

**When not to use it.** The first H is applied without random signs before it: if H x_c is a single spike,
||S x||² is the square of one normal variable, whatever dim is (Theorem 3.1 of the paper; a constant x
inside one chunk does it). And a permutation is a sort and a lookup, slow everywhere. `AFFD` and
`BlockSRHT` have neither fault. It streams; scratch: a few buffers of max(2^18, D) numbers
(on a GPU 2^24 instead of 2^18).

Source: Le, Sarlós & Smola (2013), "Fastfood: approximating kernel expansions in loglinear time", ICML;
as a sketch: Schioppa, NeurIPS 2024, arXiv:2402.03994, section 3, its constant σ_F being 1 here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.operators._hadamard import transform_
from lightning_sketch.operators.random import normals_at, words_at
from lightning_sketch.operators.streaming import StreamingSketch, Which


@dataclass(frozen=True)
class FFD(StreamingSketch):
    """The Fastfood sketch: maps vectors of size `n` to `dim` numbers, as the literature before the paper did.

    >>> import torch
    >>> FFD(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "ffd"

    @property
    def chunk(self) -> int:
        """The length D of a chunk: the smallest power of two that is at least dim."""
        return self.width

    @property
    def scale(self) -> float:
        """The factor √(D / dim), times 1 / √D for each of the two H."""
        return (self.dim * self.chunk) ** -0.5

    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """Add sum_c B_c H Πᵀ_c G_c H x_c to `total`."""
        mixed = transform_(chunks) * self._normals(which, chunks)
        mixed = transform_(mixed.gather(-1, self._permutations(which, chunks)))
        total += self._flip(mixed, "signs", which, spare[0]).sum(1)[:, : self.dim]

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """Return H G_c Π_c H B_c y for each chunk."""
        chunks[:] = F.pad(y, (0, self.chunk - self.dim))[:, None]
        self._flip(chunks, "signs", first, spare[0])
        mixed = chunks.new_empty(chunks.shape)
        mixed.scatter_(-1, self._permutations(first, chunks), transform_(chunks))
        return transform_(mixed * self._normals(first, chunks))

    def _normals(self, which: Which, like: Tensor) -> Float[Tensor, "one_or_rows group chunk"]:
        return normals_at(self.key("normals"), self._coordinates(which, like), like.dtype)

    def _permutations(self, which: Which, like: Tensor) -> Int[Tensor, "rows group chunk"]:
        drawn = words_at(self.key("permutations"), self._coordinates(which, like))
        return drawn.argsort(dim=-1, stable=True).expand(len(like), -1, -1)

    def _coordinates(self, which: Which, like: Tensor) -> Int[Tensor, "one_or_rows group chunk"]:
        if not isinstance(which, Tensor):
            which = torch.arange(which, which + like.shape[1], device=like.device)[None]
        return which[..., None] * self.chunk + torch.arange(self.chunk, device=like.device)
