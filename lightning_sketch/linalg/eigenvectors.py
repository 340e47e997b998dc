"""Eigenvectors x_i = sum_j c_ji v_j by a second pass: the Lanczos recurrence runs again, and the sums are formed."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import Krylov, SketchedRun
from lightning_sketch.linalg.lanczos import lanczos, start_vector
from lightning_sketch.operators.base import LinearOperator

_SHOWN = 5  # values in a repr


class EigenPairs(NamedTuple):
    """Eigenvectors of size n, and how good they are, from one product with each.

    Attributes:
        values: Rayleigh quotients θ = xᵀ A x, whose error is that of x squared; (k,), float64, on the CPU.
        vectors: The eigenvectors x, of length one, as rows; (k, n), in the operator's type and on its device.
        residuals: ||A x - θ x||; some eigenvalue lies within this distance of θ; (k,), float64, on the CPU.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k n"]
    residuals: Float[Tensor, " k"]

    def __repr__(self) -> str:
        (k, n), dots = self.vectors.shape, ", ..." if len(self.values) > _SHOWN else ""
        values, residuals = (
            ", ".join(f"{number:.4g}" for number in part[:_SHOWN].tolist()) + dots
            for part in (self.values, self.residuals)
        )
        kind = str(self.vectors.dtype).removeprefix("torch.")
        return f"EigenPairs: {k} eigenvectors of size {n:,} ({kind})\n    values {values}\n    residuals {residuals}"


def eigenvectors(
    operator: LinearOperator, krylov: Krylov, *, coefficients: Float[Tensor, "m k"], top_k: int
) -> EigenPairs:
    """Return eigenvectors x = V c from the Lanczos vectors V of earlier runs, orthonormal and improved in their span.

    Costs as many products as the runs took, 2 k more, and memory for k + 4 vectors of size n.

    Args:
        operator: The operator of the runs; if it has changed since, the residuals are large.
        krylov: The runs.
        coefficients: One column c for each vector.
        top_k: The first so many are returned with falling values, the others with rising ones.

    Raises:
        ValueError: If the vectors are not independent, as happens for values that have not converged.
    """
    k, space = coefficients.shape[1], operator.space
    vectors = torch.zeros(k, space.size, dtype=operator.dtype, device=operator.device)
    with operator.hold(), torch.no_grad():
        rows = iter(coefficients.tolist())
        for start, run in enumerate(krylov.runs):
            for v in _vectors(operator, krylov.seed, start, run):
                for x, c in zip(vectors, next(rows), strict=True):
                    x.add_(v, alpha=c)
        for x in vectors:
            x.div_(space.norm(x))
        _rotate(operator, vectors, top_k)
        values, residuals = [], []
        for x in vectors:
            image = operator.matvec(x)
            values.append(space.dot(x, image))
            image = image.add(x, alpha=-values[-1])
            error = operator.last_error()
            residuals.append(space.norm(image) + (0.0 if error is None else space.norm(error)))
    return EigenPairs(torch.tensor(values, dtype=torch.float64), vectors, torch.tensor(residuals, dtype=torch.float64))


def _rotate(operator: LinearOperator, vectors: Float[Tensor, "k n"], top_k: int) -> None:
    """Replace the rows of X by their Ritz vectors, X A Xᵀ c = θ X Xᵀ c, without a second set of vectors."""
    space = operator.space
    gram = torch.tensor([[space.dot(x, y) for y in vectors] for x in vectors], dtype=torch.float64)
    rows = []
    for x in vectors:
        image = operator.matvec(x)
        rows.append([space.dot(y, image) for y in vectors])
    projected = torch.tensor(rows, dtype=torch.float64)
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed or float(torch.linalg.cond(gram)) > 1e10:
        raise ValueError("these eigenvectors are not independent; ask only for eigenvalues that have converged.")
    inverse = torch.linalg.inv(root)
    _, y = torch.linalg.eigh(inverse @ (projected + projected.T) / 2 @ inverse.T)
    rotation = (y.T @ inverse).flip(0)  # rows of falling value
    rotation = torch.cat([rotation[:top_k], rotation[top_k:].flip(0)]).to(vectors)
    for piece in vectors.split(1 << 16, dim=1):
        piece.copy_(rotation @ piece)


def _vectors(operator: LinearOperator, seed: int, start: int, run: SketchedRun) -> Iterator[Float[Tensor, " n"]]:
    """Yield v_1 ... v_m of a run."""
    yield start_vector(operator, seed, name=f"{start}")
    again = list(zip(run.alpha, run.beta, strict=True))[:-1]
    for _, (v, _, _) in zip(again, lanczos(operator, seed, start=start, again=again), strict=False):
        yield v
