"""The search by several runs: real fits on digits; what is refused; what a restart finds done."""

import copy
import gc
import json
import math
import weakref

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Classifier, Late, train_loader, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch.subspace import IntrinsicDimensionResult, IntrinsicDimensionTuner, SubspaceModule
from lightning_sketch.subspace._ledger import Ledger
from lightning_sketch.subspace._runner import FILE

LADDER = [4, 32, 128, 512]


def made(seed=0, **options):
    pl.seed_everything(seed, verbose=False)
    return Classifier(**options)


def tuner(folder, steps=100, **options):
    def trainer_fn(dim):
        made_for.append(dim)
        return trainer(max_steps=steps, default_root_dir=folder, check_val_every_n_epoch=1)

    made_for: list[int] = []
    found = IntrinsicDimensionTuner(trainer_fn, **options)
    return found, made_for


def find(searcher, model, **options):
    options = {"dims": LADDER, "monitor": "val_acc", "threshold": 0.7, **options}
    return searcher.find(model, train_loader(shuffle=True), val_loader(), **options)


def test_grid(tmp_path):
    """Every dimension with the same weights at the start and the same order of data; full training first."""
    model = made()
    before = copy.deepcopy(model.state_dict())
    searcher, made_for = tuner(tmp_path)
    result = find(searcher, model, seeds=2)
    assert result.results["dim"] == [4, 4, 32, 32, 128, 128, 512, 512]
    assert result.results["seed"] == [0, 1] * 4
    assert result.results["kind"] == ["fit"] * 8
    assert result.results["steps"] == [100] * 8
    assert result.results["status"] == ["done"] * 8
    assert all(type(value) is float for value in result.results["value"])
    assert made_for == [result.n, *result.results["dim"]]
    assert result.target == pytest.approx(0.7 * result.baseline)
    values = result.results["value"]
    assert values[0] < result.target < values[-1]
    assert result.suggestion() == 128
    assert torch.equal(torch.cat([t.flatten() for t in before.values()]), flat(model))


def flat(module):
    return torch.cat([t.flatten() for t in module.state_dict().values()])


def test_a_restart_does_what_is_left(tmp_path):
    model = made()
    searcher, made_for = tuner(tmp_path)
    first = find(searcher, model, dims=[4, 32])
    made_for.clear()
    again = find(tuner(tmp_path)[0], made(), dims=[4, 32, 128])
    assert again.results["value"][:2] == first.results["value"]
    noted = json.loads((tmp_path / FILE).read_text())
    assert [entry["run"]["dim"] for entry in noted] == [first.n, 4, 32, 128]
    other = find(tuner(tmp_path)[0], made(seed=1), dims=[4])  # other weights: nothing of it is done
    assert other.results["value"] != first.results["value"][:1]
    find(tuner(tmp_path, lr_scale=20)[0], made(), dims=[4])
    assert len(json.loads((tmp_path / FILE).read_text())) == 4 + 2 + 1


def test_runs_are_the_same_alone_or_in_a_row(tmp_path):
    """Each has its own seed: what ran before does not matter, and the caller's random state is left alone."""
    first = find(tuner(tmp_path / "a")[0], made(), dims=[4, 32], baseline=0.9)
    model, loader, state = made(), train_loader(shuffle=True), torch.get_rng_state()
    second = tuner(tmp_path / "b")[0].find(
        model, loader, val_loader(), dims=[32], baseline=0.9, monitor="val_acc", threshold=0.7
    )
    assert first.results["value"][1] == second.results["value"][0]
    assert torch.equal(torch.get_rng_state(), state)


def test_bisection(tmp_path):
    result = find(tuner(tmp_path)[0], made(), method="bisect", baseline=0.9)
    assert result.results["dim"] == [128, 32]
    assert result.suggestion() == 128
    assert result.baseline == 0.9


def test_doubling_is_verified_at_half(tmp_path):
    result = find(tuner(tmp_path, steps=80)[0], made(), method="doubling", dims=[4, 512])
    found, half = result.results["dim"]
    assert half == found // 2
    assert result.results["steps"][0] <= 2 * 80
    assert result.results["kind"] == ["search", "fit"]
    assert result.suggestion() in (found, half)
    assert found >= 64


def test_without_dims_it_goes_up_until_reached(tmp_path):
    result = find(tuner(tmp_path)[0], made(), dims=None)
    assert result.results["dim"] == [8 * 2**i for i in range(len(result.results["dim"]))]
    assert result.suggestion() == result.results["dim"][-1] in (64, 128, 256)


