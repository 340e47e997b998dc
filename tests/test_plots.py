"""Figures show what they were given, in its place."""

import sys

import numpy as np
import pytest

from lightning_sketch import plots


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


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-sketch\[plots\]'"):
        plots.new_figure(1, 1)
