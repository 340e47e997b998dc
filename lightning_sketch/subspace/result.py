"""The result of a search for the intrinsic dimension: its runs, the suggested dimension, and a figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from pytorch_lightning.utilities import rank_zero_info

from lightning_sketch import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mode = Literal["max", "min"]

_SHOWN = 8  # means in a repr


@dataclass(frozen=True)
class IntrinsicDimensionResult:
    """The metric of each run against its dimension, with the interface of the result of `Tuner.lr_find`.

    Attributes:
        results: Lists with an entry for each run, in the order in which they were done:

            kind    "fit" for a run at one dimension, "search" for one during which the dimension doubles
            dim     the dimension; of a search, the one at its last validation
            seed    the seed of the directions and of the order of the data
            value   the metric at the end, in its own units; NaN if the run failed
            steps   optimizer steps
            status  "done", "nan", "out of memory", or "not reached" of a search

        monitor: The name of the metric.
        mode: "max" if larger values of the metric are better, "min" if smaller ones are.
        threshold: The required part of what full training gains, in (0, 1].
        n: The number of parameters that the search is about: the dimension of the whole space.
        baseline: The metric after full training, in its own units.
        start: The metric at the initial weights θ₀, in its own units.

    >>> runs = {"kind": ["fit", "fit"], "dim": [8, 16], "seed": [0, 0], "value": [0.5, 0.85], "steps": [100, 100]}
    >>> result = IntrinsicDimensionResult(
    ...     {**runs, "status": ["done", "done"]},
    ...     "val_acc",
    ...     mode="max",
    ...     threshold=0.9,
    ...     n=1000,
    ...     baseline=0.9,
    ...     start=0.1,
    ... )
    >>> round(result.target, 2), result.suggestion()
    (0.81, 16)
    """

    results: dict[str, list[Any]]
    monitor: str
    _: KW_ONLY
    mode: Mode
    threshold: float
    n: int
    baseline: float
    start: float

    def __repr__(self) -> str:
        means, found = self.means(), self._smallest()
        shown = [f"{value:.4g} at {dim}" for dim, value in means.items()]
        some = shown if len(shown) <= _SHOWN else [*shown[: _SHOWN // 2], "...", *shown[-_SHOWN // 2 :]]
        return (
            f"IntrinsicDimensionResult: {found if found < math.inf else 'no dimension'} of {self.n:,} reaches "
            f"{self.monitor} {self.target:.4g}, by {len(self.results['dim'])} runs\n    {self.start:.4g} at the start, "
            f"{self.baseline:.4g} after full training; mode {self.mode}, threshold {self.threshold:g}\n    means over "
            f"runs: {', '.join(some)}"
        )

    @property
    def target(self) -> float:
        """The metric to reach: threshold · baseline; with mode="min", start - threshold (start - baseline)."""
        return target(self.mode, self.threshold, self.baseline, self.start)

    def suggestion(self) -> int | None:
        """Return the smallest dimension that reaches the target; None if none does, and the reason is logged.

        Of runs at fixed dimensions, it is the smallest one whose mean over seeds reaches the target. Of searches, which
        end at another dimension for each seed, it is the median over seeds of the smallest dimension that reaches it,
        and the larger of two middle values.

        With threshold=0.9 this is the d90 of Li et al. (2018), "Measuring the intrinsic dimension of objective
        landscapes", ICLR 2018, arXiv:1804.08838.
        """
        chosen = self._smallest()
        if chosen < math.inf:
            return int(chosen)
        known = {dim: value for dim, value in self.means().items() if not math.isnan(value)}
        sign = 1 if self.mode == "max" else -1
        best = max(known, key=lambda dim: sign * known[dim], default=0)
        rank_zero_info(
            f"no dimension reached {self.monitor} {self.target:.4g}: "
            + (f"the best is {known[best]:.4g} at dim {best}" if known else "no run gave a number")
            + f", full training ({self.n}) gives {self.baseline:.4g}. Try larger dims, longer training or another rate."
        )
        return None

    def means(self) -> dict[int, float]:
        """Return the mean of the metric over the runs of each dimension, in ascending order; NaN if a run failed."""
        values: dict[int, list[float]] = {}
        for dim, value in zip(self.results["dim"], self.results["value"], strict=True):
            values.setdefault(dim, []).append(value)
        return {dim: statistics.fmean(values[dim]) for dim in sorted(values)}

    def plot(self, *, suggest: bool = True, show: bool = False, ax: "Axes | None" = None) -> "Figure":
        """Plot the metric against the dimension: every run, the means, full training, and the target.

        Args:
            suggest: Whether to mark the suggestion.
            show: Whether to call matplotlib's show.
            ax: The axes to draw into; None for a new figure.

        Returns:
            The matplotlib Figure.

        Raises:
            ImportError: If matplotlib is missing.
        """
        suggestion = self.suggestion() if suggest else None
        runs = list(zip(self.results["dim"], self.results["value"], strict=True))
        return _metric_over_dim(
            runs, self.means(), self.baseline, self.target, self.monitor, suggestion, show=show, axes=ax
        )

    def _smallest(self) -> int | float:
        """Return the smallest dimension that reaches the target, see `suggestion`; infinity if none does."""
        if "search" in self.results["kind"]:
            return statistics.median_high(self._smallest_of_each_seed())
        return min((dim for dim, value in self.means().items() if self._reached(value)), default=math.inf)

    def _smallest_of_each_seed(self) -> list[int | float]:
        """Return the smallest dimension that reached the target for each seed; infinity if none did."""
        runs = list(zip(*(self.results[key] for key in ("seed", "dim", "value")), strict=True))
        return [
            min((dim for seed, dim, value in runs if seed == one and self._reached(value)), default=math.inf)
            for one in sorted(set(self.results["seed"]))
        ]

    def _reached(self, value: float) -> bool:
        return reaches(value, self.target, self.mode)


def target(mode: Mode, threshold: float, baseline: float, start: float) -> float:
    """Return the metric that a subspace has to reach."""
    return threshold * baseline if mode == "max" else start - threshold * (start - baseline)


def reaches(value: float, target: float, mode: Mode) -> bool:
    """Return whether a value is at least as good as the target; False for NaN."""
    return value >= target if mode == "max" else value <= target


# Okabe & Ito: safe for color-blind people
_REACHED, _CHOSEN, _FULL, _TARGET = "#0072B2", "#D55E00", "#999999", "#009E73"


def _metric_over_dim(
    runs: Sequence[tuple[int, float]],
    means: Mapping[int, float],
    baseline: float,
    target: float,
    label: str,
    suggestion: int | None = None,
    show: bool = False,
    axes: "Axes | None" = None,
) -> "Figure":
    """Plot a metric against the dimension: a dot for each run, a line through the means, and two levels.

    Args:
        runs: The dimension and the value of each run; NaN is left out.
        means: The mean value of each dimension.
        baseline: The value of full training, drawn as a level.
        target: The value to reach, drawn as a level.
        label: The name of the metric.
        suggestion: A dimension to mark.
        show: Whether to call matplotlib's show.
        axes: The axes to draw into; None for a new figure.
    """
    if axes is None:
        axes = plots.new_figure(6, 3.6).subplots()
    axes.plot(*zip(*runs, strict=True) if runs else ([], []), "o", ms=4, color=_REACHED, alpha=0.4)
    axes.plot(list(means), list(means.values()), color=_REACHED)
    axes.axhline(baseline, color=_FULL, lw=1, label="full training")
    axes.axhline(target, color=_TARGET, lw=1, ls="--", label="target")
    if suggestion is not None:
        axes.plot(suggestion, means[suggestion], "o", ms=9, color=_CHOSEN, label=f"suggestion: {suggestion}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("trained numbers (dim)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    if show:
        import matplotlib.pyplot as plt

        plt.show()
    return cast("Figure", axes.figure)