def test_a_loss_counts_from_where_it_starts(tmp_path):
    """Target: start - threshold (start - full), start at θ₀."""
    model = made()
    start = trainer().validate(copy.deepcopy(model), val_loader(), verbose=False)[0]["val_loss"]
    result = find(tuner(tmp_path)[0], model, monitor="val_loss", mode="min", dims=[4, 512], threshold=0.7)
    assert result.start == pytest.approx(start)
    assert result.target == pytest.approx(start - 0.7 * (start - result.baseline))
    assert result.suggestion() == 512


def test_a_function_makes_the_model_and_all_start_alike(tmp_path):
    starts = []

    class Seen(Classifier):
        def on_fit_start(self):
            starts.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    find(tuner(tmp_path, steps=2)[0], Seen, dims=[4, 32])
    assert len(starts) == 3
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_a_dict_of_arguments_makes_trainers(tmp_path):
    class Once(pl.Callback):
        fits = 0

        def on_fit_start(self, trainer, pl_module):
            self.fits += 1
            assert self.fits == 1

    once = Once()
    arguments = {
        "max_steps": 2,
        "accelerator": "cpu",
        "callbacks": [once],
        "logger": lambda dim: pl.loggers.CSVLogger(tmp_path, name=f"dim-{dim}"),
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    result = find(IntrinsicDimensionTuner(arguments), made(), dims=[4, 32])
    assert once.fits == 0
    for dim in (result.n, 4, 32):
        lines = (tmp_path / f"dim-{dim}" / "version_0" / "metrics.csv").read_text().splitlines()
        last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
        assert float(last["subspace/dim"]) == dim
        assert float(last["val_acc"]) > 0
    assert (tmp_path / FILE).exists()


class Diverges(Classifier):
    """No number at dim 4; no memory at dim 32."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        dims = [c.dim for c in self.trainer.callbacks if isinstance(c, Dim)]
        if 32 in dims:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss * float("nan") if 4 in dims else loss

    def validation_step(self, batch):
        self.log("val_acc", self(batch[0]).sum() * 0 + (0.5 if self.trainer.global_step else 0.1))


class Dim(pl.Callback):
    def __init__(self, dim):
        self.dim = dim


def test_what_fails_is_noted_and_the_search_goes_on(tmp_path):
    searcher = IntrinsicDimensionTuner(lambda dim: trainer(Dim(dim), max_steps=8, default_root_dir=tmp_path))
    result = find(searcher, Diverges(), dims=[4, 32, 128], baseline=0.5)
    assert result.results["status"] == ["nan", "out of memory", "done"]
    assert [math.isnan(value) for value in result.results["value"]] == [True, True, False]
    assert result.suggestion() == 128
    assert result.plot().axes[0].get_xscale() == "log"


def test_other_errors_are_the_users(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        find(tuner(tmp_path)[0], Broken())


def test_bad_input_is_refused_before_training(tmp_path):
    class Untouched(Classifier):
        def on_fit_start(self):
            raise AssertionError("training began")

    one, logger = trainer(), pl.loggers.CSVLogger(tmp_path)
    fine = tuner(tmp_path)[0]
    for searcher, options, error, said in [
        (IntrinsicDimensionTuner(lambda dim: one), {}, MisconfigurationException, "Trainer that is in use"),
        (
            IntrinsicDimensionTuner(lambda dim: trainer(logger=logger)),
            {},
            MisconfigurationException,
            "two Trainers one logger",
        ),
        (IntrinsicDimensionTuner(lambda dim: dim), {}, MisconfigurationException, "gave int, no Trainer"),
        (fine, {"monitor": "accuracy"}, MisconfigurationException, "'accuracy' is not logged in validation.*'val_acc'"),
        (fine, {"threshold": 0.0}, ValueError, r"threshold in \(0, 1\], got 0.0"),
        (fine, {"threshold": 1.5}, ValueError, r"threshold in \(0, 1\], got 1.5"),
        (fine, {"dims": [0, 4]}, ValueError, r"dims from 1 to n=.*\[0\]"),
        (fine, {"dims": [10**6]}, ValueError, r"\[1000000\]"),
        (fine, {"dims": []}, ValueError, "none"),
        (fine, {"mode": "up"}, ValueError, "mode='up'"),
        (fine, {"method": "halving"}, ValueError, "method='halving'"),
        (fine, {"seeds": 0}, ValueError, "seeds >= 1"),
        (tuner(tmp_path, parameters="head.*")[0], {}, ValueError, "no trainable parameter matches 'head"),
    ]:
        with pytest.raises(error, match=said):
            find(searcher, Untouched(), **options)


def of_runs(runs):
    """Full training gives 0.9, so that 0.81 is the target."""
    columns = dict(zip(("kind", "dim", "seed", "value"), map(list, zip(*runs, strict=True)), strict=True))
    more = {"steps": [9] * len(runs), "status": ["done"] * len(runs)}
    return IntrinsicDimensionResult({**columns, **more}, "val_acc", "max", 0.9, 100, 0.9, 0.1)


def test_means_over_seeds_decide():
    result = of_runs([("fit", 8, 0, 0.9), ("fit", 8, 1, 0.7), ("fit", 16, 0, 0.8), ("fit", 16, 1, 0.84)])
    assert result.means() == {8: pytest.approx(0.8), 16: pytest.approx(0.82)}
    assert result.suggestion() == 16


@pytest.mark.parametrize(
    ("found", "suggested"),
    [([(32, 16, 0.9), (64, 32, 0.7), (128, 64, 0.9)], 64), ([(32, 16, 0.9), (64, 32, 0.7)], 64), ([(8, 4, 0.9)], 4)],
    ids=["16, 64, 64", "16, 64", "4"],
)
def test_searches_of_several_seeds_give_their_median(found, suggested):
    """Not the luckiest: a dimension that one seed alone tried says nothing of the others. Of two, the larger."""
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


def test_a_plot_into_given_axes():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figure = of_runs([("fit", 8, 0, 0.3), ("fit", 16, 0, 0.9), ("fit", 16, 1, 0.8)]).plot(ax=axes)
    assert figure is axes.figure
    assert any("suggestion: 16" in text.get_text() for text in axes.get_legend().get_texts())


def test_wandb_draws_the_curve(tmp_path, monkeypatch):
    """Real offline runs, one for each dimension, in one group, each with its dimension and metric."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ended = []
    finish = wandb.Run.finish

    def finished(run, *args, **kwargs):
        ended.append((run.name, run.group, dict(run.summary)))
        return finish(run, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "finish", finished)
    arguments = {
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": lambda dim: pl.loggers.WandbLogger(project="digits", save_dir=tmp_path, offline=True),
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    result = find(IntrinsicDimensionTuner(arguments), made(), dims=[4, 32])
    assert [name for name, _, _ in ended] == [f"dim {result.n}", "dim 4", "dim 32"]
    assert len({group for _, group, _ in ended}) == 1
    for (_, _, summary), dim in zip(ended, (result.n, 4, 32), strict=True):
        assert summary["subspace/dim"] == dim
    assert [summary["val_acc"] for _, _, summary in ended[1:]] == pytest.approx(result.results["value"])


def test_the_wrong_mode_is_told(tmp_path):
    with pytest.raises(MisconfigurationException, match="is it the other mode"):
        find(tuner(tmp_path)[0], made(), monitor="val_loss", mode="max")


@pytest.mark.parametrize(
    "changed",
    [
        {"limit_train_batches": 3},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
)
def test_runs_of_other_length_or_step_are_not_taken_for_these(tmp_path, changed):
    def noted(**options):
        searcher = IntrinsicDimensionTuner(lambda dim: trainer(max_steps=4, default_root_dir=tmp_path, **options))
        searcher.find(made(), train_loader(), val_loader(), dims=[4], monitor="val_acc", baseline=0.9)
        return len(json.loads((tmp_path / FILE).read_text()))

    assert [noted(), noted(), noted(**changed)] == [1, 1, 2]


def test_runs_on_other_loaders_are_not_taken_for_these(tmp_path):
    searcher, counts = tuner(tmp_path, steps=4)[0], []
    for data in (train_loader(), train_loader(), train_loader(slice(0, 64)), train_loader(batch_size=16)):
        searcher.find(made(), data, val_loader(), dims=[4], monitor="val_acc", baseline=0.9)
        counts.append(len(json.loads((tmp_path / FILE).read_text())))
    assert counts == [1, 1, 2, 3]


def test_the_value_of_a_run_is_that_at_its_end(tmp_path):
    """Twelve steps with a validation every eight: the last one is of the weights that training ended with."""
    ended = []

    class Watch(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            ended.append(pl_module.materialize())

    def trainer_fn(dim):
        options = {"val_check_interval": 8, "check_val_every_n_epoch": None}
        return trainer(Watch(), max_steps=12, default_root_dir=tmp_path, **options)

    result = find(IntrinsicDimensionTuner(trainer_fn), made(), dims=[64], baseline=0.9)
    at_the_end = trainer().validate(ended[0], val_loader(), verbose=False)[0]["val_acc"]
    assert result.results["value"] == [pytest.approx(at_the_end)]


class Halting(Classifier):
    """Gets better until the last validation of a search of sixteen steps."""

    def validation_step(self, batch):
        self.log("val_acc", 0.06 * min(self.trainer.global_step, 15))


def test_a_search_that_does_not_arrive_says_how_far_it_came(tmp_path):
    """The dimension that the last value was measured at, although it was doubled after that."""
    pl.seed_everything(0, verbose=False)
    searcher = tuner(tmp_path, steps=8)[0]
    result = find(searcher, Halting(), method="doubling", dims=[4, 512], baseline=1.0, threshold=1.0)
    assert result.results == {
        "kind": ["search"],
        "dim": [4],
        "seed": [0],
        "value": [pytest.approx(0.9)],
        "steps": [16],
        "status": ["not reached"],
    }
    assert result.suggestion() is None


def test_doubling_with_a_baseline_needs_the_length_of_full_training(tmp_path):
    def trainer_fn(dim):
        return trainer(max_epochs=1, max_steps=-1, default_root_dir=tmp_path)

    with pytest.raises(MisconfigurationException, match=r"Trainer\(max_steps=...\)"):
        find(IntrinsicDimensionTuner(trainer_fn), made(), method="doubling", baseline=0.9)


def test_a_fast_dev_run_tries_all_and_notes_nothing(tmp_path):
    def trainer_fn(dim):
        return trainer(fast_dev_run=True, default_root_dir=tmp_path)

    for method in ("grid", "doubling"):
        result = find(IntrinsicDimensionTuner(trainer_fn), made(), method=method, dims=[4, 32], threshold=1.0)
        assert set(result.results["steps"]) == {1}
    assert not (tmp_path / FILE).exists()


def test_trainers_and_modules_of_runs_that_are_done_are_let_go(tmp_path):
    alive = []

    def trainer_fn(dim):
        gc.collect()
        alive.append(sum(one() is not None for one in made_before))
        made_before.append(weakref.ref(run := trainer(max_steps=2, default_root_dir=tmp_path)))
        return run

    made_before: list[weakref.ref] = []
    find(IntrinsicDimensionTuner(trainer_fn), made(), dims=[4, 8, 16, 32, 64])
    assert max(alive) <= 2


class Unlogged(Classifier):
    """Lightning's `log` cannot be compiled."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "model",
    [Late, lambda: Late(), lambda: torch.compile(Unlogged(), backend="eager")],
    ids=["late", "made", "compiled"],
)
def test_modules_that_are_made_late_or_compiled(tmp_path, model):
    pl.seed_everything(0, verbose=False)
    result = find(tuner(tmp_path, steps=4)[0], model() if model is Late else model, dims=[4, 32], baseline=0.9)
    assert result.n == 64 * 16 + 16 + 16 * 10 + 10
    assert result.results["status"] == ["done", "done"]


def test_what_is_no_model(tmp_path, untyped):
    for model, said in [
        (torch.compile(made(), backend="eager"), "lambda: torch.compile"),
        (lambda: torch.nn.Linear(2, 2), "must be a LightningModule or a function"),
    ]:
        with pytest.raises(TypeError, match=said):
            find(tuner(tmp_path)[0], model)


def test_validation_that_is_switched_off(tmp_path):
    searcher = IntrinsicDimensionTuner(lambda dim: trainer(limit_val_batches=0, default_root_dir=tmp_path))
    with pytest.raises(MisconfigurationException, match="limit_val_batches above 0"):
        find(searcher, made())


def test_full_training_and_subspaces_are_of_the_same_parameters(tmp_path):
    """The last layer alone, or with the first trained in full beside it, in both."""
    ends = []

    class Watch(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            ends.append(copy.deepcopy((pl_module.module if isinstance(pl_module, SubspaceModule) else pl_module).net))

    def trainer_fn(dim):
        return trainer(Watch(), max_steps=4, default_root_dir=tmp_path)

    model = made()
    for others, stays in (("frozen", True), ("full", False)):
        searcher = IntrinsicDimensionTuner(trainer_fn, parameters="net.2.*", others=others)
        assert find(searcher, model, dims=[8], monitor="val_loss", mode="min").n == 170
        assert len(ends) == 2
        for net in ends:
            assert torch.equal(net[0].weight, model.net[0].weight) == stays
            assert not torch.equal(net[2].weight, model.net[2].weight)
        ends.clear()


def test_callbacks_see_fits_alone(tmp_path):
    """Not the validation before: a checkpoint callback would look for its folder among loggers that are not there."""
    seen = []

    class Watch(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(stage)

    def trainer_fn(dim):
        options = {"enable_checkpointing": True, "logger": pl.loggers.CSVLogger(tmp_path, name=f"dim-{dim}")}
        return trainer(Watch(), max_steps=4, **options)

    result = find(IntrinsicDimensionTuner(trainer_fn), made(), dims=[8], monitor="val_loss", mode="min")
    assert seen == ["fit", "fit"]
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.ckpt")}
    assert folders == {"dim-8", f"dim-{result.n}"}


def test_a_search_has_a_constant_rate_whoever_makes_the_optimizer(tmp_path):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def optimizer_fn(params):
        optimizer = torch.optim.Adam(params, lr=0.03)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    searcher = IntrinsicDimensionTuner(
        lambda dim: trainer(Watch(), max_steps=8, default_root_dir=tmp_path), optimizer_fn=optimizer_fn
    )
    find(searcher, made(), method="doubling", baseline=1.0, threshold=1.0)
    assert set(rates) == {0.05}
    assert len(rates) == 16


class Activation:
    """Told apart by its address, like a function."""


def test_hyper_parameters_that_have_an_address_are_known_again(tmp_path):
    class Active(Classifier):
        def __init__(self, activation):
            super().__init__()
            self.save_hyperparameters("activation")

    for _ in range(2):
        pl.seed_everything(0, verbose=False)
        find(tuner(tmp_path, steps=2)[0], Active(Activation()), dims=[8], baseline=0.9)
    assert len(json.loads((tmp_path / FILE).read_text())) == 1


def test_dims_of_numpy(tmp_path, untyped):
    result = find(tuner(tmp_path, steps=2)[0], made(), dims=2 ** np.arange(3, 5), baseline=0.9)
    assert result.results["dim"] == [8, 16]
    assert len(json.loads((tmp_path / FILE).read_text())) == 2


def test_a_metric_that_is_never_positive_is_told(tmp_path):
    class Likelihood(Classifier):
        def validation_step(self, batch):
            self.log("likelihood", -F.cross_entropy(self(batch[0]), batch[1]))

    with pytest.raises(MisconfigurationException, match="log the negative of likelihood and use mode='min'"):
        find(tuner(tmp_path, steps=2)[0], Likelihood(), monitor="likelihood")


def test_two_searches_in_one_folder_leave_each_other_their_notes(tmp_path):
    ledgers = [Ledger(tmp_path / FILE), Ledger(tmp_path / FILE)]
    for number, ledger in enumerate(ledgers):
        ledger.add({"dim": number}, {"value": float(number)}, write=True)
    assert Ledger(tmp_path / FILE).find({"dim": 0}) == {"value": 0.0}
    assert Ledger(tmp_path / FILE).find({"dim": 1}) == {"value": 1.0}


def test_a_callback_may_log_the_metric(tmp_path):
    class Logs(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("seen", float(trainer.global_step) + 1)

    searcher = IntrinsicDimensionTuner(lambda dim: trainer(Logs(), max_steps=3, default_root_dir=tmp_path))
    result = find(searcher, made(), monitor="seen", dims=[4], threshold=0.9)
    assert (result.start, result.baseline, result.results["value"]) == (1.0, 4.0, [4.0])


def test_a_module_may_save_a_part_of_itself(tmp_path):
    """Replicas are made of what it holds, not of what it saves."""
    starts = []

    class Adapter(Classifier):
        strict_loading = False

        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {name: tensor for name, tensor in state.items() if "net.2" in name}

        def on_fit_start(self):
            starts.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    find(tuner(tmp_path, steps=2)[0], lambda: Adapter(), dims=[4], baseline=0.9)
    find(tuner(tmp_path, steps=2)[0], lambda: Adapter(), dims=[4, 8], baseline=0.9)
    assert len(starts) == 3
    assert torch.equal(starts[1], starts[2])
    assert not torch.equal(starts[0], starts[1])
