"""The ends of an operator's spectrum, with error bars, from matrix-vector products alone.

Lanczos runs on the full operator and keeps only the sketches S v_j; sketched Rayleigh-Ritz turns them into
eigenvalues (`ritz.py`). Which of these may be believed is part of the result.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sketch.curvature.lanczos import lanczos, linearity_defect, start_vector
from lightning_sketch.curvature.ritz import rayleigh_ritz
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.block_srht import BlockSRHT

DEFECT_WARNED, DEFECT_REFUSED = 3e-3, 0.05
_CHECK_EVERY = 8
_NOT_FINITE = "a product with the operator is not finite; the loss is NaN or infinite at these parameters."


class Count(int):
    """A number of eigenvalues; if the run could not see them all, at least that many: prints as >=k."""

    at_least: bool

    def __new__(cls, value: int, at_least: bool):
        """`value` eigenvalues, or `at_least` so many."""
        count = super().__new__(cls, value)
        count.at_least = at_least
        return count

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else ''}{int(self)}"

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Ritz values of a symmetric operator, in falling order, float64 on the CPU.

    The units of eigenvalues are those of the loss over those of the parameters squared.
    """

    eigenvalues: Float[Tensor, " r"]
    residuals: Float[Tensor, " r"]
    """Some eigenvalue lies within this distance (sketch and rounding included)."""
    tol: float
    """A pair is accepted while residual <= tol · |eigenvalue|."""
    linearity_defect: float
    num_products: int
    """Products taken, those that measured the defect included."""

    @property
    def converged(self) -> Bool[Tensor, " r"]:
        """What is believed: walking inwards from each end, pairs up to the first that is not accepted."""
        accepted = self.residuals <= self.tol * self.eigenvalues.abs()
        from_top = accepted.cumprod(0).bool()
        from_bottom = accepted.flip(0).cumprod(0).flip(0).bool()
        return from_top | from_bottom

    def top(self, k: int) -> Float[Tensor, " k"]:
        """The k largest, largest first (fewer if the run found fewer)."""
        return self.eigenvalues[:k]

    def bottom(self, k: int) -> Float[Tensor, " k"]:
        """The k smallest of any sign, smallest first (fewer if the run found fewer)."""
        return self.eigenvalues.flip(0)[:k]

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def lambda_min(self) -> float:
        """The smallest eigenvalue, of any sign."""
        return float(self.eigenvalues[-1])

    @property
    def rneg(self) -> float:
        """|most negative| / largest eigenvalue; 0 if nothing negative stands out of the rounding.

        NaN if the largest is not positive. Source: Schioppa, arXiv:2402.03994, section 5.4.
        """
        noise = 10 * self.linearity_defect * self.eigenvalues.abs().max()
        if self.lambda_max <= 0:
            return float("nan")
        return -self.lambda_min / self.lambda_max if self.lambda_min < -noise else 0.0

    @property
    def rneg_error(self) -> float:
        """How far `rneg` may be off, from the residuals at both ends."""
        if self.lambda_max <= 0:
            return float("nan")
        return float(self.residuals[-1] + self.rneg * self.residuals[0]) / self.lambda_max

    def num_outliers(self, threshold: float = 0.2) -> Count:
        """Eigenvalues above threshold times the largest: a plain number only if all of them are known.

        That is when every one above and the next one below are converged; else those that are converged
        are counted, and the count says that it is a lower bound.
        """
        above = self.eigenvalues > threshold * self.lambda_max
        converged = self.residuals <= self.tol * self.eigenvalues.abs()
        walked = int(converged.cumprod(0).sum())  # converged from the top inwards
        count = int(above.sum())
        complete = count < walked
        return Count(count if complete else min(count, walked), at_least=not complete)


