"""Figures show what they were given, in its place."""

import sys

import numpy as np
import pytest
import torch

from lightning_sketch import plots
from lightning_sketch.curvature import Spectrum


def shown(figure):
    """The pictures of a figure by row: column, value, title, whether it is framed."""
    cells = [axes for axes in figure.axes if axes.images]
    rows = {}
    for axes in cells:
        spec = axes.get_subplotspec()
        framed = axes.spines["top"].get_linewidth() > 1
        rows.setdefault(spec.rowspan.start, []).append(
            (spec.colspan.start, float(axes.images[0].get_array().flat[0]), axes.get_title(), framed)
        )
    return [sorted(rows[row]) for row in sorted(rows)]


def images(*values):
    """A picture of each value, (queries, k, 4, 4)."""
    return np.array(values, dtype=float)[..., None, None] * np.ones((4, 4))


def test_a_contact_sheet_has_each_query_beside_its_examples():
    figure = plots.contact_sheet(
        images(1, 2),
        ["one", "two"],
        {
            "helped": (images([3, 4], [5, 6]), [["a", "b"], ["c", "d"]], [[False, True], [False, False]]),
            "hurt": (images([7], [8]), [["e"], ["f"]], [[True], [False]]),
        },
        note="a frame",
    )
    assert shown(figure) == [  # with a gap before each group
        [(0, 1, "one", False), (2, 3, "a", False), (3, 4, "b", True), (5, 7, "e", True)],
        [(0, 2, "two", False), (2, 5, "c", False), (3, 6, "d", False), (5, 8, "f", False)],
    ]
    headings = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert headings == ["asked", "helped", "hurt"]
    assert figure.get_supxlabel() == "a frame"
    figure.canvas.draw()  # nothing overlaps so that the layout collapses, which is a warning


def test_a_contact_sheet_takes_colors():
    colored = np.random.default_rng(0).random((2, 3, 4, 4, 3))
    lines, marked = [["x"] * 3] * 2, [[False] * 3] * 2
    figure = plots.contact_sheet(colored[:, 0], ["q"] * 2, {"helped": (colored, lines, marked)})
    found = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [picture.shape for picture in found] == [(4, 4, 3)] * 8


def ranks(axes):
    """The ranks at which an axes has markers, white ones apart."""
    found = {"known": [], "white": []}
    for bars in axes.containers:
        line = bars.lines[0]
        found["white" if line.get_markerfacecolor() == "white" else "known"] += line.get_xdata().tolist()
    return found


def test_eigenvalues_are_drawn_at_their_true_ranks():
    """Of 5,000 eigenvalues the four largest and the two smallest are known; three more are drawn beside each."""
    values = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 1.0, 0.5, 0.1, -0.1, -0.5, -1.0, -2.0]
    converged = [True] * 4 + [False] * 7 + [True] * 2
    density = {"nodes": [-1.0, 0.001, 8.0], "weights": [0.1, 0.8, 0.1]}
    figure = plots.spectrum(values, [0.1] * 13, converged=converged, size=5000, title="h, epoch 3, step 40", **density)
    left, right, beside = figure.axes
    assert ranks(left) == {"known": [1, 2, 3, 4], "white": [5, 6, 7]}
    assert ranks(right) == {"known": [4999, 5000], "white": [4996, 4997, 4998]}
    assert [label.get_text() for label in right.get_xticklabels()] == ["4,996", "5,000"]
    assert figure.get_suptitle() == "h, epoch 3, step 40"
    assert beside.get_title() == "density"
    figure.canvas.draw()


def test_a_spectrum_is_drawn_at_its_true_ranks():
    values = torch.tensor([9.0, 7.0, 1.0, 0.5, -0.5, -8.0], dtype=torch.float64)
    errors = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 0.0], dtype=torch.float64)
    sp = Spectrum(values, errors, tol=0.01, linearity_defect=0.0, num_products=6, n=300)
    left, right = sp.plot().axes
    assert ranks(left) == {"known": [1, 2], "white": [3, 4, 5]}
    assert ranks(right) == {"known": [300], "white": []}


@pytest.mark.parametrize(
    ("values", "converged", "size", "panels"),
    [
        ([4.0, 2.0, -1.0], [True] * 3, 0, [[1, 2, 3]]),  # all of them
        ([4.0, 2.0, -1.0], [True] * 3, 9, [[1, 2], [9]]),  # the six others are zeros
        ([4.0, 2.0, 1.0], [False] * 3, 9, [[1, 2, 3]]),
        ([0.0, 0.0], [True] * 2, 0, [[1, 2]]),
    ],
)
def test_few_eigenvalues(values, converged, size, panels):
    figure = plots.spectrum(values, [0.0] * len(values), converged=converged, size=size)
    assert [sorted(r["known"] + r["white"]) for r in map(ranks, figure.axes)] == panels
    figure.canvas.draw()


def over_time(**arguments):
    """Three measurements; the node of most eigenvalues is now above, now below zero."""
    density = [([-0.5, node, 6.0], [0.05, 0.9, 0.05]) for node in (0.02, -0.03, 0.015)]
    values = [[5.0, 1.0, -1.0], [6.0, 2.0, -1.0], [4.0, 1.0, -0.5]]
    known = {"errors": [[0.1] * 3] * 3, "converged": [[True] * 3] * 3, "top_k": 2, "bottom_k": 1}
    return plots.spectrum_over_time([0, 12, 24], values, **known, density=density, **arguments)


def test_most_eigenvalues_are_one_band_around_zero_without_holes():
    figure = over_time()
    below = next(axes for axes in figure.axes if axes.get_title() == "Density of all eigenvalues")
    (image,) = below.collections
    shares, edges = np.asarray(image.get_array()), image.get_coordinates()[:, 0, 1]
    assert np.isfinite(shares).all()
    assert (shares >= 1e-5).all()
    middle = int(np.searchsorted(edges, 0)) - 1
    assert (shares.argmax(0) == middle).all()
    assert edges[middle] == -edges[middle + 1] < -0.03
    figure.canvas.draw()


def test_time_is_shown_in_epochs_too():
    upper = over_time(epochs=[0, 0, 1]).axes[0]
    (above,) = upper.child_axes
    above.figure.canvas.draw()
    assert [(tick.get_position()[0], tick.get_text()) for tick in above.get_xticklabels()] == [(12, "0"), (24, "1")]
    assert above.get_xlabel() == "in epoch"
    assert not over_time().axes[0].child_axes


@pytest.mark.parametrize(("edge", "label"), [(7.0, "edge of stability"), (40.0, "edge of stability: above, from 40")])
def test_the_edge_of_stability_is_named_where_it_is_far_above(edge, label):
    figure = over_time(stable_below=[edge] * 3)
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text() == label
    assert figure.axes[0].get_ylim()[1] < 10


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-sketch\[plots\]'"):
        plots.new_figure(1, 1)
