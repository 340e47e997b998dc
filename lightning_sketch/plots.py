"""Figures of spectra, layers and images, from plain lists; matplotlib is imported only when one is drawn."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_sketch._eigenvalue_axes import binned, edges_of_bins, ends_known, linear_below, symmetric_log

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "contact_sheet",
    "datamodeling_scores",
    "layers",
    "loss_slice",
    "new_figure",
    "spectrum",
    "spectrum_over_time",
]

_TOP, _BOTTOM, _REST, _LINE = "#0072B2", "#D55E00", "#999999", "#009E73"  # Okabe & Ito: safe for color-blind people

_UNIT = "loss / parameter²"


def spectrum_over_time(
    time: Sequence[int | float],
    values: Sequence[Sequence[float]],
    *,
    errors: Sequence[Sequence[float]],
    converged: Sequence[Sequence[bool]],
    top_k: int,
    bottom_k: int,
    title: str = "",
    xlabel: str = "optimizer step",
    epochs: Sequence[int] = (),
    stable_below: Sequence[float] = (),
    density: Sequence[tuple[Sequence[float], Sequence[float]]] | None = None,
    unit: str = _UNIT,
) -> "Figure":
    """Draw the largest and the smallest eigenvalues over time: a line for each rank, with error bars.

    Markers are white where an eigenvalue has not converged.

    Args:
        time: When each measurement was taken.
        values: Eigenvalues of each measurement, in falling order, loss / parameter².
        errors: The error of each eigenvalue, in the same unit.
        converged: Whether each eigenvalue has converged.
        top_k: The number of the largest eigenvalues to draw.
        bottom_k: The number of the smallest eigenvalues to draw.
        title: The title of the figure.
        xlabel: The label of the time axis.
        epochs: The epoch of each measurement, for a second axis above; none if empty.
        stable_below: The edge of stability at each measurement, drawn as a dashed line; NaN where there is none.
        density: Nodes and weights of each measurement, drawn as a heat map below; no heat map if None.
        unit: The unit of eigenvalues.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    heights = [2.0] + [1.0] * (bottom_k > 0) + [1.6] * (density is not None)
    figure = new_figure(8, 2 + sum(heights) * 1.3)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    upper, both = panels[0], [(panels[0], _TOP, range(top_k))]
    if bottom_k:
        both.append((panels[1], _BOTTOM, range(-1, -bottom_k - 1, -1)))
        panels[1].set_ylabel(f"{bottom_k} smallest")
    for axes, color, ranks in both:
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
    panels[-1].set_xlabel(xlabel)
    _epoch_axis(upper, time, epochs)
    upper.set_title(f"{title}, in {unit}" if title else f"in {unit}")
    _stability(upper, time, stable_below)
    _legend(figure, upper)
    if density is not None:
        _heat_map(figure, panels[-1], time, density)
    return figure


