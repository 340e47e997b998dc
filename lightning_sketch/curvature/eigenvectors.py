"""Eigenvectors by a second pass: the recurrence once more, summing up x_i = sum_j c_ji v_j on the way."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.curvature.krylov import Krylov, SketchedRun
from lightning_sketch.curvature.lanczos import dot, lanczos, start_vector
from lightning_sketch.operators.base import LinearOperator


class EigenPairs(NamedTuple):
    """Eigenvectors of size n, and what one product with each says of them."""

    values: Float[Tensor, " k"]
    """Rayleigh quotients xᵀ A x: their error is that of x squared. Float64, on the CPU."""
    vectors: Float[Tensor, "k n"]
    """x, of length one."""
    residuals: Float[Tensor, " k"]
    """||A x - θ x||: some eigenvalue lies within that of θ. Float64, on the CPU."""


def eigenvectors(operator: LinearOperator, krylov: Krylov, coefficients: Float[Tensor, "m k"]) -> EigenPairs:
    """The vectors x = V c, for k columns c.

    Costs as many products as the runs took, k more, and memory for k + 4 vectors of size n. The operator must be
    the same as before: if it is not, the residuals tell.
    """
    k = coefficients.shape[1]
    vectors = torch.zeros(k, operator.shape[1], dtype=operator.dtype, device=operator.device)
    with operator.hold(), torch.no_grad():
        rows = iter(coefficients.tolist())
        for start, run in enumerate(krylov.runs):
            for v in _vectors(operator, krylov.seed, start, run):
                for x, c in zip(vectors, next(rows), strict=True):
                    x.add_(v, alpha=c)
        values, residuals = [], []
        for x in vectors:
            x.div_(dot(x, x) ** 0.5)
            image = operator.matvec(x)
            values.append(dot(x, image))
            image = image.add(x, alpha=-values[-1])
            residuals.append(dot(image, image) ** 0.5)
    return EigenPairs(torch.tensor(values, dtype=torch.float64), vectors, torch.tensor(residuals, dtype=torch.float64))


def _vectors(operator: LinearOperator, seed: int, start: int, run: SketchedRun) -> Iterator[Float[Tensor, " n"]]:
    """v_1 ... v_m of a run."""
    yield start_vector(operator, seed, f"{start}")
    again = list(zip(run.alpha, run.beta, strict=True))[:-1]
    for _, (v, _, _) in zip(again, lanczos(operator, seed, start, again), strict=False):
        yield v
