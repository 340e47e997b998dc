"""An operator without some of its eigenvectors, for those who need what they hide."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.base import LinearOperator, OfOne


@dataclass(frozen=True, eq=False)
class Deflated(OfOne):
    """(I - XᵀX) A (I - XᵀX): the rows of X, which are orthonormal, get eigenvalue zero.

    A tight cluster at the small end converges late behind a large top; without the top it is reached sooner:

        top = sp.eigenvectors(h, 10)
        spectrum(Deflated(h, top.vectors), top_k=0, bottom_k=5)

    Raises:
        ValueError: if sizes disagree, or the rows are not orthonormal (to 1e-3).
    """

    of: LinearOperator
    vectors: Float[Tensor, "k n"]

    def __post_init__(self):
        if self.of.shape != (self.vectors.shape[1],) * 2:
            raise ValueError(f"cannot take {tuple(self.vectors.shape)} vectors out of a {self.of.shape} operator.")
        gram = self.vectors @ self.vectors.T
        off = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
        if not off < 1e-3:
            raise ValueError(
                f"the vectors to deflate are not orthonormal, off by {off:.1e}; take only converged ones, or "
                "torch.linalg.qr of them."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """That of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """(I - XᵀX) A (I - XᵀX) x."""
        return self._without(self.of.matvec(self._without(x)))

    rmatvec = matvec

    def _without(self, x: Tensor) -> Tensor:
        return x - (x @ self.vectors.T) @ self.vectors
