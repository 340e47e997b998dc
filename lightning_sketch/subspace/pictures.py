"""The figure of a search, from plain numbers. Matplotlib is imported where it is used."""

from collections.abc import Mapping, Sequence

from lightning_sketch import plots

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
