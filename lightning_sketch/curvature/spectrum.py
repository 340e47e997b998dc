"""The largest and smallest eigenvalues of an operator, with error bars, from matrix-vector products alone.

Lanczos runs on the full operator and keeps only the sketches S v_j; sketched Rayleigh-Ritz computes eigenvalues from
them (`linalg.ritz`). The result says which of these have converged.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._arguments import kind_of, whole_number
from lightning_sketch.curvature.data_error import check_batches, data_error, origin_of
from lightning_sketch.curvature.result import Method, Spectrum
from lightning_sketch.linalg.alignment import better_of, shares, shares_by_dots
from lightning_sketch.linalg.krylov import Krylov
from lightning_sketch.linalg.linearity import Watched
from lightning_sketch.linalg.quadrature import Quadrature, Trace, quadrature, trace
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
    over_batches: bool = False,
    on_product: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """Compute the largest and the smallest eigenvalues of a symmetric operator, with error bars.

    It takes at most `num_matvecs` products, a quarter as many (at least 8) to search for copies of multiple
    eigenvalues, and 3 to measure how linear the operator is; memory for about five vectors of size n. It stops
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
            (`benchmarks/paper/table_7.py`).
        gradient: A vector of size n, whose share in the space of the top eigenvectors is computed as well.
        over_batches: Whether to compute as well how far the largest eigenvalue depends on the batches, and that of each
            batch alone: `data_error`, `data_bias` and `batch_lambda_max` of the result. It takes as many products again
            as the leading eigenvectors needed, 15 more, and at most 32 with each batch (38 in all for two classifiers
            of digits, beside 126 and 86 of the spectrum); memory for about twelve vectors of size n. Under
            `distributed`, over the batches of all ranks.
        on_product: Called as on_product(products taken, largest number of products) after each product of a run.

    Raises:
        ValueError: If the operator is not square, an argument is out of its range, a product is not
            finite, the operator is not linear (`linearity_defect` above 0.05) or not symmetric, or it has no two
            batches to compute over. Vectors of a sharded module allow neither `method="projected"` nor `over_batches`.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> s = BlockSRHT(n=256, dim=16, seed=0)
    >>> sp = spectrum(s.T @ s, top_k=2, bottom_k=0)  # 16 eigenvalues n / dim = 16, the others are zero
    >>> sp.top(2)
    tensor([16.0000, 16.0000], dtype=torch.float64)
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"spectrum takes an operator, got {kind_of(operator)}; pass Hessian(loss_fn, module, batches).")
    m, n = operator.shape
    if m != n:
        raise ValueError(f"a spectrum needs a square operator, got shape {operator.shape}; use S.T @ S of a sketch S.")
    size = operator.space.size
    if gradient is not None and gradient.shape != (size,):
        raise ValueError(f"gradient is a vector of size {size}, got shape {tuple(gradient.shape)}.")
    if method == "projected" and operator.space.sharded:
        raise ValueError("method='projected' needs whole vectors, and a sharded module has parts; use 'lanczos'.")
    if over_batches:
        check_batches(operator, method)
    origin = origin_of(operator)
    projection = BlockSRHT(n, min(dim, n), seed=seed) if method == "projected" else None
    if projection is not None:
        operator, n = projection @ operator @ projection.T, projection.dim
        gradient = None if gradient is None else projection.matvec(gradient)
    check_arguments(num_matvecs, dim, top_k, bottom_k, tol, density_probes, density_matvecs, method, n)
    # Shards that are no rows count the numbers of a vector in another order, and sketches then are of other vectors.
    own = (seed + operator.space.numbering) % (1 << 63)
    krylov = Krylov(seed, BlockSRHT(n, dim, seed=own) if dim < n else None)
    growing = _Growing(operator, krylov, gradient, top_k, bottom_k, tol, num_matvecs, on_product)
    with operator.hold(), torch.no_grad():
        found = growing.first_run(least=min(density_matvecs, num_matvecs) if density_probes else 0)
        done = krylov.num_products
        found = growing.further_runs(found, density_probes, density_matvecs)
        if over_batches:
            found = _with_data_error(found, operator, growing.tau)
    _warn_of(growing.defect)
    nodes = _density(found, krylov, 1 + density_probes, density_matvecs if density_probes else done)
    (total, total_sem), (squares, squares_sem) = (_sum_of_powers(found, krylov, power) for power in (1, 2))
    return replace(
        found,
        trace=total,
        trace_sem=total_sem,
        trace_of_square=squares,
        trace_of_square_sem=squares_sem,
        quadrature=nodes,
        gradient_shares=_gradient_shares(found, krylov, operator, gradient),
        sketch=projection or krylov.sketch,
        method=method,
        noise_samples=getattr(origin, "noise_samples", 0),
    )


