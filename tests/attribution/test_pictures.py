"""Figures show the numbers that they were given."""

import pytest

from lightning_sketch.attribution.pictures import lds_intervals, score_distribution

pytest.importorskip("matplotlib")


def heights(container):
    return sum(patch.get_height() for patch in container)


def test_every_score_is_in_the_distribution_and_every_mark_in_its_part():
    scores = [-5.0, -1e-9, 0.0, 1e-3, 2.0, 7.0]
    axes = score_distribution(scores, [False, True, False, False, True, True], "wrong").axes[0]
    assert [heights(container) for container in axes.containers] == [6, 3]
    assert axes.get_legend().get_texts()[1].get_text() == "wrong"
    assert len(score_distribution([1.0, 3.0]).axes[0].containers) == 1
    assert heights(score_distribution([0.0, 0.0]).axes[0].containers[0]) == 2


def test_a_distribution_of_nothing_is_refused():
    for given in (([], []), ([1.0], [True, False])):
        with pytest.raises(ValueError, match="a mark for each or none"):
            score_distribution(*given)


def test_intervals_stand_where_they_were_measured():
    found = {"ggn": {"lds": 0.6, "low": 0.5, "high": 0.65}, "dot": {"lds": 0.2, "low": 0.1, "high": 0.3}}
    axes = lds_intervals(found, ceiling=0.9).axes[0]
    points, _, bars = axes.containers[0]
    assert points.get_xdata().tolist() == [0.6, 0.2]
    ends = sorted(segment[:, 0].tolist() for segment in bars[0].get_segments())
    assert ends == [pytest.approx([0.1, 0.3]), pytest.approx([0.5, 0.65])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ggn", "dot"]
