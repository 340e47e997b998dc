"""A symmetric operator with some of its eigenvectors taken out, so that others converge sooner."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.base import LinearOperator, UnaryOperator


@dataclass(frozen=True, eq=False)
class Deflated(UnaryOperator):
    """The matrix (I - XᵀX) A (I - XᵀX), in which the rows of X have eigenvalue zero.

    Lanczos takes long to resolve a tight cluster of small eigenvalues while others are far larger. Without the
    eigenvectors of these it converges sooner:

        top = sp.eigenvectors(h, 10)
        spectrum(Deflated(h, top.vectors), top_k=0, bottom_k=5)

    Args:
        of: The symmetric operator A, of size n.
        vectors: The rows of X, orthonormal, (k, n).

    Raises:
        ValueError: If sizes disagree, or the rows are not orthonormal (to 1e-3).

    >>> from lightning_sketch.operators import CountSketch
    >>> s = CountSketch(n=2, dim=2, seed=0)
    >>> Deflated(s.T @ s, torch.tensor([[1.0, 0.0]])).as_matrix().abs()  # SᵀS is the identity
    tensor([[0., 0.],
            [0., 1.]])
    """

    of: LinearOperator
    vectors: Float[Tensor, "k n"]

    def __post_init__(self):
        space = self.of.space
        if self.of.shape != (space.n,) * 2 or self.vectors.shape[1] != space.size:
            raise ValueError(f"cannot take {tuple(self.vectors.shape)} vectors out of a {self.of.shape} operator.")
        gram = self._dots(self.vectors)
        off = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
        if not off < 1e-3:
            raise ValueError(
                f"the vectors to deflate are not orthonormal, off by {off:.1e}; take only converged ones, or "
                "torch.linalg.qr of them."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return (I - XᵀX) A (I - XᵀX) x for each vector x along the last axis."""
        return self._without(self.of.matvec(self._without(x)))

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return the same as `matvec`: the matrix is symmetric."""
        return self.matvec(y)

    def _without(self, x: Tensor) -> Tensor:
        return x - self._dots(x) @ self.vectors

    def _dots(self, x: Tensor) -> Tensor:
        """Return X x for each vector x along the last axis."""
        space = self.of.space
        if not space.sharded:
            return x @ self.vectors.T
        rows = x.reshape(x.shape[:-1].numel(), space.size)
        found = [[space.dot(row, vector) for vector in self.vectors] for row in rows]
        return x.new_tensor(found).view(*x.shape[:-1], len(self.vectors))
