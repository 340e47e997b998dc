"""The Lanczos recurrence with three vectors, its start vectors, and the extreme Ritz values of one short run.

    β_j v_{j+1} = A v_j - α_j v_j - β_{j-1} v_{j-1},     α_j = v_jᵀ A v_j,   β_j the norm of the right-hand side

In matrices: A V_m = V_{m+1} T̄_m with T̄_m tridiagonal, (m+1) x m. This is true to rounding even after the v_j have
lost their orthogonality, as they soon do. No v_j is stored.

Source: Lanczos (1950); Paige (1976), "Error analysis of the Lanczos algorithm", doi:10.1093/imamat/18.3.341.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.random import Key
from lightning_sketch.operators.space import dot

__all__ = ["dot", "extreme_ritz_values", "lanczos", "start_vector"]


def start_vector(
    operator: LinearOperator, seed: int, *, name: str, dtype: torch.dtype | None = None
) -> Float[Tensor, " n"]:
    """Return a random vector of length one, uniform on the sphere: the same on every device and rank.

    Args:
        operator: An operator of size n; the vector has its `dtype` and `device`.
        seed: The seed of the random entries.
        name: Distinguishes the vectors of one seed.
        dtype: The type of the vector, if not that of the operator.
    """
    space = operator.space
    v = space.normal(Key(seed, f"lanczos/{name}"), dtype)
    return v.div_(space.norm(v))


def lanczos(
    operator: LinearOperator,
    seed: int,
    *,
    start: int = 0,
    again: Sequence[tuple[float, float]] = (),
    dtype: torch.dtype | None = None,
    orthogonal: bool = False,
) -> Iterator[tuple[Tensor, float, float]]:
    """Yield v_{j+1}, α_j, β_j for j = 1, 2, ..., from `start_vector(operator, seed, name=f"{start}")`.

    Where the Krylov space ends (β_j is rounding), β_j = 0 and v_{j+1} is a new random vector: the relation
    A V_m = V_{m+1} T̄_m remains true, and eigenvectors orthogonal to the first start become visible.

    Args:
        operator: A symmetric operator of size n.
        seed: The seed of the start vector.
        start: The number of the run, which distinguishes the start vectors of one seed.
        again: (α_j, β_j) of an earlier run whose vectors are to be yielded again. They are used as they are, since
            the recurrence amplifies any difference once values have converged; for the same reason the order of
            operations must not change.
        dtype: The type of the vectors, if not that of the operator.
        orthogonal: Store all v_j and make each new one orthogonal to them; for small operators only.
    """
    space, basis = operator.space, list[Tensor]()
    v, previous, beta = start_vector(operator, seed, name=f"{start}", dtype=dtype), None, 0.0
    size, restarts, known = 0.0, 0, iter(again)
    while True:
        w = operator.matvec(v)
        if w.data_ptr() == v.data_ptr():  # an operator may return its argument
            w = w.clone()
        if previous is not None:
            w.add_(previous, alpha=-beta)
        previous = None  # frees one vector during the dot products
        recorded = next(known, None)
        alpha = recorded[0] if recorded else space.dot(w, v)
        w.add_(v, alpha=-alpha)
        if orthogonal:
            basis.append(v)
            for u in (*basis, *basis):  # twice is enough
                w.add_(u, alpha=-space.dot(u, w))
        beta = recorded[1] if recorded else space.norm(w)
        size = max(size, abs(alpha), beta)
        if beta <= 10 * torch.finfo(w.dtype).eps * size:
            restarts += 1
            beta, w = 0.0, start_vector(operator, seed, name=f"{start}/{restarts}", dtype=dtype)
            if orthogonal:
                for u in (*basis, *basis):
                    w.add_(u, alpha=-space.dot(u, w))
                w.div_(space.norm(w) or 1.0)
        else:
            w.div_(beta)
        yield w, alpha, beta
        v, previous = w, v


def extreme_ritz_values(
    operator: LinearOperator, num_matvecs: int, *, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Return the smallest and the largest Ritz value of one Lanczos run, both within the range of the eigenvalues.

    They are the extreme eigenvalues after n products, since the vectors are made orthogonal to each other; this takes
    memory for `num_matvecs` vectors.

    Args:
        operator: A symmetric operator of size n.
        num_matvecs: The number of products, of which at most n are taken.
        seed: The seed of the start vector.
        dtype: The type of the vectors, if not that of the operator.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> s = BlockSRHT(n=64, dim=16, seed=0)
    >>> low, high = extreme_ritz_values(s @ s.T, num_matvecs=16, dtype=torch.float64)  # S Sᵀ = 4 I
    >>> round(low, 9), round(high, 9)
    (4.0, 4.0)
    """
    steps = zip(
        range(min(num_matvecs, operator.shape[1])), lanczos(operator, seed, dtype=dtype, orthogonal=True), strict=False
    )
    alpha, beta = zip(*((a, b) for _, (_, a, b) in steps), strict=True)
    off = torch.tensor(beta[:-1], dtype=torch.float64)
    ritz = torch.linalg.eigvalsh(torch.tensor(alpha, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1))
    return float(ritz[0]), float(ritz[-1])
