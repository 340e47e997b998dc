"""A spectrum as it is known: eigenvalues, how far off they may be, and which of them may be believed."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sketch import plots
from lightning_sketch.linalg.alignment import Share, overlap, shares
from lightning_sketch.linalg.eigenvectors import EigenPairs, eigenvectors
from lightning_sketch.linalg.krylov import Krylov
from lightning_sketch.linalg.quadrature import Quadrature
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.sketch import Sketch


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
    _: KW_ONLY
    known: tuple[int, int] | None = None
    """How many ranks from the top and from the bottom a further start vector left as they were; None if all."""
    n: int = 0
    """Size of the operator."""
    trace: float = math.nan
    """Sum of all eigenvalues, by Hutchinson's estimator."""
    trace_sem: float = math.nan
    """Its standard error, from the same few starts: twice as much is not rare."""
    quadrature: Quadrature | None = None
    """Nodes and weights that stand for all eigenvalues."""
    gradient_shares: Float[Tensor, " r"] | None = None
    """Shares of the gradient in the spaces of the first 1, 2, ... eigenvectors, where a gradient was given."""
    vectors: Float[Tensor, "dim k"] | None = None
    """S x of the first k: sketched eigenvectors of length one."""
    coefficients: Float[Tensor, "m r"] | None = None
    """x = V c, from the vectors of all runs."""
    krylov: Krylov | None = None
    """The runs that this was made from: sketched Krylov vectors and tridiagonal matrices."""
    sketch: Sketch | None = None
    """S; None if the vectors themselves were kept. Where the spectrum is of S A Sᵀ, that S."""
    method: str = "lanczos"
    """Or "projected": eigenvalues, trace and density are those of S A Sᵀ, of size n = dim."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self._described()}"

    def _described(self) -> str:
        pairs = zip(self.eigenvalues.tolist(), self.converged.tolist(), strict=True)
        shown = [f"{value:.4g}{'' if known else '?'}" for value, known in pairs]
        return (
            f"{int(self.converged.sum())} of {len(shown)} Ritz values converged, of an operator of size {self.n:,}, by "
            f"{self.num_products} products\n    largest {', '.join(shown[:5])}\n    smallest {', '.join(shown[:-4:-1])}"
            f"\n    trace {self.trace:.4g} ± {self.trace_sem:.2g}  (? not converged)"
        )

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

    def ratios(self, k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """R of the first k eigenvalues from the top, λ_i / λ_1, and of the first k from the bottom, |λ_-i| / λ_1.

        NaN where one has not converged; from the bottom, 0 where it is not negative.
        Source: Schioppa, arXiv:2402.03994, section 5.4 and figure 2.
        """
        believed = self.eigenvalues.where(self.converged, math.nan) / self.lambda_max
        return believed[:k].clamp(min=0), (-believed.flip(0)[:k]).clamp(min=0)

    def density(self, grid: Float[Tensor, " g"], sigma: float) -> Float[Tensor, " g"]:
        """The share of all n eigenvalues per unit at each point of the grid, smoothed to Gaussians of width sigma.

        From `density_probes` + 1 starts; with one start only the outline is right.
        """
        return self._quadrature.density(grid, sigma)

    @property
    def negative_mass(self) -> float:
        """Sum of |negative| over sum of |all| eigenvalues, estimated from the density; high by up to 1.6 where small.

        The fraction of eigenvalues that are negative cannot be had so: zeros fall to either side.
        """
        nodes = self._quadrature.nodes
        size = self._quadrature.mean(nodes.abs())
        return self._quadrature.mean(-nodes.clamp(max=0)) / size if size else 0.0

    @property
    def effective_rank(self) -> float:
        """Sum of |all| over the largest |eigenvalue|: trace / λ_1 if none is negative.

        From the density, and so as rough as its few starts: where a handful of eigenvalues make up the trace it can be
        off by half.
        Source: Vershynin (2018), "High-Dimensional Probability", remark 5.6.3.
        """
        largest = float(self.eigenvalues.abs().max())
        return self.n * self._quadrature.mean(self._quadrature.nodes.abs()) / largest if largest else 0.0

    def alignment(self, sketched_vector: Float[Tensor, " dim"], k: int) -> Share:
        """How much of a vector lies in the space of the k top eigenvectors: ||P g||² / ||g||², from S g alone.

        Args:
            sketched_vector: `sp.sketch.matvec(g)`, or g itself where `sp.sketch` is None.
            k: eigenvectors; NaN unless all of them have converged.

        Off by about 0.03 at dim 1024; a share below 0.1 is better had by passing `gradient=` to `spectrum`.
        """
        if self.vectors is None or sketched_vector.shape != self.vectors.shape[:1]:
            size = "nothing: this spectrum kept no vectors" if self.vectors is None else f"size {len(self.vectors)}"
            raise ValueError(
                f"alignment takes a vector of {size}, got shape {tuple(sketched_vector.shape)}; pass "
                "sp.sketch.matvec(g), or g itself where sp.sketch is None."
            )
        found = shares(self.vectors[:, :k], sketched_vector.detach().cpu().double(), self._exact)
        return self._share(found, k)

    def gradient_in_top(self, k: int) -> Share:
        """How much of the gradient given to `spectrum` lies in the space of the k top eigenvectors.

        NaN without a gradient, and unless all k have converged.
        """
        return self._share(self.gradient_shares, k)

    @property
    def gradient_in_outliers(self) -> Share:
        """How much of the gradient lies in the space of the outliers (above 20 % of the largest); NaN if not known."""
        count = self.num_outliers()
        return self._share(None if count.at_least else self.gradient_shares, count)

    def overlap(self, other: "Spectrum", k: int) -> Share:
        """How far the k top eigenvectors span the same space as those of another spectrum: mean squared cosine.

        From the sketches alone, which must be the same. NaN unless all k have converged in both.
        """
        if (
            self.vectors is None
            or other.vectors is None
            or (self.n, self.sketch, self.method) != (other.n, other.sketch, other.method)
        ):
            raise ValueError(
                f"cannot compare eigenvectors sketched by {self.sketch} with ones by {other.sketch}; measure both with "
                "the same operator size, dim and seed, and keep their vectors."
            )
        known = all(len(sp.converged) >= k and bool(sp.converged[:k].all()) for sp in (self, other))
        found = overlap(self.vectors[:, :k], other.vectors[:, :k], self._exact) if known else math.nan
        return Share(found, k / self.n)

    def eigenvectors(self, operator: LinearOperator, top_k: int = 10, bottom_k: int = 0) -> EigenPairs:
        """The k largest, then the k smallest, with eigenvectors of size n, Rayleigh quotients and true residuals.

        A second pass over the same operator: costs as many products again and memory for all the vectors asked for.
        """
        if self.krylov is None or self.coefficients is None:
            raise ValueError("this spectrum kept no Krylov vectors; call it on what spectrum(...) returned.")
        if self.method == "projected":
            raise ValueError("a projected spectrum has no eigenvectors of the operator itself; use method='lanczos'.")
        if not 0 < top_k + bottom_k <= len(self.eigenvalues):
            raise ValueError(
                f"this run found {len(self.eigenvalues)} eigenvalues, asked for the vectors of {top_k} + {bottom_k}; "
                "raise num_matvecs, or ask for fewer."
            )
        ranks = [*range(top_k), *range(-1, -bottom_k - 1, -1)]
        return eigenvectors(operator, self.krylov, self.coefficients[:, ranks], top_k)

    @property
    def _exact(self) -> bool:
        """Whether vectors are those of the operator measured, and not sketches of them."""
        return self.sketch is None or self.method == "projected"

    @property
    def _quadrature(self) -> Quadrature:
        if self.quadrature is None:
            raise ValueError("this spectrum holds no nodes and weights; take it with spectrum(...).")
        return self.quadrature

    def _share(self, found: Tensor | None, k: int) -> Share:
        known = found is not None and 0 < k <= len(found) and bool(self.converged[:k].all())
        return Share(float(found[k - 1]) if known else math.nan, k / self.n if self.n else math.nan)

    def plot(self):
        """The eigenvalues with their error bars, as a matplotlib figure."""
        nodes, weights = (part.tolist() for part in self.quadrature) if self.quadrature else ((), ())
        return plots.spectrum(
            self.eigenvalues.tolist(), self.residuals.tolist(), self.converged.tolist(), nodes, weights
        )