def spectrum(
    values: Sequence[float],
    errors: Sequence[float],
    *,
    converged: Sequence[bool],
    size: int = 0,
    nodes: Sequence[float] = (),
    weights: Sequence[float] = (),
    title: str = "",
    unit: str = _UNIT,
) -> "Figure":
    """Draw eigenvalues by rank with error bars, on a symmetric-log scale, and beside them the density of all.

    The ranks of the largest and of the smallest ones are drawn apart, since what lies between them is not known one by
    one. Markers are white where an eigenvalue has not converged; three of these are drawn at each end.

    Args:
        values: Eigenvalues, in falling order, loss / parameter².
        errors: The error of each eigenvalue, in the same unit.
        converged: Whether each eigenvalue has converged.
        size: The number of all eigenvalues; if 0, they are taken to be those given.
        nodes: Points that represent all eigenvalues; without them no density is drawn.
        weights: The fraction of all eigenvalues at each node.
        title: The title of the figure.
        unit: The unit of eigenvalues.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    size = size or len(values)
    above, below = ends_known(values, converged, size)
    widths = [max(above, 4)] + [max(below, above / 4, 2)] * bool(below)
    figure = new_figure(8, 4)
    panels = figure.subplots(
        1, len(widths) + bool(nodes), sharey=True, width_ratios=widths + [sum(widths) / 2] * bool(nodes), squeeze=False
    )[0]
    threshold = linear_below(values, [(nodes, weights)] if nodes else ())
    symmetric_log(panels[0], threshold, [min(values), max(values)])
    panels[0].set_ylabel(f"eigenvalue ({unit})")
    figure.suptitle(title, fontsize="medium")
    ends = [(range(above), 1), (range(len(values) - below, len(values)), size - len(values) + 1)]
    for axes, (places, first), label in zip(
        panels, ends, ("rank, largest first", f"smallest of {size:,}"), strict=False
    ):
        if axes is panels[-1] and nodes:
            break
        for known, face in ((True, _TOP), (False, "white")):
            chosen = [i for i in places if bool(converged[i]) == known]
            if chosen:
                heights, bars = [values[i] for i in chosen], [errors[i] for i in chosen]
                ranks = [i + first for i in chosen]
                axes.errorbar(ranks, heights, bars, fmt="o", ms=4, color=_TOP, mfc=face, elinewidth=1, ls="none")
        ranks = [i + first for i in places]
        axes.set_xlim(ranks[0] - 0.7, ranks[-1] + 0.7)
        ticks = _few(ranks, 8) if first == 1 else sorted({ranks[0], ranks[-1]})
        axes.set_xticks(ticks, [f"{rank:,}" for rank in ticks])
        axes.axhline(0, color=_REST, lw=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.2)
    _legend(figure, panels[0])
    if nodes:
        beside = panels[-1]
        edges = edges_of_bins([*values, *nodes], threshold)
        shares = binned([(nodes, weights)], edges)[0]
        beside.stairs([max(share, 1e-7) for share in shares], edges, orientation="horizontal", color=_TOP, fill=True)
        beside.set_xscale("log")
        beside.set_xlim(left=1e-6)
        beside.set_xlabel("share of all eigenvalues")
        beside.set_title("density", fontsize="medium")
        beside.grid(alpha=0.2)
    return figure


def layers(
    names: Sequence[str],
    top: Sequence[float],
    *,
    top_errors: Sequence[float],
    converged: Sequence[bool],
    traces: Sequence[float],
    trace_errors: Sequence[float],
    title: str = "",
    unit: str = _UNIT,
) -> "Figure":
    """Draw bars for the top eigenvalue and the trace of the diagonal block of each layer.

    Bars are white where an eigenvalue has not converged.

    Args:
        names: Names of the layers.
        top: The top eigenvalue of each block, loss / parameter².
        top_errors: The error of each eigenvalue, in the same unit.
        converged: Whether each eigenvalue has converged.
        traces: The trace of each block, in the same unit.
        trace_errors: The standard error of each trace.
        title: The title of the figure.
        unit: The unit of eigenvalues.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(8, 1.2 + 0.32 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(names))
    faces = [_TOP if known else "white" for known in converged]
    left.barh(rows, top, xerr=top_errors, color=faces, edgecolor=_TOP, capsize=2)
    right.barh(rows, traces, xerr=trace_errors, color=_BOTTOM, edgecolor=_BOTTOM, capsize=2)
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set_xlabel("top eigenvalue")
    right.set_xlabel("trace ± standard error")
    figure.suptitle(f"{title}, in {unit}" if title else f"in {unit}", fontsize="medium")
    for axes in (left, right):
        axes.axvline(0, color=_REST, lw=0.8)
        axes.grid(alpha=0.2, axis="x")
    return figure


