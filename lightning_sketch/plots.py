"""Figures from plain lists. Matplotlib is imported where it is used."""

from collections.abc import Sequence

_TOP, _BOTTOM, _REST = "#0072B2", "#D55E00", "#999999"  # Okabe & Ito: told apart by colour-blind people too


def spectrum_over_time(
    time: Sequence[int | float],
    values: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    converged: Sequence[Sequence[bool]],
    top_k: int,
    bottom_k: int,
    title: str = "",
    xlabel: str = "optimizer step",
):
    """Both ends of a spectrum at each measurement: a line a rank, error bars, hollow where not converged.

    Args:
        time: when each measurement was taken.
        values: its eigenvalues, in falling order.
        errors: how far each may be off.
        converged: whether it may be believed.
        top_k: how many of the largest to draw.
        bottom_k: how many of the smallest.
        title: above the figure.
        xlabel: unit of `time`.

    Returns:
        A matplotlib Figure.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'lightning-sketch[plots]'.") from error

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for axes, color, ranks in ((upper, _TOP, range(top_k)), (lower, _BOTTOM, range(-1, -bottom_k - 1, -1))):
        for rank in ranks:
            points = [
                (t, v[rank], e[rank], c[rank])
                for t, v, e, c in zip(time, values, errors, converged, strict=True)
                if -len(v) <= rank < len(v)
            ]
            alpha = 1 if rank in (0, -1) else 0.45
            axes.plot([p[0] for p in points], [p[1] for p in points], color=color, alpha=0.5 * alpha, lw=1)
            for known, face in ((True, color), (False, "white")):
                chosen = [p for p in points if p[3] == known]
                if chosen:
                    t, v, e, _ = zip(*chosen, strict=True)
                    axes.errorbar(
                        t, v, e, fmt="o", ms=4, color=color, mfc=face, alpha=alpha, elinewidth=1, capsize=2, ls="none"
                    )
        axes.axhline(0, color=_REST, lw=0.8)
        axes.grid(alpha=0.2)
    upper.set_ylabel(f"{top_k} largest")
    lower.set_ylabel(f"{bottom_k} smallest")
    figure.supylabel("eigenvalue (loss / parameter²)", fontsize="medium")
    lower.set_xlabel(xlabel)
    upper.set_title(title)
    upper.legend(
        handles=[
            Line2D([], [], marker="o", ls="none", color=_TOP, label="converged, with error bar"),
            Line2D([], [], marker="o", ls="none", color=_TOP, mfc="white", label="not converged: do not rely on it"),
        ],
        loc="best",
        frameon=False,
        fontsize="small",
    )
    return figure


def spectrum(values: Sequence[float], errors: Sequence[float], converged: Sequence[bool]):
    """Eigenvalues by rank, on a symmetric-log scale, with error bars, hollow where not converged.

    Returns:
        A matplotlib Figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'lightning-sketch[plots]'.") from error

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for known, face, label in ((True, _TOP, "converged"), (False, "white", "not converged: do not rely on it")):
        chosen = [
            (i + 1, v, e) for i, (v, e, c) in enumerate(zip(values, errors, converged, strict=True)) if c == known
        ]
        if chosen:
            ranks, heights, bars = zip(*chosen, strict=True)
            axes.errorbar(
                ranks, heights, bars, fmt="o", ms=4, color=_TOP, mfc=face, elinewidth=1, ls="none", label=label
            )
    axes.set_yscale("symlog", linthresh=max(max(map(abs, values)) * 1e-3, 1e-30))
    axes.axhline(0, color=_REST, lw=0.8)
    axes.set_xlabel("rank, largest first")
    axes.set_ylabel("eigenvalue (loss / parameter²)")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.2)
    return figure
