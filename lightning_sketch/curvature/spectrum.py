"""The largest and smallest eigenvalues of an operator, with error bars, from matrix-vector products alone.

Lanczos runs on the full operator and keeps only the sketches S v_j; sketched Rayleigh-Ritz computes eigenvalues from
them (`linalg.ritz`). The result says which of these have converged.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.curvature.result import Method, Spectrum
from lightning_sketch.linalg.alignment import better_of, shares, shares_by_dots
from lightning_sketch.linalg.krylov import Krylov
from lightning_sketch.linalg.lanczos import dot, start_vector
from lightning_sketch.linalg.linearity import checked_defect
from lightning_sketch.linalg.quadrature import Trace, quadrature, trace
from lightning_sketch.linalg.ritz import rayleigh_ritz
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.block_srht import BlockSRHT

_DEFECT_WARNED = 3e-3  # a defect of linearity above this is warned about
_CHECK_EVERY = 8  # products between two checks for convergence


def spectrum(
    operator: LinearOperator,
    num_matvecs: int = 96,
    *,
    dim: int = 1024,
    seed: int = 0,
    top_k: int = 10,
    bottom_k: int = 3,
    tol: float = 1e-2,
    density_probes: int = 0,
    density_matvecs: int = 32,
    method: Method = "lanczos",
    gradient: Float[Tensor, " n"] | None = None,
    on_product: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """Compute the largest and the smallest eigenvalues of a symmetric operator, with error bars.

    It takes at most `num_matvecs` products, a quarter as many (at least 8) to search for copies of multiple
    eigenvalues, and 6 to measure how linear the operator is; memory for about five vectors of size n. It stops
    early once the `top_k` largest and `bottom_k` smallest eigenvalues have converged.

    One start vector finds one copy of a multiple eigenvalue. So the run is followed by short ones from other
    start vectors, until one of them changes none of the ranks asked for, or the products are used up; ranks that are
    still changing then do not count as converged. A copy that a quarter of the products of the first run cannot find
    is missed.

    Args:
        operator: A symmetric operator, such as a `Hessian`.
        num_matvecs: The largest number of products of the Lanczos run.
        dim: The size of the sketches of its vectors, at least twice `num_matvecs`; if dim >= n, the
            vectors themselves are kept.
        seed: The seed of the start vector and of the sketch.
        top_k: The number of the largest eigenvalues to compute.
        bottom_k: The number of the smallest eigenvalues to compute.
        tol: The largest relative residual of a converged pair; 1e-2 for "converged", 1e-3 for "certified".
        density_probes: The number of further start vectors, for the density of all eigenvalues and a better trace; 3 is
            usual. Each costs `density_matvecs` products.
        density_matvecs: The number of steps of each run that the density is computed from.
        method: "lanczos", or "projected" for the method of the paper, which takes S A Sᵀ instead of A, S of size
            dim x n. Residuals then say nothing about A: for four networks of 2,400 to 4,900 parameters the ten largest
            eigenvalues were off by 8 to 18 % at dim 512, and by 4 to 7 % at 2048
            (`benchmarks/projected_vs_lanczos.py`).
        gradient: A vector of size n, whose share in the space of the top eigenvectors is computed as well.
        on_product: Called as on_product(products taken, largest number of products) after each product of a run.

    Raises:
        ValueError: If the operator is not square, an argument is out of its range, a product is not
            finite, or the operator is not linear (`linearity_defect` above 0.05) or not symmetric.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> s = BlockSRHT(n=256, dim=16, seed=0)
    >>> sp = spectrum(s.T @ s, top_k=2, bottom_k=0)  # 16 eigenvalues n / dim = 16, the others are zero
    >>> sp.top(2)
    tensor([16.0000, 16.0000], dtype=torch.float64)
    """
    m, n = operator.shape
    if m != n:
        raise ValueError(f"a spectrum needs a square operator, got shape {operator.shape}.")
    if gradient is not None and gradient.shape != (n,):
        raise ValueError(f"gradient is a vector of size {n}, got shape {tuple(gradient.shape)}.")
    projection = BlockSRHT(n, min(dim, n), seed=seed) if method == "projected" else None
    if projection is not None:
        operator, n = projection @ operator @ projection.T, projection.dim
        gradient = None if gradient is None else projection.matvec(gradient)
    check_arguments(num_matvecs, dim, top_k, bottom_k, tol, density_probes, density_matvecs, method, n)
    krylov = Krylov(seed, BlockSRHT(n, dim, seed=seed) if dim < n else None)

    def steps() -> Iterator[Tensor]:
        """Yield the vectors of a run from a new start vector."""
        for v in krylov.grow(operator, gradient):
            if on_product is not None:
                on_product(krylov.num_products, max(krylov.num_products, num_matvecs))
            yield v

    def result(defect: float) -> Spectrum:
        tau = min(max(30 * defect, 100 * torch.finfo(operator.dtype).eps), 0.03)
        pairs = rayleigh_ritz(krylov.runs, tau, defect, exact=krylov.sketch is None)
        return Spectrum(
            pairs.values,
            pairs.residuals,
            tol=tol,
            linearity_defect=defect,
            num_products=krylov.num_products + 6,
            n=n,
            vectors=pairs.vectors,
            coefficients=pairs.coefficients,
            krylov=krylov,
            sketch=projection or krylov.sketch,
            method=method,
        )

    least = min(density_matvecs, num_matvecs) if density_probes else 0
    with operator.hold(), torch.no_grad():
        first = start_vector(operator, seed, name="0")
        defect = checked_defect(operator, first, start_vector(operator, seed, name="defect"), random=True)
        previous: Tensor | None = first
        del first  # `previous` alone keeps a vector in memory
        for done, v in enumerate(steps(), start=1):
            if previous is not None and done == min(4, num_matvecs):  # on Krylov vectors as well
                defect = max(defect, checked_defect(operator, previous, v))
            previous = v if done < 4 else None
            if done == num_matvecs or done % _CHECK_EVERY == 0:
                found = result(defect)
                if done == num_matvecs or (done >= least and _enough(found, top_k, bottom_k)):
                    break
        del v
        length = max(_CHECK_EVERY, done // 4)
        for start in range(max(1, density_probes, (num_matvecs - done) // length)):
            before = found
            for _ in zip(range(max(length, density_matvecs if start < density_probes else 0)), steps(), strict=False):
                pass
            found = result(defect)
            found = replace(found, known=_unchanged(before, found))
            if start + 1 >= density_probes and _enough(found, top_k, bottom_k):
                break
    if defect > _DEFECT_WARNED:
        warnings.warn(
            f"the operator is linear only to {defect:.1e} of its size; eigenvalues below {10 * defect:.0e} of the "
            "largest mean nothing. Half precision or a loss that varies between calls does this.",
            stacklevel=2,
        )
    density = krylov.runs[: 1 + density_probes]
    nodes = quadrature(density, density_matvecs if density_probes else done)
    (total, total_sem), (squares, squares_sem) = (_sum_of_powers(found, krylov, power) for power in (1, 2))
    return replace(
        found,
        trace=total,
        trace_sem=total_sem,
        trace_of_square=squares,
        trace_of_square_sem=squares_sem,
        quadrature=nodes,
        gradient_shares=_gradient_shares(found, krylov, gradient),
    )


def _sum_of_powers(found: Spectrum, krylov: Krylov, power: Literal[1, 2]) -> Trace:
    """Return tr A or tr A², exact where all eigenvalues are known."""
    values, errors = found.eigenvalues, found.residuals
    if len(values) == found.n and found.converged.all():
        error = power * (values.abs() ** (power - 1) * errors).sum()
        return Trace(float((values**power).sum()), float(error))
    return trace(krylov.runs, found.n, values, errors, found.converged, power=power)


def _gradient_shares(found: Spectrum, krylov: Krylov, gradient: Tensor | None) -> Tensor | None:
    """Return the shares of the gradient in the spaces of the first 1, 2, ... eigenvectors; None if it is zero."""
    vectors, coefficients = found.vectors, found.coefficients
    if gradient is None or vectors is None or coefficients is None:
        return None
    norm = dot(gradient, gradient) ** 0.5
    if not norm:
        return None
    dots = torch.tensor([d for run in krylov.runs for d in run.dots[:-1]], dtype=torch.float64)
    by_dots = shares_by_dots(vectors, coefficients, dots, norm)
    if krylov.sketch is None:
        return by_dots
    return better_of(shares(vectors, krylov.sketched(gradient), exact=False), by_dots)


def _enough(found: Spectrum, top_k: int, bottom_k: int) -> bool:
    """Return whether the eigenvalues asked for have converged."""
    converged = found.converged
    enough = len(converged) >= top_k + bottom_k
    return enough and bool(converged[:top_k].all()) and bool(converged[len(converged) - bottom_k :].all())


def _unchanged(before: Spectrum, after: Spectrum) -> tuple[int, int]:
    """Return how many ranks from the top, and from the bottom, a further run left within tol or the error bars."""

    def prefix(a: Tensor, b: Tensor, errors: Tensor) -> int:
        size = min(len(a), len(b))
        same = (a[:size] - b[:size]).abs() <= torch.maximum(after.tol * b[:size].abs(), errors[:size])
        return int(same.cumprod(0).sum())

    top = prefix(before.eigenvalues, after.eigenvalues, after.residuals)
    bottom = prefix(before.eigenvalues.flip(0), after.eigenvalues.flip(0), after.residuals.flip(0))
    return top, bottom


def check_arguments(
    num_matvecs: int,
    dim: int,
    top_k: int,
    bottom_k: int,
    tol: float,
    density_probes: int = 0,
    density_matvecs: int = 32,
    method: str = "lanczos",
    n: int | None = None,
) -> None:
    """Refuse arguments of `spectrum` that are out of range or do not fit each other.

    Args:
        num_matvecs: The argument of `spectrum`, as are those up to `method`.
        dim: The size of the sketches.
        top_k: The number of the largest eigenvalues.
        bottom_k: The number of the smallest eigenvalues.
        tol: The largest relative residual.
        density_probes: The number of further start vectors.
        density_matvecs: The number of steps of each run for the density.
        method: Any string; refused unless it is one of `Method`.
        n: The size of the operator, if it is known.

    Raises:
        ValueError: If one is; the message says what to pass instead.
    """
    if method not in get_args(Method):
        raise ValueError(f"method is 'lanczos' or 'projected', got {method!r}.")
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(f"need top_k, bottom_k >= 0 and one above 0, got top_k={top_k}, bottom_k={bottom_k}.")
    if num_matvecs < top_k + bottom_k:
        raise ValueError(
            f"num_matvecs={num_matvecs} products show at most {num_matvecs} eigenvalues, asked for top_k={top_k} and "
            f"bottom_k={bottom_k}; raise num_matvecs, 96 is usual."
        )
    if density_probes < 0 or density_matvecs < 1:
        raise ValueError(
            f"need density_probes >= 0 and density_matvecs >= 1, got {density_probes} and {density_matvecs}; "
            "3 and 32 are usual."
        )
    vectors = num_matvecs + density_probes * max(density_matvecs, num_matvecs // 4)
    if method == "lanczos" and dim < min(n or dim + 1, 2 * vectors):
        raise ValueError(
            f"need dim >= {2 * vectors}, twice num_matvecs + density_probes density_matvecs, to distinguish the "
            f"Lanczos vectors, got dim={dim}."
        )
    if not 0 <= tol < 1:
        raise ValueError(f"need 0 <= tol < 1, got tol={tol}; 1e-2 is usual.")