def datamodeling_scores(
    axes: "Axes",
    lds: Sequence[float],
    *,
    low: Sequence[float],
    high: Sequence[float],
    ceiling: Sequence[float],
    per_query: Sequence[Sequence[float]] = (),
) -> None:
    """Draw linear datamodeling scores in order, with their intervals, ceilings and the values of single queries.

    Args:
        axes: The axes to draw in.
        lds: The scores.
        low: The lower end of each interval.
        high: The upper end of each interval.
        ceiling: How well one model predicts another, for each score; NaN where it is not known.
        per_query: The values of the queries of each score, NaN for excluded queries.
    """
    for place, values in enumerate(per_query):
        label = "single queries" if values and not place else ""
        axes.plot([place] * len(values), values, "_", color="black", ms=10, alpha=0.4, label=label)
    places = range(len(lds))
    if any(map(math.isfinite, ceiling)):
        axes.hlines(ceiling, [p - 0.3 for p in places], [p + 0.3 for p in places], _LINE, "--", label="ceiling")
    reach = [[value - end for value, end in zip(lds, low, strict=True)]]
    reach += [[end - value for value, end in zip(lds, high, strict=True)]]
    axes.errorbar(places, lds, reach, fmt="o-", color=_TOP, capsize=3, label="LDS, 95 % interval")
    axes.set_xticks(places)
    axes.set_xlim(-0.5, len(lds) - 0.5)
    axes.axhline(0, color=_REST, lw=0.8)
    axes.set_ylabel("LDS")
    axes.set_xlabel("result" if len(lds) > 1 else "")
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    axes.grid(alpha=0.2, axis="y")


