"""A spectrum as it is known: eigenvalues, how far off they may be, and which of them may be believed."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sketch import plots


class Count(int):
    """A number of eigenvalues; if the run could not see them all, at least that many: prints as >=k."""

    at_least: bool

    def __new__(cls, value: int, at_least: bool = False):
        """`value` eigenvalues, or at least so many."""
        count = super().__new__(cls, value)
        count.at_least = at_least
        return count

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else ''}{int(self)}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

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
    """Products taken, those that measured the defect and looked for copies included."""
    known: tuple[int, int] | None = field(default=None, kw_only=True)
    """How many ranks from the top and from the bottom a further start vector left as they were; None if all."""

    @property
    def accepted(self) -> Bool[Tensor, " r"]:
        """Whether an eigenvalue is known to be there: residual <= tol · |eigenvalue|."""
        return self.residuals <= self.tol * self.eigenvalues.abs()

    @property
    def converged(self) -> Bool[Tensor, " r"]:
        """What is believed: walking inwards from each end, pairs up to the first that is not accepted.

        And up to the first whose rank is not known: a residual says that an eigenvalue is there, not how often.
        """
        ranks = torch.arange(len(self.eigenvalues))
        top, bottom = self.known or (len(ranks), len(ranks))
        from_top = (self.accepted & (ranks < top)).cumprod(0).bool()
        from_bottom = (self.accepted & (ranks >= len(ranks) - bottom)).flip(0).cumprod(0).flip(0).bool()
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
        count = int((self.eigenvalues > threshold * self.lambda_max).sum())
        walked = int(self.converged.cumprod(0).sum())  # converged from the top inwards
        complete = count < walked
        return Count(count if complete else min(count, walked), at_least=not complete)

    def plot(self):
        """The eigenvalues with their error bars, as a matplotlib figure."""
        return plots.spectrum(self.eigenvalues.tolist(), self.residuals.tolist(), self.converged.tolist())
