"""The result of a search: means, the suggestion and its spread, contradictions, the table, files, and the figure."""

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from nets import Classifier, train_loader, trainer, val_loader
from small_searches import by_dimension, made, search

from lightning_sketch._files import CorruptFile
from lightning_sketch.subspace import IntrinsicDimensionResult, IntrinsicDimensionTuner

COLUMNS = ("dim", "seed", "value", "scale", "kind", "steps", "status", "checkpoint")


def of_runs(*runs, **options):
    """Make the result of runs of (dim, seed, value) and perhaps scale and kind; the target is 0.9 of 0.9, from 0.1."""
    rows = [(*run, *(1.0, "fit", 9, "done", None)[len(run) - 3 :]) for run in runs]
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    given = {"mode": "max", "threshold": 0.9, "n": 100, "baseline": 0.9, "start": 0.1}
    return IntrinsicDimensionResult(columns, "val_acc", **{**given, **options})


def test_means_over_seeds_decide():
    result = of_runs((8, 0, 0.9), (8, 1, 0.7), (16, 0, 0.8), (16, 1, 0.84))
    assert result.means() == {8: pytest.approx(0.8), 16: pytest.approx(0.82)}
    assert result.suggestion() == 16


def test_each_dimension_counts_at_its_best_rate():
    """The best of those at which all of its seeds were run: one seed at rate 3 is no mean."""
    at_one, at_others = [(8, 0, 0.7), (16, 0, 0.82), (16, 1, 0.84)], [(8, 0, 0.6, 3.0), (16, 0, 0.9, 3.0)]
    result = of_runs(*at_one, *at_others, (16, 0, 0.8, 0.3), (16, 1, 0.7, 0.3))
    assert result.means() == {8: 0.7, 16: pytest.approx(0.83)}
    assert [row["scale"] for row in result.table()] == [1.0, 1.0]
    assert result.suggestion() == 16


def test_a_dimension_counts_if_the_next_one_is_enough_too():
    """Otherwise it was lucky. The largest that was asked needs no other."""
    assert of_runs((8, 0, 0.82), (16, 0, 0.8), (32, 0, 0.9), (64, 0, 0.9)).suggestion() == 32
    assert of_runs((8, 0, 0.82), (16, 0, 0.8), (32, 0, 0.9)).suggestion() == 32
    assert of_runs((8, 0, 0.82), (16, 0, 0.8)).suggestion() is None


@pytest.mark.parametrize(("mode", "baseline", "start"), [("max", 1.0, 0.0), ("min", 0.0, 1.0)])
def test_the_target_itself_is_reached(mode, baseline, start):
    result = of_runs((8, 0, 0.5), mode=mode, threshold=0.5, baseline=baseline, start=start)
    assert (result.target, result.suggestion()) == (0.5, 8)


def test_a_search_in_one_run_is_not_what_is_suggested():
    """It has up to twice the steps, and one seed; runs at fixed dimensions decide."""
    result = of_runs((64, 0, 0.85, 1.0, "search"), (32, 0, 0.7), (64, 0, 0.9), (128, 0, 0.9))
    assert (result.suggestion(), result.means()[64], len(result.table())) == (64, 0.9, 3)
    assert of_runs((64, 0, 0.85, 1.0, "search"), (32, 0, 0.7)).suggestion() is None


def test_the_spread_is_from_any_run_that_is_enough_to_all():
    """At 8 a rate that was not chosen is, at 32 all seeds are."""
    runs = [(8, 0, 0.5), (8, 1, 0.6), (8, 0, 0.82, 3.0), (16, 0, 0.7), (16, 1, 0.95), (32, 0, 0.85), (32, 1, 0.9)]
    result = of_runs(*runs)
    assert (result.spread, result.suggestion()) == ((8, 32), 16)
    assert of_runs((8, 0, 0.9), (16, 0, 0.7), (16, 1, 0.9)).spread == (8, None)
    assert of_runs((8, 0, 0.5)).spread == (None, None)


