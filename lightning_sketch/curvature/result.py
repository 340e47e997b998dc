"""The result of a spectrum: eigenvalues, how far off each may be, which have converged, and what follows from them."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

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

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Count(int):
    """A number of eigenvalues, which may be a lower bound; it then prints as >=k.

    Args:
        value: The number of eigenvalues, or of those that are known.
        at_least: Whether there may be more.

    >>> Count(3), Count(3, at_least=True), Count(3) + 1
    (3, >=3, 4)
    """

    at_least: bool

    def __new__(cls, value: int, *, at_least: bool = False) -> "Count":
        """Make an integer with the attribute `at_least`."""
        count = super().__new__(cls, value)
        count.at_least = at_least
        return count

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else ''}{int(self)}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    __repr__ = __str__


Method = Literal["lanczos", "projected"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The Ritz values of a symmetric operator in falling order, with their errors, and what follows from them.

    Tensors are on the CPU, in float64. The unit of eigenvalues is that of the loss over that of the parameters squared.

    Attributes:
        eigenvalues: Ritz values, largest first, (r,).
        residuals: Some eigenvalue lies within this distance of the Ritz value, (r,), in the same unit; the errors of
            the sketch and of rounding are included.
        tol: A pair is accepted if residual <= tol · |eigenvalue|.
        linearity_defect: ||A(u + v) - A u - A v|| over the largest of the three norms; rounding for a linear operator.
        product_error: The largest error of a product by differences of gradients over the size of the operator, which
            residuals include; 0 for products by autograd.
        num_products: The number of products taken, also those that measured the defect and searched for copies.
        known: How many ranks from the top and how many from the bottom did not change with a further start vector;
            None if all of them count as known.
        n: The size of the operator.
        trace: The sum of all eigenvalues, by Hutchinson's estimator; NaN if it was not estimated.
        trace_sem: The standard error of `trace`, from the same few starts: an error of twice as much is not rare.
        trace_of_square: The sum of all squared eigenvalues, tr A² = ||A||_F², in the unit of eigenvalues squared; NaN
            if it was not estimated.
        trace_of_square_sem: The standard error of `trace_of_square`, as `trace_sem`.
        quadrature: Nodes and weights that represent all eigenvalues: these themselves if all have converged.
        gradient_shares: Shares of the gradient in the spaces of the first 1, 2, ... eigenvectors, (r,); None if no
            gradient was passed.
        vectors: Sketched eigenvectors S x of length one as columns, (dim, k).
        coefficients: Columns c with x = V c, V the Lanczos vectors of all runs, (m, r).
        krylov: The records of the runs: sketched Lanczos vectors and tridiagonal matrices.
        sketch: The sketch S of the vectors; None if the vectors themselves were kept. With method "projected" the S of
            S A Sᵀ.
        method: "lanczos", or "projected": then eigenvalues, trace and density are those of S A Sᵀ, and n is dim.
        noise_samples: The number of draws of random numbers that the matrix is a mean over, if the loss draws any: all
            errors are those of the matrix for these draws. 0 for a loss that draws none.
        data_error: The standard error of the largest eigenvalue as an estimate of that of ever more batches like these,
            by the jackknife; NaN unless `over_batches` was asked for. With four batches it is rough: an interval of two
            errors to either side included the eigenvalue of all data in 38 to 46 of 50 draws, and of eight in 46 or 47.
        data_bias: How much too large the eigenvalue is on average, as such an estimate: few examples add noise to the
            matrix, and noise raises the largest eigenvalue.
        batch_lambda_max: The largest eigenvalue of each batch's own matrix, (batches,); NaN where it has not converged.
            None unless `over_batches` was asked for.
    """

    eigenvalues: Float[Tensor, " r"]
    residuals: Float[Tensor, " r"]
    _: KW_ONLY
    tol: float
    linearity_defect: float
    num_products: int
    known: tuple[int, int] | None = None
    n: int = 0
    trace: float = math.nan
    trace_sem: float = math.nan
    trace_of_square: float = math.nan
    trace_of_square_sem: float = math.nan
    quadrature: Quadrature | None = None
    gradient_shares: Float[Tensor, " r"] | None = None
    vectors: Float[Tensor, "dim k"] | None = None
    coefficients: Float[Tensor, "m r"] | None = None
    krylov: Krylov | None = None
    sketch: Sketch | None = None
    method: Method = "lanczos"
    noise_samples: int = 0
    data_error: float = math.nan
    data_bias: float = math.nan
    batch_lambda_max: Float[Tensor, " batches"] | None = None
    product_error: float = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self._described()}"

    def _described(self) -> str:
        pairs = zip(self.eigenvalues.tolist(), self.converged.tolist(), strict=True)
        shown = [f"{value:.4g}{'' if known else '?'}" for value, known in pairs]
        ends = ", ".join(shown[:5]), ", ".join(shown[:-4:-1])
        over = ""
        if math.isfinite(self.data_error):
            over += f"\n    over batches: largest ± {self.data_error:.2g}, too large by about {self.data_bias:.2g}"
        if self.noise_samples:
            draws = "1 draw" if self.noise_samples == 1 else f"{self.noise_samples} draws"
            over += f"\n    for {draws} of the loss's random numbers"
        if self.product_error:
            over += f"\n    by differences of gradients, products off by up to {self.product_error:.1g}"
        legend = "\n    ? marks what has not converged" if "?" in "".join(ends) else ""
        return (
            f"{int(self.converged.sum())} of {len(shown)} Ritz values converged, of an operator of size {self.n:,}, by "
            f"{self.num_products} products\n    largest {ends[0]}\n    smallest {ends[1]}"
            f"\n    trace {self.trace:.4g} ± {self.trace_sem:.2g}{over}{legend}"
        )

    @property
    def accepted(self) -> Bool[Tensor, " r"]:
        """Whether some eigenvalue is known to be near a Ritz value, (r,): residual <= tol · |eigenvalue|."""
        return self.residuals <= self.tol * self.eigenvalues.abs()

    @property
    def converged(self) -> Bool[Tensor, " r"]:
        """Whether value and rank can be relied on, (r,): true from each end inwards up to the first pair that fails.

        A pair fails if it is not accepted, or if its rank is not known: a residual says that there is an eigenvalue,
        but not how many of them.
        """
        ranks = torch.arange(len(self.eigenvalues))
        top, bottom = self.known or (len(ranks), len(ranks))
        from_top = (self.accepted & (ranks < top)).cumprod(0).bool()
        from_bottom = (self.accepted & (ranks >= len(ranks) - bottom)).flip(0).cumprod(0).flip(0).bool()
        return from_top | from_bottom

    def top(self, k: int) -> Float[Tensor, " k"]:
        """Return the k largest eigenvalues, largest first (fewer if the run found fewer)."""
        return self.eigenvalues[:k]

    def bottom(self, k: int) -> Float[Tensor, " k"]:
        """Return the k smallest eigenvalues of any sign, smallest first (fewer if the run found fewer)."""
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
        """The ratio |most negative eigenvalue| / largest; 0 if no negative one is larger than rounding errors.

        NaN if the largest is not positive. Source: Schioppa, arXiv:2402.03994, section 5.4.
        """
        noise = max(10 * self.linearity_defect, self.product_error) * self.eigenvalues.abs().max()
        if self.lambda_max <= 0:
            return float("nan")
        return -self.lambda_min / self.lambda_max if self.lambda_min < -noise else 0.0

    @property
    def rneg_error(self) -> float:
        """The error bound of `rneg`, from the residuals at both ends."""
        if self.lambda_max <= 0:
            return float("nan")
        return float(self.residuals[-1] + self.rneg * self.residuals[0]) / self.lambda_max

    def num_outliers(self, threshold: float = 0.2) -> Count:
        """Return the number of eigenvalues above `threshold` times the largest, or a lower bound.

        The number is exact if all of them and the next one below have converged; otherwise those that have converged
        are counted, and `at_least` is set.
        """
        count = int((self.eigenvalues > threshold * self.lambda_max).sum())
        from_top = int(self.converged.cumprod(0).sum())
        complete = count < from_top
        return Count(count if complete else min(count, from_top), at_least=not complete)

    def ratios(self, k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Return the ratios λ_i / λ_1 of the k largest eigenvalues, and |λ_-i| / λ_1 of the k smallest.

        NaN where an eigenvalue has not converged; of the smallest, 0 where it is not negative.
        Source: Schioppa, arXiv:2402.03994, section 5.4 and figure 2.
        """
        ratios = self.eigenvalues.where(self.converged, math.nan) / self.lambda_max
        return ratios[:k].clamp(min=0), (-ratios.flip(0)[:k]).clamp(min=0)

    def density(self, grid: Float[Tensor, " g"], sigma: float) -> Float[Tensor, " g"]:
        """Return the density of all n eigenvalues at each grid point, smoothed to Gaussians of width sigma.

        It is estimated from `density_probes` + 1 starts; with one start only its outline is right.

        Args:
            grid: Points to evaluate at, in the unit of eigenvalues.
            sigma: Standard deviation of the Gaussians, in the same unit.

        Raises:
            ValueError: If the spectrum has no nodes and weights.
        """
        return self._quadrature.density(grid, sigma)

    @property
    def negative_mass(self) -> float:
        """The sum of |negative| eigenvalues over the sum of all |eigenvalues|, estimated from the density.

        Small values come out too large by up to a factor of 1.6. The number of negative eigenvalues cannot be
        estimated in this way: zeros are found on either side.
        """
        nodes = self._quadrature.nodes
        size = self._quadrature.mean(nodes.abs())
        return self._quadrature.mean(-nodes.clamp(max=0)) / size if size else 0.0

    @property
    def effective_rank(self) -> float:
        """The sum of all |eigenvalues| over the largest |eigenvalue|: trace / λ_1 if none is negative.

        It is estimated from the density and its few starts: where a handful of eigenvalues make up the trace it can be
        off by half.
        Source: Vershynin (2018), "High-Dimensional Probability", remark 5.6.3.
        """
        largest = float(self.eigenvalues.abs().max())
        return self.n * self._quadrature.mean(self._quadrature.nodes.abs()) / largest if largest else 0.0

    @property
    def frobenius_norm(self) -> float:
        """The root of the sum of all squared eigenvalues, ||A||_F; NaN if it was not estimated.

        Its standard error is `trace_of_square_sem / (2 * frobenius_norm)`.
        """
        return math.sqrt(self.trace_of_square)

    def alignment(self, sketched_vector: Float[Tensor, " dim"], k: int) -> Share:
        """Return the share of a vector in the space of the k top eigenvectors, ||P g||² / ||g||², from S g alone.

        The error is about 0.03 at dim 1024; for a share below 0.1 pass `gradient=` to `spectrum`, which is more
        accurate.

        Args:
            sketched_vector: `sp.sketch.matvec(g)`, or g itself if `sp.sketch` is None.
            k: Number of eigenvectors; the share is NaN unless all of them have converged.

        Raises:
            ValueError: If the vector has another size than the sketches, or the spectrum has no vectors.
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
        """Return the share of the gradient passed to `spectrum` in the space of the k top eigenvectors.

        NaN without a gradient, and unless all k have converged.
        """
        return self._share(self.gradient_shares, k)

    @property
    def gradient_in_outliers(self) -> Share:
        """The share of the gradient in the space of the outliers (above 20 % of the largest); NaN if not known."""
        count = self.num_outliers()
        return self._share(None if count.at_least else self.gradient_shares, count)

    def overlap(self, other: "Spectrum", k: int) -> Share:
        """Return the overlap of the spaces of the k top eigenvectors of two spectra: the mean squared cosine.

        It is computed from the sketches alone. NaN unless all k have converged in both.

        Args:
            other: A spectrum of an operator of the same size, by the same sketch and method.
            k: Number of eigenvectors.

        Raises:
            ValueError: If sizes, sketches or methods differ, or one of the spectra has no vectors.
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

    def eigenvectors(self, operator: LinearOperator, top_k: int = 10, *, bottom_k: int = 0) -> EigenPairs:
        """Return eigenvectors of size n with Rayleigh quotients and true residuals, by a second pass.

        It costs as many products as the spectrum, 2 (top_k + bottom_k) more, and memory for all these vectors.

        Args:
            operator: The operator that the spectrum was computed from, unchanged.
            top_k: Number of the largest eigenvalues, which come first, largest first.
            bottom_k: Number of the smallest, which come last, smallest first.

        Raises:
            ValueError: If the spectrum has no Krylov vectors or is a projected one, found fewer eigenvalues, or some
                of these have not converged.
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
        return eigenvectors(operator, self.krylov, coefficients=self.coefficients[:, ranks], top_k=top_k)

    @property
    def _exact(self) -> bool:
        """Whether `vectors` are the eigenvectors themselves, and not sketches of them."""
        return self.sketch is None or self.method == "projected"

    @property
    def _quadrature(self) -> Quadrature:
        if self.quadrature is None:
            raise ValueError("this spectrum has no nodes and weights; compute it with spectrum(...).")
        return self.quadrature

    def _share(self, found: Tensor | None, k: int) -> Share:
        """Return the k-th of some shares with that of a random direction; NaN unless k values have converged."""
        chance = k / self.n if self.n else math.nan
        if found is None or not 0 < k <= len(found) or not self.converged[:k].all():
            return Share(math.nan, chance)
        return Share(float(found[k - 1]), chance)

    def plot(self) -> "Figure":
        """Draw the eigenvalues with their error bars, and the density beside them if it is known.

        Returns:
            A matplotlib Figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        nodes, weights = (part.tolist() for part in self.quadrature) if self.quadrature else ((), ())
        return plots.spectrum(
            self.eigenvalues.tolist(),
            self.residuals.tolist(),
            converged=self.converged.tolist(),
            size=self.n,
            nodes=nodes,
            weights=weights,
        )
