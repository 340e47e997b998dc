"""The rate at which each dimension of a search is asked: hill climbing on one seed from the rate of its neighbor.

    θ = θ₀ + rate · Dᵀ w          rates ..., 0.1, 0.3, 1, 3, 10, ...

The best rate changes slowly with the dimension: for Adam it is between 0.3 and 3 from dim 8 to dim n on four tasks, for
SGD at the largest stable learning rate of full training it rises from 0.1 to 1 (`benchmarks/intrinsic_dimension.py`).
"""

import math
import statistics
from collections.abc import Callable, Sequence

from lightning_sketch.subspace._ledger import Run

BUDGET = 2.5  # runs of a search at most, in runs of a search at one rate
_MARGIN = 0.02  # the smallest improvement for which a rate is changed, in parts of the way from the start to the target
_FAILED = -1e9  # the progress of a run that ends with NaN, far below that of others
_NEAR = 0.5  # the part of the way from which on a dimension is asked at both sides of a rate, not at one


class Rates:
    """Ask dimensions whether they reach a target, each at the best rate, with all seeds.

    A dimension that reaches the target at the rate of its neighbor is not asked at other rates. Rates are compared by
    the first seed. All runs together are at most `BUDGET` times one for each dimension and seed, and one for full
    training.

    Args:
        fit: Trains in several subspaces, given dim, seed and rate of each.
        progress: The way from the start to the target that a value of the metric has made; 1 or more reaches it.
        seeds: The number of runs at each dimension.
        rates: The rates to choose from, ascending; None for all of the ladder above.

    Attributes:
        runs: The runs done, by dim, seed and rate.
        answers: Whether each dimension that was asked reaches the target.
        first: The rate of the first dimension.
    """

    def __init__(
        self,
        fit: Callable[[Sequence[tuple[int, int, float]]], list[Run]],
        progress: Callable[[float], float],
        seeds: int,
        rates: Sequence[float] | None = None,
    ):
        self.fit, self.progress, self.seeds, self.rates = fit, progress, seeds, rates
        self.runs: dict[tuple[int, int, float], Run] = {}
        self.answers: dict[int, bool] = {}
        self._chosen: dict[int, float] = {}
        self._side = -1  # the direction that is tried first: -1 for smaller rates
        self.first = min(rates, key=lambda rate: abs(math.log(rate))) if rates else 1.0

    def reaches(self, dim: int) -> bool:
        """Return whether the mean over seeds reaches the target at the best rate."""
        if dim not in self.answers:
            self._chosen[dim] = rate = self._nearest(dim)
            if self._at(dim, rate, 1) < 1 or self._at(dim, rate, self.seeds) < 1:
                self._chosen[dim] = rate = self._climb(dim, rate)
            self.answers[dim] = self._at(dim, rate, self.seeds) >= 1
        return self.answers[dim]

    def _nearest(self, dim: int) -> float:
        """Return the rate of the nearest dimension, by their ratio."""
        near = min(self._chosen, key=lambda other: abs(math.log(other / dim)), default=None)
        return self.first if near is None else self._chosen[near]

    def _at(self, dim: int, rate: float, seeds: int) -> float:
        """Return the progress of the mean over the first seeds; if a run failed, the less the larger the rate."""
        asked = [(dim, seed, rate) for seed in range(seeds)]
        missing = [one for one in asked if one not in self.runs]
        self.runs.update(zip(missing, self.fit(missing), strict=True))
        mean = statistics.fmean(self.runs[one]["value"] for one in asked)
        return _FAILED * (1 + rate) if math.isnan(mean) else self.progress(mean)

    def _climb(self, dim: int, rate: float) -> float:
        """Return the rate at which the first seed comes farthest, going to one side, or to the other if that fails."""
        best, first = rate, self._side if self._at(dim, rate, 1) > _FAILED else -1
        for side in (first, -first):
            asked = len(self.runs)
            while (other := self._beside(best, side)) is not None and self._is_affordable():
                if self._at(dim, other, 1) <= self._at(dim, best, 1) + _MARGIN:
                    self._side = -side  # where the next dimension, which may have time for one side only, begins
                    break
                best, self._side = other, side
            if self._chosen[dim] != best or (len(self.runs) > asked and self._at(dim, best, 1) < _NEAR):
                break
        return best

    def _beside(self, rate: float, side: int) -> float | None:
        """Return the next smaller or larger rate, if there is one."""
        if self.rates is not None:
            place = self.rates.index(rate) + side
            return self.rates[place] if 0 <= place < len(self.rates) else None
        rung = round(2 * math.log10(rate)) + side
        return float(f"{'3' if rung % 2 else '1'}e{rung // 2}")

    def _is_affordable(self) -> bool:
        """Return whether one more run, and those of the other seeds after it, are within the budget."""
        at_one_rate = 1 + self.seeds * len(self._chosen)
        return 1 + len(self.runs) + self.seeds <= BUDGET * at_one_rate