def test_contradictions_are_said_and_drawn():
    """Those of the table that a fixed rate ten times too large gave for a network of 7,044 weights."""
    values = {512: 0.67, 1024: 0.707, 2048: 0.672, 4096: 0.675, 7044: 0.754}
    result = of_runs(*((dim, 0, value) for dim, value in values.items()), n=7044, baseline=0.806, start=0.22)
    assert list(result.contradictions()) == [(1024, 2048), (1024, 4096), (7044, 7044)]
    assert "contradiction: val_acc is 0.672 at 2048, 0.707 at 1024" in repr(result)
    assert "contradiction: val_acc is 0.754 at n, 0.806 in full training" in repr(result)
    legend = result.plot().axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()].count("contradiction") == 1
    assert sum(line.get_linestyle() == ":" for line in result.plot().axes[0].get_lines()) == 3


@pytest.mark.parametrize("mode", ["max", "min"])
def test_noise_is_no_contradiction_unless_it_decides(mode):
    """A loss of less than 5 % of the way to the target is none, unless the smaller dimension alone is enough."""
    start, sign = (0.0, 1) if mode == "max" else (2.0, -1)

    def runs(*gains):
        rows = [(8 << k, 0, start + sign * gain) for k, gain in enumerate(gains)]
        return of_runs(*rows, mode=mode, threshold=0.5, start=start, baseline=start + sign)

    assert runs(0.2, 0.19, 0.4, 0.6, 0.59).contradictions() == {}
    assert list(runs(0.2, 0.15, 0.4).contradictions()) == [(8, 16)]
    assert list(runs(0.2, 0.501, 0.499, 0.6).contradictions()) == [(16, 32)]
    assert list(runs(0.2, math.nan, 0.6).contradictions()) == [(8, 16)]


def test_the_table_has_a_row_for_each_dimension():
    result = of_runs((8, 0, 0.9), (8, 1, 0.7), (8, 0, 0.2, 3.0), (50, 0, 0.85, 0.3))
    first, second = result.table()
    assert first == {
        "dim": 8,
        "of_n": 0.08,
        "scale": 1.0,
        "mean": pytest.approx(0.8),
        "low": 0.7,
        "high": 0.9,
        "reached": False,
        "runs": 3,
        "steps": 27,
    }
    assert (second["dim"], second["of_n"], second["scale"], second["reached"]) == (50, 0.5, 0.3, True)


def test_a_file_gives_the_same_result_or_is_named(tmp_path):
    result = of_runs((8, 0, math.nan), (16, 0, 0.9), inside="all layers")
    result.save(tmp_path / "a.json")
    loaded = IntrinsicDimensionResult.load(tmp_path / "a.json")
    assert repr(loaded) == repr(result)
    assert loaded.table()[1] == result.table()[1]
    assert math.isnan(loaded.results["value"][0])
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("0.9", "0.8"))
    with pytest.raises(CorruptFile, match=r"a\.json"):
        IntrinsicDimensionResult.load(tmp_path / "a.json")


def test_it_says_which_layers_are_inside(tmp_path):
    for options, said in [
        ({}, "all layers are inside the subspace, the last one included"),
        ({"parameters": "net.2.*"}, "parameters='net.2.*' are inside the subspace, others='frozen'"),
    ]:
        assert said in repr(search(by_dimension(), tmp_path, dims=[4], baseline=1.0, tuner=options))


def test_the_best_run_leads_to_its_module(tmp_path):
    """The module has the metric of the run; a result from a file needs the model at θ₀, and refuses another."""

    def trainer_fn(dim):
        return trainer(max_steps=32, default_root_dir=tmp_path, enable_checkpointing=True)

    result = IntrinsicDimensionTuner(trainer_fn, rates=(3, 10)).find(
        model := made(), train_loader(), val_loader(), dims=[32, 256], seeds=2, monitor="val_acc", threshold=0.6
    )
    sub = result.best()
    (row,) = [row for row in result.table() if row["dim"] == result.suggestion()]
    assert (sub.directions.dim, sub.directions.scale) == (row["dim"], row["scale"])
    (logged,) = trainer().validate(sub.materialize(), val_loader(), verbose=False)
    assert logged["val_acc"] == pytest.approx(row["high"])
    result.save(tmp_path / "a.json")
    loaded = IntrinsicDimensionResult.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="pass it with its weights at θ₀"):
        loaded.best()
    assert torch.equal(loaded.best(model).w, sub.w)
    with pytest.raises(Exception, match="trained from other initial weights"):
        loaded.best(made(seed=1))
    for path in filter(None, result.results["checkpoint"]):
        Path(path).write_bytes(Path(path).read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptFile, match="is not the checkpoint that was written there"):
        result.best()