@dataclass
class _Growing:
    """A spectrum that becomes known better with each Lanczos run.

    Attributes:
        operator: The operator, held.
        krylov: The record of the runs, which grows.
        gradient: A vector whose products with the Lanczos vectors are recorded too.
        top_k: The number of the largest eigenvalues that are wanted.
        bottom_k: The number of the smallest ones.
        tol: The largest relative residual of a converged pair.
        most: The largest number of products of the first run.
        on_product: Called after each product of a run, with their number and the largest number of them.
        defect: The largest defect of linearity that was seen.
        further: The number of products that measured it, beside those of the runs.
    """

    operator: LinearOperator
    krylov: Krylov
    gradient: Tensor | None
    top_k: int
    bottom_k: int
    tol: float
    most: int
    on_product: Callable[[int, int], None] | None
    defect: float = 0.0
    further: int = 0

    def first_run(self, least: int) -> Spectrum:
        """Run until all eigenvalues asked for have converged, after `least` products at the earliest."""
        watched = Watched(self.operator, self.krylov.seed)
        for done, _ in enumerate(self._products(watched), start=1):
            self.defect, self.further = watched.defect, watched.num_products
            if done == self.most or done % _CHECK_EVERY == 0:
                found = self._spectrum()
                if done == self.most or (done >= least and self._enough(found)):
                    return found
        raise AssertionError("a Lanczos run has no end")

    def further_runs(self, found: Spectrum, probes: int, matvecs: int) -> Spectrum:
        """Search for copies of eigenvalues with new start vectors, until one of them finds none.

        Args:
            found: The spectrum by the first run.
            probes: The first so many of the further runs are long enough for the density.
            matvecs: The number of products that this takes.
        """
        done = self.krylov.num_products
        length = max(_CHECK_EVERY, done // 4)
        for start in range(max(1, probes, (self.most - done) // length)):
            before = found
            for _ in itertools.islice(self._products(), max(length, matvecs if start < probes else 0)):
                pass
            found = self._spectrum()
            found = replace(found, known=_unchanged(before, found))
            if start + 1 >= probes and self._enough(found):
                break
        return found

    def _products(self, operator: LinearOperator | None = None) -> Iterator[Tensor]:
        """Yield the vectors of a run from a new start vector, of this operator if it is not the one of all runs."""
        for v in self.krylov.grow(operator or self.operator, self.gradient):
            if self.on_product is not None:
                self.on_product(self.krylov.num_products, max(self.krylov.num_products, self.most))
            yield v

    def _spectrum(self) -> Spectrum:
        """Return what all runs so far say."""
        pairs = rayleigh_ritz(self.krylov.runs, self.tau, self.defect, exact=self.krylov.sketch is None)
        return Spectrum(
            pairs.values,
            pairs.residuals,
            tol=self.tol,
            linearity_defect=self.defect,
            product_error=self.product_error,
            num_products=self.krylov.num_products + self.further,
            n=self.operator.shape[1],
            vectors=pairs.vectors,
            coefficients=pairs.coefficients,
            krylov=self.krylov,
            sketch=self.krylov.sketch,
        )

    @property
    def tau(self) -> float:
        """The relative size of singular values of the sketched basis below which they are rounding errors."""
        noise = max(self.defect, self.product_error)
        return min(max(30 * noise, 100 * torch.finfo(self.operator.dtype).eps), 0.03)

    @property
    def product_error(self) -> float:
        """The largest known error of a product over the size of the operator, as far as the runs have seen it."""
        runs = self.krylov.runs
        largest = max(abs(alpha) + beta for run in runs for alpha, beta in zip(run.alpha, run.beta, strict=True))
        return max((error for run in runs for error in run.errors), default=0.0) / (largest or 1.0)

    def _enough(self, found: Spectrum) -> bool:
        """Return whether the eigenvalues asked for have converged."""
        converged = found.converged
        enough = len(converged) >= self.top_k + self.bottom_k
        from_bottom = converged[len(converged) - self.bottom_k :]
        return enough and bool(converged[: self.top_k].all()) and bool(from_bottom.all())


def _with_data_error(found: Spectrum, operator: LinearOperator, tau: float) -> Spectrum:
    """Return the spectrum with what single batches say about its largest eigenvalue."""
    error, bias, tops, products = data_error(operator, found, tau)
    products += found.num_products
    return replace(found, data_error=error, data_bias=bias, batch_lambda_max=tops, num_products=products)


def _warn_of(defect: float) -> None:
    """Warn of an operator that is not linear to rounding."""
    if defect > _DEFECT_WARNED:
        warnings.warn(
            f"the operator is linear only to {defect:.1e} of its size; eigenvalues below {10 * defect:.0e} of the "
            "largest mean nothing. Half precision or a loss that varies between calls does this.",
            stacklevel=3,
        )


def _all_known(found: Spectrum) -> bool:
    """Return whether every one of the n eigenvalues has converged."""
    return len(found.eigenvalues) == found.n and bool(found.converged.all())


def _density(found: Spectrum, krylov: Krylov, runs: int, steps: int) -> Quadrature:
    """Return nodes and weights from the first runs: the eigenvalues themselves where all are known."""
    if _all_known(found):
        return Quadrature(found.eigenvalues, torch.full_like(found.eigenvalues, 1 / found.n))
    return quadrature(krylov.runs[:runs], steps)


def _sum_of_powers(found: Spectrum, krylov: Krylov, power: Literal[1, 2]) -> Trace:
    """Return tr A or tr A², exact where all eigenvalues are known."""
    values, errors = found.eigenvalues, found.residuals
    if _all_known(found):
        error = power * (values.abs() ** (power - 1) * errors).sum()
        return Trace(float((values**power).sum()), float(error))
    return trace(krylov.runs, found.n, values, errors, found.converged, power=power)


def _gradient_shares(
    found: Spectrum, krylov: Krylov, operator: LinearOperator, gradient: Tensor | None
) -> Tensor | None:
    """Return the shares of the gradient in the spaces of the first 1, 2, ... eigenvectors; None if it is zero."""
    vectors, coefficients = found.vectors, found.coefficients
    if gradient is None or vectors is None or coefficients is None:
        return None
    norm = operator.space.norm(gradient)
    if not norm:
        return None
    dots = torch.tensor([d for run in krylov.runs for d in run.dots[:-1]], dtype=torch.float64)
    by_dots = shares_by_dots(vectors, coefficients, dots, norm)
    if krylov.sketch is None:
        return by_dots
    return better_of(shares(vectors, operator.space.sketched(krylov.sketch, gradient), exact=False), by_dots)


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
        raise ValueError(f"method is 'lanczos' or 'projected', got {method!r}; leave it out for 'lanczos'.")
    numbers = {"num_matvecs": (num_matvecs, 96), "dim": (dim, 1024), "top_k": (top_k, 10), "bottom_k": (bottom_k, 3)}
    for name, (value, usual) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            whole_number(value, name, 0, usual)
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(
            f"need top_k, bottom_k >= 0 and one above 0, got top_k={top_k}, bottom_k={bottom_k}; 10 and 3 are usual."
        )
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
            f"Lanczos vectors, got dim={dim}; leave dim out, or lower num_matvecs."
        )
    if not 0 <= tol < 1:
        raise ValueError(f"need 0 <= tol < 1, got tol={tol}; 1e-2 is usual.")
