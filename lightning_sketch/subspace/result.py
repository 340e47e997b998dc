"""What a search for the intrinsic dimension found."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytorch_lightning.utilities import rank_zero_info

from lightning_sketch import plots


@dataclass(frozen=True)
class IntrinsicDimensionResult:
    """Metric against dimension, with the manners of what `Tuner.lr_find` returns."""

    results: dict[str, list[Any]]
    """Plain lists, an entry for each run: kind ("fit", or "search" in which the dimension doubles), dim, seed, value,
    steps of the optimizer, and status ("done", "nan", "out of memory", or "not reached" of a search)."""
    monitor: str
    mode: str
    threshold: float
    n: int
    """Parameters that could move."""
    baseline: float
    """The metric after full training."""
    start: float
    """The metric at θ₀."""

    @property
    def target(self) -> float:
        """What counts as reached: threshold · baseline; for losses start - threshold (start - baseline)."""
        return target(self.mode, self.threshold, self.baseline, self.start)

    def suggestion(self) -> int | None:
        """The smallest dimension whose mean over seeds reaches the target; None if none does, and the reason is said.

        Of searches, which end at another dimension for each seed: the median over seeds of the smallest that reached.

        With threshold=0.9 this is the d90 of Li et al. (2018), arXiv:1804.08838.
        """
        means = self.means()
        if "search" in self.results["kind"]:
            chosen = statistics.median_high(self._smallest_of_each_seed())
        else:
            chosen = min((dim for dim, value in means.items() if self._reached(value)), default=math.inf)
        if chosen < math.inf:
            return int(chosen)
        known = {dim: value for dim, value in means.items() if not math.isnan(value)}
        best = max(known, key=lambda dim: known[dim] if self.mode == "max" else -known[dim]) if known else None
        rank_zero_info(
            f"no dimension reached {self.monitor} {self.target:.4g}: "
            + (f"the best is {known[best]:.4g} at dim {best}" if known else "no run gave a number")
            + f", full training ({self.n}) gives {self.baseline:.4g}. Try larger dims, longer training or another rate."
        )
        return None

    def means(self) -> dict[int, float]:
        """The metric by dimension, from the smallest on: its mean over the runs there; no number if one gave none."""
        values: dict[int, list[float]] = {}
        for dim, value in zip(self.results["dim"], self.results["value"], strict=True):
            values.setdefault(dim, []).append(value)
        return {dim: statistics.fmean(values[dim]) for dim in sorted(values)}

    def plot(self, suggest: bool = True, show: bool = False, ax: Any = None) -> Any:
        """Metric against dimension: every run, their mean, full training, and the target.

        Args:
            suggest: mark the suggestion.
            show: call matplotlib's show.
            ax: axes to draw into; else a new figure is made.

        Raises:
            ImportError: if matplotlib is missing.
        """
        suggestion = self.suggestion() if suggest else None
        runs = list(zip(self.results["dim"], self.results["value"], strict=True))
        return metric_over_dim(
            runs, self.means(), self.baseline, self.target, self.monitor, suggestion, show=show, axes=ax
        )

    def _smallest_of_each_seed(self) -> list[int | float]:
        """Infinite for a seed that did not reach the target."""
        runs = list(zip(*(self.results[key] for key in ("seed", "dim", "value")), strict=True))
        return [
            min((dim for seed, dim, value in runs if seed == one and self._reached(value)), default=math.inf)
            for one in sorted(set(self.results["seed"]))
        ]

    def _reached(self, value: float) -> bool:
        return reaches(value, self.target, self.mode)


def target(mode: str, threshold: float, baseline: float, start: float) -> float:
    """The metric that a subspace has to reach."""
    return threshold * baseline if mode == "max" else start - threshold * (start - baseline)


def reaches(value: float, target: float, mode: str) -> bool:
    """Whether it is as good; no number is not."""
    return value >= target if mode == "max" else value <= target


_REACHED, _CHOSEN, _FULL, _TARGET = (
    "#0072B2",
    "#D55E00",
    "#999999",
    "#009E73",
)  # Okabe & Ito: safe for colour-blind people


def metric_over_dim(
    runs: Sequence[tuple[int, float]],
    means: Mapping[int, float],
    baseline: float,
    target: float,
    label: str,
    suggestion: int | None = None,
    show: bool = False,
    axes=None,
):
    """A metric against the dimension of a subspace: a dot a run, a line through means, levels of reference.

    Args:
        runs: dimension and value of each run; what is no number is left out.
        means: by dimension.
        baseline: of full training.
        target: what counts as reached.
        label: name of the metric.
        suggestion: a dimension to mark.
        show: call matplotlib's show.
        axes: to draw into; else a new figure is made.

    Returns:
        A matplotlib Figure.
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
    return axes.figure