def spectrum(
    operator: LinearOperator,
    num_matvecs: int = 96,
    dim: int = 1024,
    seed: int = 0,
    top_k: int = 10,
    bottom_k: int = 3,
    tol: float = 1e-2,
    on_product: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """The largest and the smallest eigenvalues of a symmetric operator.

    Costs at most `num_matvecs` products, and 6 that measure how linear the operator is; memory of about
    five vectors of size n. Stops early once the `top_k` largest and `bottom_k` smallest are accepted; copies
    of a multiple eigenvalue come into view later than the first, so that with tol=0, which never stops
    early, they are found as far as `num_matvecs` reaches.

    Args:
        operator: symmetric, such as a `Hessian`.
        num_matvecs: most products of the Lanczos run.
        dim: size of the sketches of its vectors, at least twice `num_matvecs`; if dim >= n, the
            vectors themselves are kept.
        seed: of the start vector and of the sketch.
        top_k: how many of the largest eigenvalues are wanted.
        bottom_k: how many of the smallest.
        tol: largest relative residual of a converged pair; 1e-2 for "converged", 1e-3 for "certified".
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
    n = _check(operator, num_matvecs, dim, top_k, bottom_k, tol)
    sketch = BlockSRHT(n, dim, seed) if dim < n else None

    def sketched(v: Tensor) -> Tensor:
        return (v if sketch is None else sketch.matvec(v)).double().cpu()

    with operator.hold(), torch.no_grad():
        start = start_vector(operator, seed, 0)
        defect = _checked_defect(linearity_defect(operator, start, start_vector(operator, seed, -1)))
        columns, alphas, betas = [sketched(start)], [], []
        previous = start
        del start
        for v, alpha, beta in lanczos(operator, seed):
            if not (alpha == alpha and beta < float("inf")):
                raise ValueError(_NOT_FINITE)
            columns.append(sketched(v))
            alphas.append(alpha)
            betas.append(beta)
            done = len(alphas)
            if on_product is not None:
                on_product(done, num_matvecs)
            if done == min(4, num_matvecs):  # on vectors that the operator itself has shaped as well
                defect = max(defect, _checked_defect(linearity_defect(operator, previous, v)))
            previous = v if done < 4 else None
            if done == num_matvecs or done % _CHECK_EVERY == 0:
                tau = min(max(30 * defect, 100 * torch.finfo(operator.dtype).eps), 0.03)
                pairs = rayleigh_ritz(alphas, betas, torch.stack(columns, dim=1), tau, defect, exact=sketch is None)
                result = Spectrum(*pairs, tol=tol, linearity_defect=defect, num_products=done + 6)
                if done == num_matvecs or _found(result, top_k, bottom_k):
                    break
    if defect > DEFECT_WARNED:
        warnings.warn(
            f"the operator is linear only to {defect:.1e} of its size; eigenvalues below {10 * defect:.0e} of the "
            "largest mean nothing. Half precision or a loss that varies between calls does this.",
            stacklevel=2,
        )
    return result


def _found(result: Spectrum, top_k: int, bottom_k: int) -> bool:
    accepted = result.residuals <= result.tol * result.eigenvalues.abs()
    enough = len(accepted) >= top_k + bottom_k
    return enough and bool(accepted[:top_k].all()) and bool(accepted[len(accepted) - bottom_k :].all())


def _checked_defect(defect: float) -> float:
    if not defect < float("inf"):
        raise ValueError(_NOT_FINITE)
    if defect > DEFECT_REFUSED:
        raise ValueError(
            f"the operator is not linear: A(u + v) differs from A u + A v by {defect:.1%}. A loss that changes between "
            "calls does this: live dropout, batches that are drawn anew at each pass. Fix the batches and use "
            "mode='eval'."
        )
    return defect


def _check(operator: LinearOperator, num_matvecs: int, dim: int, top_k: int, bottom_k: int, tol: float) -> int:
    m, n = operator.shape
    if m != n:
        raise ValueError(f"a spectrum needs a square operator, got shape {operator.shape}.")
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(f"need top_k, bottom_k >= 0 and one above 0, got top_k={top_k}, bottom_k={bottom_k}.")
    if num_matvecs < top_k + bottom_k:
        raise ValueError(
            f"{num_matvecs} products show at most {num_matvecs} eigenvalues, asked for top_k={top_k} and "
            f"bottom_k={bottom_k}; raise num_matvecs, 96 is usual."
        )
    if dim < min(n, 2 * num_matvecs):
        raise ValueError(
            f"need dim >= 2 num_matvecs to tell the Lanczos vectors apart, got dim={dim}, num_matvecs={num_matvecs}."
        )
    if not tol >= 0:
        raise ValueError(f"need tol >= 0, got tol={tol}.")
    return n
