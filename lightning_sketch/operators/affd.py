"""AFFD: the accelerator-friendly Fastfood sketch.

    S x = √(N / dim) R_dim H G H B x                (here H is orthonormal)

B       N random signs, after zero-padding from n to N, the next power of two
H       orthonormal Walsh-Hadamard matrix of size N
G       N independent standard normals on a diagonal
R_dim   the first dim coordinates

The second H needs no transform of length N: the first D rows of H_N (D a power of two) are the matrix
H_D side by side, so R_D H_N v is H_D applied to the sum of the blocks of length D of v. A `dim` that is
no power of two is cut out of the next one, D, and scaled for it.

E[SᵀS] = I; Var ||S x||² is about 2 / dim for a dense x with ||x|| = 1. It is larger when the energy of x
lies in one aligned block of length D, as in gradients dominated by one small tensor: H_N then repeats one
profile in every block, and the variance is 3 - 2 sum_i x_i⁴ times as large (measured 2.97 at
dim = 256, N = 2^14). `BlockSRHT` has no such inputs and needs one pass; use this one to follow the paper.

Source: Schioppa, "Efficient Sketches for Training Data Attribution and Studying the Loss Landscape",
NeurIPS 2024, arXiv:2402.03994, section 3 and Theorem 3.2. The paper permutes rows and columns inside
the factors of H; between independent random diagonals that changes nothing in distribution, and is
left out.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import transform_
from lightning_sketch.operators.full import FullSketch
from lightning_sketch.operators.random import normals


@dataclass(frozen=True)
class AFFD(FullSketch):
    """The AFFD sketch: maps vectors of size `n` to `dim` numbers by two Hadamard transforms, as in the paper.

    >>> import torch
    >>> AFFD(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "affd"

    @property
    def scale(self) -> float:
        """The factor √(N / dim), times 1 / √N for each of the two H."""
        return (self.dim * self.padded) ** -0.5

    def reduce(self, u: Float[Tensor, " padded"]) -> Float[Tensor, " dim"]:
        """Return R_dim H_D fold(G u)."""
        folded = u.new_zeros(self.width)
        for piece in self.pieces(u.device):
            folded += (u[piece] * self._normals(piece, u)).view(-1, self.width).sum(0)
        return transform_(folded)[: self.dim]

    def expand(self, y: Float[Tensor, " dim"]) -> Float[Tensor, " padded"]:
        """Return G unfold(H_D R_dimᵀ y)."""
        u = y.new_empty(self.padded)
        folded = y.new_zeros(self.width)
        folded[: self.dim] = y
        transform_(folded)
        for piece in self.pieces(y.device):
            u[piece] = (self._normals(piece, y).view(-1, self.width) * folded).view(-1)
        return u

    def _normals(self, piece: slice, like: Tensor) -> Tensor:
        return normals(self.key("normals"), piece.start, piece.stop, like.dtype, like.device)
