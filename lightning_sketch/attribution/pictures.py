"""Figures of scores and of how good they are, from plain numbers. Matplotlib is imported where it is used."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_sketch import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HELPED, _HURT, _CHANCE = "#0072B2", "#D55E00", "#999999"  # Okabe & Ito: safe for colour-blind people


def score_distribution(scores: Sequence[float], marked: Sequence[bool] = (), label: str = "marked") -> "Figure":
    """How scores are spread, on a symmetric-log scale; a marked part, such as known wrong labels, drawn over the rest.

    Args:
        scores: a number for each row, e.g. of one query, or self-influences.
        marked: for each row whether it belongs to the part; none if empty.
        label: of that part.

    Raises:
        ValueError: if there are no scores, or as many marks as scores are not given.
    """
    if not scores or (marked and len(marked) != len(scores)):
        raise ValueError(f"a distribution takes scores, and a mark for each or none, got {len(scores)}, {len(marked)}.")
    largest = max(abs(min(scores)), abs(max(scores)))
    threshold = largest / 1000 or 1.0
    positive = [threshold * 10 ** (i / 10) for i in range(31)]
    edges = [-edge for edge in reversed(positive) if min(scores) < 0] + [0.0, *positive]
    edges[-1] = max(edges[-1], largest)
    edges[0] = min(edges[0], -largest) if edges[0] < 0 else edges[0]
    figure = plots.new_figure(7, 3)
    axes = figure.subplots()
    axes.hist(scores, edges, color=_HELPED, alpha=0.6, label="all")
    if marked:
        chosen = [score for score, mark in zip(scores, marked, strict=True) if mark]
        axes.hist(chosen, edges, color=_HURT, label=label)
        axes.legend(frameon=False)
    axes.set_xscale("symlog", linthresh=threshold)
    axes.set_yscale("log")
    axes.set_xlabel("score (positive: helps)")
    axes.set_ylabel("rows")
    axes.grid(alpha=0.2)
    return figure


def lds_intervals(found: Mapping[str, Mapping[str, float]], ceiling: float | None = None) -> "Figure":
    """Linear datamodeling scores of several methods, with their intervals.

    Args:
        found: by method what `LinearDatamodelingScore.compute` gives: "lds", "low", "high".
        ceiling: what one training foretells of another, drawn as a line.
    """
    figure = plots.new_figure(7, 0.8 + 0.32 * len(found))
    axes = figure.subplots()
    values = [float(one["lds"]) for one in found.values()]
    lower = [value - float(one["low"]) for value, one in zip(values, found.values(), strict=True)]
    upper = [float(one["high"]) - value for value, one in zip(values, found.values(), strict=True)]
    axes.errorbar(values, range(len(values)), xerr=[lower, upper], fmt="o", color=_HELPED, capsize=3)
    axes.set_yticks(range(len(values)), list(found))
    axes.invert_yaxis()
    axes.axvline(0, color=_CHANCE, lw=0.8)
    if ceiling is not None:
        axes.axvline(ceiling, color=_HURT, ls="--", label="one training against another")
        axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("linear datamodeling score, 95 % interval")
    axes.grid(alpha=0.2, axis="x")
    return figure
