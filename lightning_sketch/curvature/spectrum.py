"""The ends of an operator's spectrum, with error bars, from matrix-vector products alone.

Lanczos runs on the full operator and keeps only the sketches S v_j; sketched Rayleigh-Ritz turns them into
eigenvalues (`ritz.py`). Which of these may be believed is part of the result.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.curvature.lanczos import lanczos, linearity_defect, start_vector
from lightning_sketch.curvature.result import Spectrum
from lightning_sketch.curvature.ritz import SketchedRun, rayleigh_ritz
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.block_srht import BlockSRHT

DEFECT_WARNED, DEFECT_REFUSED = 3e-3, 0.05
_CHECK_EVERY = 8
_NOT_FINITE = "a product with the operator is not finite; the loss is NaN or infinite at these parameters."


def spectrum(
    operator: LinearOperator,
    num_matvecs: int = 96,
    dim: int = 1024,
    seed: int = 0,
    top_k: int = 10,
    bottom_k: int = 3,
    tol: float = 1e-2,
    density_probes: int = 0,
    on_product: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """The largest and the smallest eigenvalues of a symmetric operator.

    Costs at most `num_matvecs` products, a quarter as many (at least 8) that look for copies of multiple
    eigenvalues, and 6 that measure how linear the operator is; memory of about five vectors of size n. Stops
    early once the `top_k` largest and `bottom_k` smallest are accepted.

    One start vector shows one copy of a multiple eigenvalue. So the run is followed by short ones from other
    starts, until one of them changes no wanted rank or the products are spent; what is still changing then
    does not count as converged. A copy that a quarter of the first run's products cannot bring out is missed.

    Args:
        operator: symmetric, such as a `Hessian`.
        num_matvecs: most products of the Lanczos run.
        dim: size of the sketches of its vectors, at least twice `num_matvecs`; if dim >= n, the
            vectors themselves are kept.
        seed: of the start vector and of the sketch.
        top_k: how many of the largest eigenvalues are wanted.
        bottom_k: how many of the smallest.
        tol: largest relative residual of a converged pair; 1e-2 for "converged", 1e-3 for "certified".
        density_probes: 0; the density of the whole spectrum is not in this version.
        on_product: called with (products done, most products) after each one of the run.

    Raises:
        ValueError: if the operator is not square, an argument is out of its range, a product is not
            finite, or the operator is not linear (`linearity_defect` above 0.05).

    >>> from lightning_sketch.operators import BlockSRHT
    >>> s = BlockSRHT(n=256, dim=16, seed=0)
    >>> sp = spectrum(s.T @ s, top_k=2, bottom_k=0)  # n / dim = 16, dim times; the rest are zeros
    >>> sp.top(2)
    tensor([16.0000, 16.0000], dtype=torch.float64)
    """
    m, n = operator.shape
    if m != n:
        raise ValueError(f"a spectrum needs a square operator, got shape {operator.shape}.")
    check_arguments(num_matvecs, dim, top_k, bottom_k, tol, n)
    if density_probes:
        raise ValueError(f"spectrum(density_probes={density_probes}) is not in this version; use 0.")
    sketch = BlockSRHT(n, dim, seed) if dim < n else None

    def sketched(v: Tensor) -> Tensor:
        return (v if sketch is None else sketch.matvec(v)).cpu().double()

    runs: list[SketchedRun] = []

    def steps() -> Iterator[Tensor]:
        """The vectors of a run from a new start."""
        start = len(runs)
        runs.append(run := SketchedRun([sketched(start_vector(operator, seed, f"{start}"))]))
        for v, alpha, beta in lanczos(operator, seed, start):
            if not (alpha == alpha and beta < float("inf")):
                raise ValueError(_NOT_FINITE)
            run.columns.append(sketched(v))
            run.alpha.append(alpha)
            run.beta.append(beta)
            if on_product is not None:
                done = sum(len(run.alpha) for run in runs)
                on_product(done, max(done, num_matvecs))
            yield v

    def result(defect: float) -> Spectrum:
        tau = min(max(30 * defect, 100 * torch.finfo(operator.dtype).eps), 0.03)
        pairs = rayleigh_ritz(runs, tau, defect, exact=sketch is None)
        products = sum(len(run.alpha) for run in runs) + 6
        return Spectrum(*pairs, tol=tol, linearity_defect=defect, num_products=products)

    with operator.hold(), torch.no_grad():
        previous = start_vector(operator, seed, "0")
        defect = checked_defect(operator, previous, start_vector(operator, seed, "defect"))
        for done, v in enumerate(steps(), start=1):
            if done == min(4, num_matvecs):  # on vectors that the operator itself has shaped as well
                defect = max(defect, checked_defect(operator, previous, v))
            previous = v if done < 4 else None
            if done == num_matvecs or done % _CHECK_EVERY == 0:
                found = result(defect)
                if done == num_matvecs or _enough(found, top_k, bottom_k):
                    break
        del v
        length = max(_CHECK_EVERY, done // 4)
        for _ in range(max(1, (num_matvecs - done) // length)):
            before = found
            for _ in zip(range(length), steps(), strict=False):
                pass
            found = result(defect)
            found = replace(found, known=_unchanged(before, found))
            if _enough(found, top_k, bottom_k):
                break
    if defect > DEFECT_WARNED:
        warnings.warn(
            f"the operator is linear only to {defect:.1e} of its size; eigenvalues below {10 * defect:.0e} of the "
            "largest mean nothing. Half precision or a loss that varies between calls does this.",
            stacklevel=2,
        )
    return found


def _enough(found: Spectrum, top_k: int, bottom_k: int) -> bool:
    """Whether everything wanted is believed."""
    converged = found.converged
    enough = len(converged) >= top_k + bottom_k
    return enough and bool(converged[:top_k].all()) and bool(converged[len(converged) - bottom_k :].all())


def _unchanged(before: Spectrum, after: Spectrum) -> tuple[int, int]:
    """How many ranks from the top, and from the bottom, a further start has left within tol (or the error bars)."""

    def prefix(a: Tensor, b: Tensor, errors: Tensor) -> int:
        size = min(len(a), len(b))
        same = (a[:size] - b[:size]).abs() <= torch.maximum(after.tol * b[:size].abs(), errors[:size])
        return int(same.cumprod(0).sum())

    top = prefix(before.eigenvalues, after.eigenvalues, after.residuals)
    bottom = prefix(before.eigenvalues.flip(0), after.eigenvalues.flip(0), after.residuals.flip(0))
    return top, bottom


def checked_defect(operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> float:
    """How far the operator is from linear on u and v; refused above 0.05."""
    defect = linearity_defect(operator, u, v)
    if not defect < float("inf"):
        raise ValueError(_NOT_FINITE)
    if defect > DEFECT_REFUSED:
        raise ValueError(
            f"the operator is not linear: A(u + v) differs from A u + A v by {defect:.1%}. A loss that changes between "
            "calls does this: live dropout, batches that are drawn anew at each pass. Fix the batches and use "
            "mode='eval'."
        )
    return defect


def check_arguments(num_matvecs: int, dim: int, top_k: int, bottom_k: int, tol: float, n: int | None = None) -> None:
    """Refuse what no spectrum can be measured with; n is the size of the operator, where it is known."""
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(f"need top_k, bottom_k >= 0 and one above 0, got top_k={top_k}, bottom_k={bottom_k}.")
    if num_matvecs < top_k + bottom_k:
        raise ValueError(
            f"num_matvecs={num_matvecs} products show at most {num_matvecs} eigenvalues, asked for top_k={top_k} and "
            f"bottom_k={bottom_k}; raise num_matvecs, 96 is usual."
        )
    if dim < min(n or dim + 1, 2 * num_matvecs):
        raise ValueError(
            f"need dim >= 2 num_matvecs = {2 * num_matvecs} to tell the Lanczos vectors apart, got dim={dim}."
        )
    if not 0 <= tol < 1:
        raise ValueError(f"need 0 <= tol < 1, got tol={tol}; 1e-2 is usual.")
