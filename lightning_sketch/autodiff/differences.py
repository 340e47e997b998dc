"""Products with a Hessian by differences of gradients, with a step that is chosen and an error that is known.

    D(h) = (∇L(θ + h v) - ∇L(θ - h v)) / 2h = H v + O(h²) + noise of length s / h,          ||v|| = 1

A product comes from D(h) and D(h/2). Their distance is √(5 s²/h² + t²), with t three quarters of the truncation error
of D(h) where the loss is smooth. The noise s is measured where the step is chosen, so that t is known:

    D(h/2) + (D(h/2) - D(h)) / 3      has an error below √(7.2 s²/h² + (t/3)²), where truncation dominates
    (4 D(h) + D(h/2)) / 5             has an error of √(0.8 s²/h² + (1.13 t)²), where noise does

The factors are those of independent noise in both differences; t/3 is the truncation error of D(h/2), which the first
formula removes up to the order h⁴. Where the distance is far above noise, D(h/4) tells truncation, which falls with the
step, from jumps of the gradient (ReLU) and from noise that is larger along this vector, which grow: D(h) is then the
best, and off by the distance. What changes on a scale below the step, and below the noise at smaller ones, is not seen.

Source: Moré & Wild (2012), "Estimating derivatives of noisy simulations", ACM Transactions on Mathematical Software
38(3), doi:10.1145/2168773.2168777, for steps that balance noise and truncation.
"""

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.space import VectorSpace

_FACTOR = 4.0  # ratio of the steps that are tried one after the other
_SMALLER, _LARGER = 14, 6  # how many steps are tried on each side of the first, at most
_LOST = 6  # how many smaller ones where none has agreed with the next
_USELESS = 0.5  # relative distance of two differences from which on they say nothing
_SMOOTH = 1e-3  # relative distance of the two differences of a product up to which it is taken for truncation
_SAFE = 2.0  # the error that is stated over the one that is expected

_OF_NEIGHBORS = math.sqrt(1 + _FACTOR**-2)  # the noise of D(h) - D(4 h) over that of D(h)

Difference = Callable[[Tensor, float], Tensor]  # (v, h) -> D(h), where h counts in lengths of v


class CentralDifferences:
    """Products with the derivative of a gradient along vectors.

    Args:
        space: The vectors.
        step: The step h along a vector of length one; chosen by `choose` if None.

    Attributes:
        step: The step that is used.
        noise: The length s of the noise in a difference of gradients over two.
        error: A vector twice as long as the error of the last product is expected to be; None if it is zero.
    """

    def __init__(self, space: VectorSpace, step: float | None = None):
        self._space, self._given = space, step
        self.step, self.noise = step or 1.0, 0.0
        self.error: Tensor | None = None

    def choose(self, difference: Difference, v: Float[Tensor, " size"], near: float) -> None:
        """Choose the step at which differences along a vector depend least on it, and measure their noise.

        Steps become smaller until two neighbors have agreed and then, because of noise, differ more again; and larger
        if the first was the best, or none agreed. A step that was given stays, and only the noise is measured.

        Args:
            difference: (v, h) -> D(h) as a new vector.
            v: A vector of length one, with a product that is typical of the largest.
            near: The step to begin with; it grows by a factor of 4,096 at most.

        Raises:
            ValueError: If differences with no two steps agree.
        """
        gaps: dict[int, float] = {}  # by k: how far D(near / 4^k) is from D(near / 4^(k + 1)), relative to the latter
        distances: dict[int, float] = {}  # the same, as a length
        first = larger = difference(v, near)
        for k in range(_SMALLER):
            smaller = difference(v, near / _FACTOR ** (k + 1))
            distances[k], gaps[k] = self._gap(larger, smaller)
            larger = smaller
            if (k and gaps[k - 1] <= _USELESS and not gaps[k] <= gaps[k - 1]) or (k == _LOST and not _agree(gaps)):
                break
        del larger, smaller
        for k in range(-1, -_LARGER - 1, -1) if min(gaps, key=gaps.__getitem__) == 0 or not _agree(gaps) else ():
            larger = difference(v, near / _FACTOR**k)
            distances[k], gaps[k] = self._gap(larger, first)
            first = larger
            if gaps[k + 1] <= _USELESS and not gaps[k] <= gaps[k + 1]:
                break
        best = min(gaps, key=gaps.__getitem__)
        if not _agree(gaps) and self._space.norm(first):  # else all are zero, as of a linear loss
            raise ValueError(
                f"differences of gradients do not agree for any step: for {near / _FACTOR**best:.1g} and a quarter of "
                f"it, the best of {len(gaps)}, they differ by {gaps[best]:.0%}. The loss has kinks (ReLU, max-pooling) "
                "or draws random numbers, or its gradient is too coarse, as in half precision it can be; use smooth "
                "activations, or float32."
            )
        # Below the best step little but noise is left, until the step itself is rounded away.
        noisy = [k for k in distances if k > best and math.isfinite(distances[k])] or [max(distances)]
        self.noise = max(distances[k] * near / _FACTOR ** (k + 1) for k in noisy) / _OF_NEIGHBORS
        self.step = self._given or self._balanced(near / _FACTOR**best, distances[best])

    def product(self, difference: Difference, v: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Return H v, from four gradients, or six where their distance is far above noise, and keep the error.

        Args:
            difference: (v, h) -> D(h) as a new vector.
            v: The vector.
        """
        length = self._space.norm(v)
        if not length:
            self.error = None
            return v.clone()
        h = self.step / length
        coarse, fine = difference(v, h), difference(v, h / 2)
        gap = coarse.sub_(fine)
        size, noise = self._space.norm(gap), (self.noise / h) ** 2
        truncation = max(size**2 - 5 * noise, 0.0)
        extrapolated, averaged = math.sqrt(7.2 * noise + truncation / 9), math.sqrt(0.8 * noise + 1.28 * truncation)
        weight, error = (-1 / 3, extrapolated) if extrapolated <= averaged else (0.8, averaged)
        if size**2 > 40 * noise and size > _SMOOTH * self._space.norm(fine):
            finer = self._space.norm(difference(v, h / 4).sub_(fine))
            if not finer <= size / 2:  # it grows as the step falls
                weight, error = 1.0, max(size, finer / 2)
        fine.add_(gap, alpha=weight)
        self.error = gap.mul_(_SAFE * error / size) if size else None
        return fine

    def _balanced(self, h: float, distance: float) -> float:
        """Return the step at which the error of a product is least, if its truncation error is of the order h².

        Args:
            h: The best of the steps that were tried, within a factor of 4 of which it is.
            distance: That of D(h) from D(h/4).
        """
        squared = distance**2 - (_OF_NEIGHBORS * _FACTOR * self.noise / h) ** 2
        if not (self.noise and squared > 0):
            return h
        bend = math.sqrt(squared) / ((1 - _FACTOR**-2) * h**2)  # D(h) is off by bend h²
        best = (57.6 * (self.noise / bend) ** 2) ** (1 / 6)  # the minimum of 7.2 s²/h² + (bend h² / 4)²
        return min(max(best, h / _FACTOR), h * _FACTOR)

    def _gap(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Return the distance of two vectors, and its ratio to the length of the second.

        The ratio is infinite if that is zero, as where a step is rounded away, or if a number is not finite.
        """
        distance, length = self._space.norm(x - y), self._space.norm(y)
        ratio = distance / length if length else math.inf
        return distance, ratio if ratio == ratio else math.inf


def _agree(gaps: dict[int, float]) -> bool:
    return min(gaps.values()) <= _USELESS
