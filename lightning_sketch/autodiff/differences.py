"""Products with a Hessian by differences of gradients, with a step that is chosen and an error that is known.

    D(h) = (∇L(θ + h v) - ∇L(θ - h v)) / 2h = H v + O(h²) + noise of length s / h,          ||v|| = 1

A product comes from D(h) and D(h/2). Their difference has the length √(5 s²/h² + t²), with t three quarters of the
truncation error of D(h). So the noise s, which is measured once, tells both errors apart:

    D(h/2) + (D(h/2) - D(h)) / 3      has an error below √(7.2 s²/h² + (t/3)²), where truncation dominates
    (4 D(h) + D(h/2)) / 5             has an error of √(0.8 s²/h² + (1.13 t)²), where noise does

The factors are those of independent noise in both differences; t/3 is the truncation error of D(h/2), which the first
formula removes up to the order h⁴.

Source: Moré & Wild (2012), "Estimating derivatives of noisy simulations", ACM Transactions on Mathematical Software
38(3), doi:10.1145/2168773.2168777, for steps that balance noise and truncation.
"""

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.space import VectorSpace

_FACTOR = 4.0  # ratio of the steps that are tried one after the other
_SMALLER, _LARGER = 14, 5  # how many steps are tried on each side of the first
_USELESS = 0.5  # relative difference between the two best steps above which no step says anything


class CentralDifferences:
    """Products with the derivative of a gradient along vectors.

    Args:
        difference: (v, h) -> D(h) as a new vector, where h counts in lengths of v.
        space: The vectors.
        step: The step h along a vector of length one; chosen by `choose` if None.

    Attributes:
        step: The step that is used.
        noise: The length s of the noise in a difference of gradients over two.
        error: A vector about as long as the error of the last product.
    """

    def __init__(self, difference: Callable[[Tensor, float], Tensor], space: VectorSpace, step: float | None = None):
        self._difference, self._space, self._given = difference, space, step
        self.step, self.noise = step or 1.0, 0.0
        self.error: Tensor | None = None

    def choose(self, v: Float[Tensor, " size"], near: float) -> None:
        """Choose the step at which differences along a vector depend least on it, and measure their noise.

        Steps become smaller until noise makes two neighbors differ more again, and larger if the first was the best. A
        step that was given stays, and only the noise is measured.

        Args:
            v: A vector of length one, with a product that is typical of the largest.
            near: The step to begin with; it grows by a factor of a thousand at most.

        Raises:
            ValueError: If differences with no two steps agree.
        """
        gaps: dict[int, float] = {}  # by k: how far D(near / 4^k) is from D(near / 4^(k + 1)), relative to the latter
        first = larger = self._difference(v, near)
        for k in range(_SMALLER):
            smaller = self._difference(v, near / _FACTOR ** (k + 1))
            distance, gaps[k] = self._gap(larger, smaller)
            larger = smaller
            if k and gaps[k] > gaps[k - 1]:  # nor is a gap that is not a number
                break
        # A smaller step makes more noise, so that little else is left in the last distance.
        self.noise = distance * near / _FACTOR ** (k + 1) / math.sqrt(1 + _FACTOR**-2)
        del larger, smaller
        best = min(gaps, key=lambda k: gaps[k] if math.isfinite(gaps[k]) else math.inf)
        for k in range(-1, -_LARGER - 1, -1) if best == 0 or not gaps[best] <= _USELESS else ():
            larger = self._difference(v, near / _FACTOR**k)
            _, gaps[k] = self._gap(larger, first)
            first = larger
            if gaps[k + 1] <= _USELESS and not gaps[k] <= gaps[k + 1]:
                break
        best = min(gaps, key=lambda k: gaps[k] if math.isfinite(gaps[k]) else math.inf)
        if not gaps[best] <= _USELESS:
            raise ValueError(
                f"differences of gradients say nothing here: with steps of {near / _FACTOR**best:.1g} and a quarter of "
                f"it, the best that were tried, they differ by {gaps[best]:.0%}. The loss has kinks (ReLU, "
                "max-pooling) or draws random numbers, or its gradient is too coarse, as in half precision it can be; "
                "use smooth activations, or float32."
            )
        self.step = self._given or near / _FACTOR**best

    def product(self, v: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Return H v, from four gradients, and keep the error."""
        length = self._space.norm(v)
        if not length:
            self.error = None
            return v.clone()
        h = self.step / length
        coarse, fine = self._difference(v, h), self._difference(v, h / 2)
        gap = coarse.sub_(fine)
        size = self._space.norm(gap)
        noise = (self.noise / h) ** 2
        truncation = max(size**2 - 5 * noise, 0.0)
        extrapolated, averaged = math.sqrt(7.2 * noise + truncation / 9), math.sqrt(0.8 * noise + 1.28 * truncation)
        fine.add_(gap, alpha=-1 / 3 if extrapolated <= averaged else 0.8)
        self.error = gap.mul_(min(extrapolated, averaged) / size if size else 0.0)
        return fine

    def _gap(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Return the distance of two vectors, and its ratio to the length of the second; NaN if one is not finite."""
        distance = self._space.norm(x - y)
        return distance, distance / (self._space.norm(y) or math.inf) if distance else 0.0