def new_figure(width: int | float, height: int | float) -> "Figure":
    """Make an empty figure that notebooks show even if they have not imported matplotlib themselves.

    Args:
        width: The width in inches.
        height: The height in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'lightning-sketch[plots]'.") from error

    figure = Figure(figsize=(width, height), layout="constrained")

    def png() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    figure._repr_png_ = png  # type: ignore[attr-defined]  # the name that IPython looks up
    return figure


def _legend(figure: "Figure", axes: "Axes") -> None:
    """Add a legend below that explains the markers, and the edge of stability if there is one."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", ls="none", color=_TOP, label="converged, with error bar"),
        Line2D([], [], marker="o", ls="none", color=_TOP, mfc="white", label="not converged: do not rely on it"),
    ]
    handles += [line for line in axes.get_lines() if str(line.get_label()).startswith("edge")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")


def _stability(axes: "Axes", time: Sequence[int | float], edge: Sequence[float]) -> None:
    """Draw the edge of stability as a dashed line; one far above all eigenvalues does not change the axis."""
    known = [(t, e) for t, e in zip(time, edge, strict=False) if math.isfinite(e)]
    if known:
        low, high = axes.get_ylim()
        (line,) = axes.plot(*zip(*known, strict=True), "--", color=_LINE, label="edge of stability")
        lowest = min(e for _, e in known)
        if lowest > 3 * high:
            axes.set_ylim(low, high)
            line.set_label(f"edge of stability: above, from {lowest:.3g}")


def _epoch_axis(axes: "Axes", time: Sequence[int | float], epochs: Sequence[int]) -> None:
    """Add an axis above that says in which epoch a measurement was taken: the last one of each epoch."""
    last = dict(zip(epochs, time, strict=False))
    shown = _few(list(last), 12)
    if shown:
        above = axes.secondary_xaxis("top")
        above.set_xticks([last[epoch] for epoch in shown], [str(epoch) for epoch in shown])
        above.set_xlabel("in epoch")


def _few(items: Sequence[int], most: int) -> list[int]:
    """Return the first item and every k-th after it, at most so many."""
    return list(items[:: -(-len(items) // most) or 1])


def _heat_map(
    figure: "Figure",
    axes: "Axes",
    time: Sequence[int | float],
    density: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Draw the density of all eigenvalues at each measurement as a heat map."""
    from matplotlib.colors import LogNorm

    everything = [node for nodes, _ in density for node in nodes]
    threshold = linear_below(everything, density)
    edges = edges_of_bins(everything, threshold)
    shares = binned(density, edges)
    steps = [time[0], *((a + b) / 2 for a, b in itertools.pairwise(time)), time[-1]]
    if len(time) == 1:
        steps = [time[0] - 0.5, time[0] + 0.5]
    columns = [[max(shares[t][i], 1e-5) for t in range(len(time))] for i in range(len(edges) - 1)]
    image = axes.pcolormesh(steps, edges, columns, cmap="cividis", norm=LogNorm(vmin=1e-5, vmax=1, clip=True))
    symmetric_log(axes, threshold, edges)
    axes.axhline(0, color=_REST, lw=0.8)
    axes.set_title("Density of all eigenvalues", fontsize="medium")
    axes.set_ylabel("eigenvalue")
    figure.colorbar(image, ax=axes, label="share of eigenvalues", extend="min")


def contact_sheet(
    queries: "np.ndarray",
    titles: Sequence[str],
    groups: "Mapping[str, tuple[np.ndarray, Sequence[Sequence[str]], Sequence[Sequence[bool]]]]",
    *,
    note: str = "",
) -> "Figure":
    """Draw each query image beside groups of images, such as the examples that helped and hurt it most.

    Args:
        queries: Images, (queries, height, width) or with colors as a last axis.
        titles: A few words for each query, in one or two lines.
        groups: By heading, k images for each query, (queries, k, height, width); a few words for each of them, as lists
            for each query; and whether each is framed in red, in the same form.
        note: A line of text below the images, such as what a frame means.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    asked = (queries[:, None], [[title] for title in titles], [[False]] * len(queries))
    shown = {"asked": asked, **groups}
    counts = [images.shape[1] for images, _, _ in shown.values()]
    widths = [width for count in counts for width in (*[1.0] * count, 0.4)][:-1]
    height = 1.05 * len(queries) + 0.7
    figure = new_figure(0.8 * sum(widths), height)
    engine = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - 0.3 / height), hspace=0.08)  # type: ignore[union-attr, call-arg]  # constrained layout
    grid = figure.subplots(len(queries), len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set_axis_off()
    start = 0
    for (heading, (images, lines, marked)), count in zip(shown.items(), counts, strict=True):
        cells = grid[:, start : start + count]
        start += count + 1
        top = cells[0, 0].annotate(heading, (0, 1.6), xycoords="axes fraction", fontsize=10, fontweight="bold")
        top.set_in_layout(False)  # a heading may be wider than its column
        for row in zip(cells, images, lines, marked, strict=True):
            for axes, image, line, mark in zip(*row, strict=True):
                axes.set_axis_on()
                axes.imshow(image, cmap="gray_r")
                axes.set(xticks=[], yticks=[])
                axes.set_title(line, fontsize=8, pad=3, color=_BOTTOM if mark else "black")
                for spine in axes.spines.values():
                    spine.set(color=_BOTTOM if mark else _REST, linewidth=2.5 if mark else 0.4)
    figure.supxlabel(note, fontsize=9)
    return figure


def loss_slice(
    coordinates: Sequence[float],
    losses: Sequence[float] | Sequence[Sequence[float]],
    *,
    names: Sequence[str],
    loss: float,
) -> "Figure":
    """Draw losses along a line, or as contours over a plane, spaced evenly in the root of the rise.

    Args:
        coordinates: The grid of each axis.
        losses: The loss at each point of the line, or of the plane as one row for each point of the first axis; what
            is not finite is left white.
        names: The name of each axis.
        loss: The loss in the middle, at the parameters themselves.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(5.5, 4.2)
    axes = figure.subplots()
    here = f"the parameters themselves, loss {loss:.4g}"
    if len(names) == 1:
        axes.plot(coordinates, losses, "o-", ms=3, lw=1.2, color=_TOP)
        axes.plot([0], [loss], "o", ms=7, color=_BOTTOM, label=here)
        axes.set_ylabel("loss")
        axes.grid(alpha=0.2)
    else:
        columns = [[v if math.isfinite(v) else math.nan for v in column] for column in zip(*losses, strict=True)]
        known = [v for column in columns for v in column if math.isfinite(v)]
        low, high = min(known, default=0.0), max(known, default=0.0)
        levels = [low + (high - low) * (i / 20) ** 2 for i in range(21)] if high > low else [low, low + 1]
        filled = axes.contourf(coordinates, coordinates, columns, levels, cmap="cividis")
        axes.contour(coordinates, coordinates, columns, levels[1:-1], colors="white", linewidths=0.4)
        axes.plot([0], [0], "o", ms=6, color=_BOTTOM, mec="white", label=here)
        figure.colorbar(filled, ax=axes, label="loss", format="%.3g")
        axes.set_ylabel(names[1])
        axes.set_aspect("equal")
        axes.locator_params(nbins=5)
    axes.set_xlabel(names[0])
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
