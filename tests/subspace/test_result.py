"""The result of a search: means over seeds, the suggestion, the reason if there is none, and the figure."""

import math

import pytest
from small_searches import by_dimension, search

from lightning_sketch.subspace import IntrinsicDimensionResult


def of_runs(runs):
    """Make the result of these runs, with a baseline of 0.9 and therefore a target of 0.81."""
    columns = dict(zip(("kind", "dim", "seed", "value"), map(list, zip(*runs, strict=True)), strict=True))
    more = {"steps": [9] * len(runs), "status": ["done"] * len(runs)}
    return IntrinsicDimensionResult(
        {**columns, **more}, "val_acc", mode="max", threshold=0.9, n=100, baseline=0.9, start=0.1
    )


def test_means_over_seeds_decide():
    result = of_runs([("fit", 8, 0, 0.9), ("fit", 8, 1, 0.7), ("fit", 16, 0, 0.8), ("fit", 16, 1, 0.84)])
    assert result.means() == {8: pytest.approx(0.8), 16: pytest.approx(0.82)}
    assert result.suggestion() == 16


def test_means_go_from_the_smallest_dimension_on(tmp_path):
    """A search is verified at half of the dimension found, which is run after it."""
    assert list(search(by_dimension(), tmp_path, method="doubling", baseline=1.0).means()) == [2, 4]


@pytest.mark.parametrize(("mode", "baseline", "start"), [("max", 1.0, 0.0), ("min", 0.0, 1.0)])
def test_the_target_itself_is_reached(mode, baseline, start):
    columns = {"kind": ["fit"], "dim": [8], "seed": [0], "value": [0.5], "steps": [1], "status": ["done"]}
    result = IntrinsicDimensionResult(columns, "value", mode=mode, threshold=0.5, n=64, baseline=baseline, start=start)
    assert (result.target, result.suggestion()) == (0.5, 8)


@pytest.mark.parametrize(
    ("found", "suggested"),
    [([(32, 16, 0.9), (64, 32, 0.7), (128, 64, 0.9)], 64), ([(32, 16, 0.9), (64, 32, 0.7)], 64), ([(8, 4, 0.9)], 4)],
    ids=["16, 64, 64", "16, 64", "4"],
)
def test_searches_of_several_seeds_give_their_median(found, suggested):
    """It is not the smallest: the other seeds did not try that dimension. Of two middle values, it is the larger."""
    runs = []
    for seed, (dim, half, value) in enumerate(found):
        runs += [("search", dim, seed, 0.85), ("fit", half, seed, value)]
    assert of_runs(runs).suggestion() == suggested


def test_most_searches_must_arrive():
    reached, not_reached = ("search", 32, 0, 0.85), [("search", 64, seed, 0.5) for seed in (1, 2)]
    assert of_runs([reached, *not_reached]).suggestion() is None


def test_no_suggestion_says_why(caplog):
    result = of_runs([("fit", 8, 0, 0.3), ("fit", 16, 0, 0.5)])
    with caplog.at_level("INFO"):
        assert result.suggestion() is None
    assert "no dimension reached val_acc 0.81: the best is 0.5 at dim 16" in caplog.text
    assert result.plot(suggest=False).axes[0].get_ylabel() == "val_acc"


def test_the_best_run_is_named_in_both_modes_whatever_failed(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert search(by_dimension(dim4=math.nan, dim8=0.3, dim16=0.2), tmp_path, dims=[4, 8, 16]).suggestion() is None
        assert search(by_dimension(dim4=math.nan), tmp_path, dims=[4]).suggestion() is None
        model = by_dimension(dim4=0.09, dim8=0.08)
        model.values[sum(parameter.numel() for parameter in model.parameters())] = 0.01
        assert search(model, tmp_path / "min", mode="min").suggestion() is None
    for said in ("the best is 0.3 at dim 8", "no run gave a number", "the best is 0.08 at dim 8"):
        assert caplog.text.count(said) == 1


def test_a_plot_into_given_axes():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figure = of_runs([("fit", 8, 0, 0.3), ("fit", 16, 0, 0.9), ("fit", 16, 1, 0.8)]).plot(ax=axes)
    assert figure is axes.figure
    assert any("suggestion: 16" in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize("suggest", [True, False])
def test_a_plot_may_leave_out_the_suggestion(suggest):
    figure = of_runs([("fit", 8, 0, 0.3), ("fit", 16, 0, 0.9)]).plot(suggest=suggest)
    legend = figure.axes[0].get_legend()
    assert any("suggestion" in text.get_text() for text in legend.get_texts()) == suggest