def test_without_checkpoints_it_says_how_to_train_the_best_run_again(tmp_path):
    with pytest.raises(ValueError, match=r"left no checkpoint.*SubspaceModule\(model, 16, seed=0, scale=3\)"):
        of_runs((8, 0, 0.3), (16, 0, 0.9, 3.0)).best()
    with pytest.raises(ValueError, match=r"no dimension reaches val_acc 0.81"):
        of_runs((8, 0, 0.3)).best()


def test_no_suggestion_says_why(caplog):
    result = of_runs((8, 0, 0.3), (16, 0, 0.5))
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


def test_a_repr_fits_on_a_screen():
    """Even of many dimensions and seeds, at many rates."""
    runs = [(dim, seed, dim / 100, rate) for dim in range(1, 90) for seed in range(3) for rate in (1.0, 3.0)]
    assert len(repr(of_runs(*runs)).splitlines()) <= 8


def test_a_plot_into_given_axes():
    axes = Figure().subplots()
    figure = of_runs((8, 0, 0.3), (16, 0, 0.9), (16, 1, 0.8), (16, 0, 0.7, 3.0)).plot(ax=axes)
    assert figure is axes.figure
    assert any("suggestion: 16" in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize("suggest", [True, False])
def test_a_plot_may_leave_out_the_suggestion(suggest):
    figure = of_runs((8, 0, 0.3), (16, 0, 0.9)).plot(suggest=suggest)
    legend = figure.axes[0].get_legend()
    assert any("suggestion" in text.get_text() for text in legend.get_texts()) == suggest


def test_the_summary_of_a_run_of_weights_and_biases(tmp_path, monkeypatch):
    """An offline run of the user's own, with the suggestion, its spread, the target, the curve and the figure."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(dir=tmp_path) as run:
        of_runs((8, 0, 0.3), (16, 0, 0.9), (32, 0, 0.9), inside="all layers").log(run)
        summary = dict(run.summary)
    assert {key: summary[f"subspace/{key}"] for key in ("intrinsic_dimension", "low", "high", "n")} == {
        "intrinsic_dimension": 16,
        "low": 16,
        "high": 16,
        "n": 100,
    }
    assert summary["subspace/target"] == pytest.approx(0.81)
    assert summary["subspace/curve"]["_type"] == "table-file"
    assert summary["subspace/chart"]["_type"] == "image-file"


@pytest.mark.slow
def test_the_last_of_the_runs_of_a_search_has_its_result(tmp_path, monkeypatch):
    """Each run of W&B has its dimension; they share a group."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ended, finish = [], wandb.Run.finish

    def finished(run, *args, **kwargs):
        ended.append((run.name, run.group, dict(run.summary)))
        return finish(run, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "finish", finished)
    logger = lambda dim: pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)  # noqa: E731
    arguments = {
        "max_steps": 2,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": logger,
        "enable_progress_bar": False,
    }
    tuner = IntrinsicDimensionTuner({**arguments, "enable_checkpointing": False}, rates=1)
    result = tuner.find(made(Classifier), train_loader(), val_loader(), dims=[4, 8], monitor="val_loss", mode="min")
    names, groups, summaries = zip(*ended, strict=True)
    assert names == (f"dim {result.n}", "dim 4", "dim 8", "result")
    assert len(set(groups)) == 1
    assert summaries[-1]["subspace/target"] == pytest.approx(result.target)
    assert summaries[-1]["subspace/curve"]["nrows"] == 2
