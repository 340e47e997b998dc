"""AFJL: the accelerator-friendly Fast Johnson-Lindenstrauss sketch.

    S x = √(N / dim) R_dim G H B x                  (here H is orthonormal)

with B, H, G and R_dim as in AFFD, without its second H. The first D rows of H_N (D a power of two) are
H_D side by side, so only blocks of length D are transformed, after they have been summed:

    S x = dim^(-1/2) R_dim G H_D sum_c s_c ∘ x_c    (x_c: the c-th block of length D; H_D with entries ±1)

**When not to use it.** E[SᵀS] = I, but two coordinates at a distance of D share one column of H_D up to
sign: a vector with two equal entries there is sent to zero with probability 1/2, whatever n is, and a few
outlier columns of a power-of-two width spread ||S x||² 38 times as far (at dim = 256). And G,
at the end, adds noise without mixing: Var ||S x||² is about 8 / dim for dense x, four times that of
`BlockSRHT`. It is here to reproduce the paper. O(n) time, one pass.

Source: Schioppa, NeurIPS 2024, arXiv:2402.03994, section 3 (the paper has no theorem for it).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import transform_
from lightning_sketch.operators.random import normals
from lightning_sketch.operators.streaming import StreamingSketch, Which


@dataclass(frozen=True)
class AFJL(StreamingSketch):
    """The AFJL sketch: maps vectors of size `n` to `dim` numbers in one pass, as in the paper.

    >>> import torch
    >>> AFJL(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "afjl"

    @property
    def chunk(self) -> int:
        """The length D of a block: the smallest power of two that is at least dim."""
        return self.width

    @property
    def scale(self) -> float:
        """The factor dim^(-1/2)."""
        return self.dim**-0.5

    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """Add R_dim G H sum_c s_c ∘ x_c to `total`."""
        self._flip(chunks, "signs", which, spare[0])
        total += transform_(chunks.sum(1))[:, : self.dim] * self._normals(total)

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """Return s_c ∘ H G R_dimᵀ y for each chunk."""
        mixed = transform_(F.pad(y * self._normals(y), (0, self.chunk - self.dim)))
        chunks[:] = mixed[:, None]
        return self._flip(chunks, "signs", first, spare[0])

    def _normals(self, like: Tensor) -> Tensor:
        return normals(self.key("normals"), 0, self.dim, like.dtype, like.device)
