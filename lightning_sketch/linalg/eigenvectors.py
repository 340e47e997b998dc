"""Eigenvectors by a second pass: the recurrence once more, summing up x_i = sum_j c_ji v_j on the way."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import Krylov, SketchedRun
from lightning_sketch.linalg.lanczos import dot, lanczos, start_vector
from lightning_sketch.operators.base import LinearOperator


class EigenPairs(NamedTuple):
    """Eigenvectors of size n, and what one product with each says of them."""

    values: Float[Tensor, " k"]
    """Rayleigh quotients xᵀ A x: their error is that of x squared. Float64, on the CPU."""
    vectors: Float[Tensor, "k n"]
    """x, of length one."""
    residuals: Float[Tensor, " k"]
    """||A x - θ x||: some eigenvalue lies within that of θ. Float64, on the CPU."""


def eigenvectors(
    operator: LinearOperator, krylov: Krylov, coefficients: Float[Tensor, "m k"], top_k: int
) -> EigenPairs:
    """Return the vectors x = V c, for k columns c, made orthonormal and turned to eigenvectors within their span.

    The first `top_k` come with falling values, the others with rising ones. Costs as many products as the runs
    took, 2 k more, and memory for k + 4 vectors of size n. The operator must be the same as before: if it is not,
    the residuals tell.

    Raises:
        ValueError: if the vectors are not independent, as those of values that have not converged.
    """
    k = coefficients.shape[1]
    vectors = torch.zeros(k, operator.shape[1], dtype=operator.dtype, device=operator.device)
    with operator.hold(), torch.no_grad():
        rows = iter(coefficients.tolist())
        for start, run in enumerate(krylov.runs):
            for v in _vectors(operator, krylov.seed, start, run):
                for x, c in zip(vectors, next(rows), strict=True):
                    x.add_(v, alpha=c)
        for x in vectors:
            x.div_(dot(x, x) ** 0.5)
        _turn(operator, vectors, top_k)
        values, residuals = [], []
        for x in vectors:
            image = operator.matvec(x)
            values.append(dot(x, image))
            image = image.add(x, alpha=-values[-1])
            residuals.append(dot(image, image) ** 0.5)
    return EigenPairs(torch.tensor(values, dtype=torch.float64), vectors, torch.tensor(residuals, dtype=torch.float64))


def _turn(operator: LinearOperator, vectors: Float[Tensor, "k n"], top_k: int) -> None:
    """Rayleigh-Ritz on the rows, in place: X AXᵀ c = θ XXᵀ c, with no second set of vectors."""
    gram = torch.tensor([[dot(x, y) for y in vectors] for x in vectors], dtype=torch.float64)
    rows = []
    for x in vectors:
        image = operator.matvec(x)
        rows.append([dot(y, image) for y in vectors])
    projected = torch.tensor(rows, dtype=torch.float64)
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed or float(torch.linalg.cond(gram)) > 1e10:
        raise ValueError("these eigenvectors are not independent; ask only for eigenvalues that have converged.")
    inverse = torch.linalg.inv(root)
    _, y = torch.linalg.eigh(inverse @ (projected + projected.T) / 2 @ inverse.T)
    turn = (y.T @ inverse).flip(0)  # rows of falling value
    turn = torch.cat([turn[:top_k], turn[top_k:].flip(0)]).to(vectors)
    for piece in vectors.split(1 << 16, dim=1):
        piece.copy_(turn @ piece)


def _vectors(operator: LinearOperator, seed: int, start: int, run: SketchedRun) -> Iterator[Float[Tensor, " n"]]:
    """v_1 ... v_m of a run."""
    yield start_vector(operator, seed, f"{start}")
    again = list(zip(run.alpha, run.beta, strict=True))[:-1]
    for _, (v, _, _) in zip(again, lanczos(operator, seed, start, again), strict=False):
        yield v
