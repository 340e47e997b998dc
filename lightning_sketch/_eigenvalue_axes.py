"""Scales, bins and ranks of eigenvalues in figures."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ends_known(values: Sequence[float], converged: Sequence[bool], size: int) -> tuple[int, int]:
    """Return how many eigenvalues are drawn from the top and from the bottom: what has converged, and three more."""
    if len(values) >= size:
        return len(values), 0
    if all(converged):
        above = max(1, sum(value > 0 for value in values))
        return above, len(values) - above
    above, below = (sum(1 for _ in itertools.takewhile(bool, flags)) for flags in (converged, converged[::-1]))
    above, more = min(above + 3, len(values) - below), 3 if below else 0
    return above, min(below + more, len(values) - above)


def linear_below(values: Sequence[float], density: Sequence[tuple[Sequence[float], Sequence[float]]] = ()) -> float:
    """Return where a symmetric-log axis becomes linear: about a thousandth of the largest value, or more for a density.

    Then it is twice the median eigenvalue, so that most eigenvalues are in one band: a node that stands for many of
    them comes to lie on either side of zero by chance.
    """
    largest = max(map(abs, values))
    threshold = 10.0 ** math.floor(math.log10(largest) - 3) if largest else 1.0
    medians = [_median_size(nodes, weights) for nodes, weights in density]
    return max([threshold, *(min(2 * median, largest / 10) for median in medians)])


def _median_size(nodes: Sequence[float], weights: Sequence[float]) -> float:
    """Return the median of the absolute values of the nodes, by weight."""
    total = 0.0
    for size, weight in sorted((abs(node), weight) for node, weight in zip(nodes, weights, strict=True)):
        total += weight
        if total >= 0.5:
            return size
    return 0.0


def symmetric_log(axes: "Axes", threshold: float, shown: Sequence[float]) -> None:
    """Make the vertical axis a symmetric-log one, with ticks at zero and at powers of ten above the threshold."""
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.3)
    low, high = min(0.0, *shown), max(0.0, *shown)
    powers = [10.0**k for k in range(-40, 40) if threshold <= 10.0**k <= max(-low, high)]
    axes.set_yticks([y for y in (*(-p for p in reversed(powers)), 0.0, *powers) if low <= y <= high])
    axes.minorticks_off()


def edges_of_bins(values: Sequence[float], threshold: float) -> list[float]:
    """Return edges of bins from the smallest to the largest value, eight to a decade, with one bin around zero."""
    positive = [threshold * 10 ** (i / 8) for i in range(34)]
    below, above = (max(limit * 10 ** (1 / 8), threshold) for limit in (-min(values), max(values)))
    return [-e for e in reversed(positive) if e <= below] + [e for e in positive if e <= above]


def binned(density: Sequence[tuple[Sequence[float], Sequence[float]]], edges: Sequence[float]) -> list[list[float]]:
    """Return for each density the share of all eigenvalues in each bin, smoothed over about three bins."""
    import numpy as np

    positions, binned = np.arange(len(edges) - 1), []
    for nodes, weights in density:
        place = np.interp(nodes, edges, np.arange(len(edges))) - 0.5
        kernel = np.exp(-0.5 * ((positions[:, None] - place) / 1.2) ** 2)
        binned.append((kernel / kernel.sum(0) @ np.asarray(weights)).tolist())
    return binned
