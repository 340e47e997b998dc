"""The methods of a search by several runs, on real digits, and what is refused before training."""

import copy
import math
from collections.abc import Mapping

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from forks import Started
from nets import Classifier, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import ByDimension, by_dimension, find, made, recorded, search, tuner
from torch import nn

from lightning_sketch.subspace import IntrinsicDimensionTuner, SubspaceModule


@pytest.mark.slow
def test_grid(tmp_path):
    """Full training is first; every dimension has the same initial weights and the same order of data."""
    model = made()
    before = copy.deepcopy(model.state_dict())
    searcher, made_for = tuner(tmp_path)
    result = find(searcher, model, seeds=2)
    assert result.results["dim"] == [4, 4, 32, 32, 128, 128, 512, 512]
    assert result.results["seed"] == [0, 1] * 4
    assert result.results["kind"] == ["fit"] * 8
    assert result.results["steps"] == [104] * 8
    assert result.results["status"] == ["done"] * 8
    assert all(type(value) is float for value in result.results["value"])
    assert made_for == [result.n, result.n, *result.results["dim"]]  # the first is for the metric before training
    assert result.target == pytest.approx(0.7 * result.baseline)
    values = result.results["value"]
    assert values[0] < result.target < values[-1]
    assert result.suggestion() == 128
    assert torch.equal(torch.cat([t.flatten() for t in before.values()]), flat(model))


def flat(module):
    return torch.cat([t.flatten() for t in module.state_dict().values()])


@pytest.mark.slow
def test_without_dims_it_goes_up_until_two_in_a_row_are_enough(tmp_path):
    result = find(tuner(tmp_path)[0], made(), dims=None)
    assert result.results["dim"] == [8 * 2**i for i in range(len(result.results["dim"]))]
    assert result.suggestion() == result.results["dim"][-2] in (64, 128, 256)


@pytest.mark.parametrize(("enough", "asked"), [(8, [8, 16, 4]), (2, [8, 16, 4, 2, 1]), (1, [8, 16, 4, 2, 1])])
def test_where_the_first_dimension_is_enough_it_goes_down(tmp_path, enough, asked):
    """From 8 directions to the first that is not enough, or to one."""
    model = by_dimension(**{f"dim{dim}": 0.2 for dim in (1, 2, 4, 8) if dim < enough})
    for method in ("grid", "bisect"):
        result = search(model, tmp_path, dims=None, method=method, baseline=1.0)
        assert result.results["dim"] == asked
        assert result.suggestion() == enough


def test_bisection(tmp_path):
    """Of 4, 32, 128 and 512 it asks places 0, 1 and 3, and the one between, which is enough."""
    result = find(tuner(tmp_path)[0], made(), method="bisect", baseline=0.9)
    assert result.results["dim"] == [4, 32, 512, 128]
    assert result.suggestion() == 128
    assert result.baseline == 0.9


def test_the_mean_over_seeds_is_what_a_bisection_judges(tmp_path):
    """The mean of 0.5 and 0.9 does not reach 0.8."""
    model = by_dimension(dim8=(0.5, 0.9), dim4=(0.9, 0.0))
    result = search(model, tmp_path, method="bisect", dims=[4, 8, 16], seeds=2, threshold=0.8)
    assert result.results["dim"] == [4, 4, 8, 8, 16, 16]
    assert result.suggestion() == 16


def test_a_dimension_whose_first_seed_is_not_enough_at_any_rate_is_run_with_all_seeds(tmp_path):
    """The first seed chooses among the rates beside it, here the first one since they are equal."""
    model = by_dimension(dim4=(0.7, 0.8))
    result = search(model, tmp_path, dims=[4, 8], seeds=2, tuner={"rates": (1, 0.3, 3, 3.0)})
    columns = zip(*(result.results[key] for key in ("dim", "seed", "scale")), strict=True)
    assert list(columns) == [(4, 0, 1.0), (4, 0, 0.3), (4, 0, 3.0), (4, 1, 1.0), (8, 0, 1.0), (8, 1, 1.0)]


@pytest.mark.slow
def test_doubling_goes_on_from_half_of_what_a_search_finds(tmp_path):
    """Runs at fixed dimensions go down while one is enough, or up until two in a row are."""
    result = find(tuner(tmp_path, steps=80)[0], made(), method="doubling", dims=[4, 512])
    kind, dims = result.results["kind"], result.results["dim"]
    assert (kind[0], set(kind[1:])) == ("search", {"fit"})
    assert dims[1] == dims[0] // 2 >= 32
    assert result.results["steps"][0] <= 2 * 80
    assert result.suggestion() in dims[1:]
    if result.suggestion() > 4:
        assert result.means()[result.suggestion() // 2] < result.target


def test_a_search_that_ends_at_once_goes_down_from_there(tmp_path):
    result = search(by_dimension(dim2=0.2), tmp_path, method="doubling", dims=None, baseline=1.0)
    assert result.results["kind"] == ["search", "fit", "fit", "fit"]
    assert result.results["dim"] == [8, 4, 8, 2]
    assert result.suggestion() == 4


def test_a_search_stays_within_the_dims_that_are_given(tmp_path):
    """It ends at 4, and half of it was not asked for."""
    result = search(by_dimension(), tmp_path, method="doubling", dims=[4, 64], seeds=2, baseline=1.0)
    assert result.results["dim"] == [4, 4, 4, 8, 8]
    assert result.results["seed"] == [0, 0, 1, 0, 1]
    assert result.suggestion() == 4


def test_the_directions_of_a_search_are_nested(tmp_path):
    orders = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            orders.append((pl_module.directions.nested, pl_module.directions.sketch.seed))

    search(by_dimension(), tmp_path, method="doubling", dims=[4], seeds=2, baseline=1.0, callbacks=lambda: [Watch()])
    assert orders == [(True, 0), (False, 0), (False, 1)]


def test_the_rule_of_a_search(tmp_path):
    """A twentieth of the gain of full training is delta, an eighth of its length the interval, twice it the limit."""
    seen = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            if trainer.callbacks[0] is not self:
                finder, d = trainer.callbacks[0], pl_module.directions
                rule = [finder.target, finder.delta, finder.every_n_train_steps, finder.max_steps]
                seen.append([d.dim, d.sketch.dim, *rule])

    options = {"steps": 16, "method": "doubling", "dims": [4, 64], "threshold": 0.5}
    search(by_dimension(dim64=0.2), tmp_path, callbacks=lambda: [Watch()], **options)
    assert seen == [pytest.approx([4, 64, 0.5, (1.0 - 0.1) / 20, 2, 32])]
    assert [entry["asked"] for entry in recorded(tmp_path)][:2] == [["full", "1210"], ["search", "64"]]


class Halting(Classifier):
    """A module that improves until the last validation of a search of sixteen steps."""

    def validation_step(self, batch):
        self.log("val_acc", 0.06 * min(self.trainer.global_step, 15))


def test_a_search_that_does_not_reach_the_target_reports_its_last_value(tmp_path):
    """The dimension is the one at which the last value was measured, although it was doubled after that."""
    pl.seed_everything(0, verbose=False)
    searcher = tuner(tmp_path, steps=8)[0]
    result = find(searcher, Halting(), method="doubling", dims=[4, 512], baseline=1.0, threshold=1.0)
    first = {key: column[0] for key, column in result.results.items()}
    assert first == {
        "kind": "search",
        "dim": 4,
        "seed": 0,
        "scale": 10.0,
        "value": pytest.approx(0.9),
        "steps": 16,
        "status": "not reached",
        "checkpoint": None,
    }
    assert result.results["dim"][1:] == [4 << k for k in range(8)]
    assert result.suggestion() is None


@pytest.mark.parametrize(("value", "baseline", "values"), [("last", 0.9, [0.4]), ("best", 1.0, [0.8])])
def test_a_run_may_be_judged_by_its_best_validation(tmp_path, value, baseline, values):
    """Full training goes through 1.0 and ends at 0.9, the subspace through 0.8 to 0.4."""

    class Model(Classifier):
        def validation_step(self, batch):
            step, part = self.trainer.global_step, isinstance(self.trainer.lightning_module, SubspaceModule)
            self.log("val_acc", {0: 0.1, 4: 0.8 if part else 1.0}.get(step, 0.4 if part else 0.9))

    every = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    result = search(made(Model), tmp_path, steps=8, dims=[4], value=value, trainers=every)
    assert (result.baseline, result.results["value"]) == (pytest.approx(baseline), pytest.approx(values))


def test_searches_share_the_runs_at_the_same_rate(tmp_path):
    """A rate is one of the settings by which a run is found again."""
    counts = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            counts.append(trainer)

    for rates, runs in [(1, 1), ((1, 3), 2), (3, 2), (None, 3)]:
        asked = {"baseline": 1.0, "tuner": {"rates": rates}, "callbacks": lambda: [Watch()]}
        search(by_dimension(dim4=0.5), tmp_path, dims=[4], **asked)
        assert len(counts) == runs


def test_a_search_prints_a_line_for_each_run(tmp_path):
    """With a Trainer's own arguments, in a process of its own: full training, 24 runs, and a line before them."""
    program = tmp_path / "program.py"
    program.write_text(
        "from nets import Classifier, train_loader, val_loader\n"
        "from lightning_sketch import IntrinsicDimensionTuner\n"
        "trainer = {'max_steps': 1, 'val_check_interval': 1, 'accelerator': 'cpu', 'logger': False}\n"
        f"trainer['default_root_dir'] = {str(tmp_path)!r}\n"
        "tuner = IntrinsicDimensionTuner(trainer, rates=1)\n"
        "tuner.find(Classifier(), train_loader(), val_loader(), dims=range(8, 32), monitor='val_loss', mode='min')\n"
    )
    lines = [line for text in Started(program).communicate() for line in text.splitlines() if line.strip()]
    assert sum("val_loss" in line for line in lines) == 25
    assert len(lines) <= 40, lines


class OfHydra(Mapping):
    """A mapping that is no dict, as Hydra's DictConfig is none."""

    def __init__(self, entries):
        self.entries = entries

    def __getitem__(self, name):
        return self.entries[name]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


def test_arguments_of_trainers_are_any_mapping(tmp_path):
    given = {
        "max_steps": 2,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
    }
    tuner = IntrinsicDimensionTuner(OfHydra({**given, "default_root_dir": str(tmp_path)}), rates=1)
    assert find(tuner, made(), dims=[8], baseline=0.9).results["steps"] == [2]


@pytest.mark.slow
def test_a_loss_counts_from_where_it_starts(tmp_path):
    """Target: start - threshold (start - full), start at θ₀."""
    model = made()
    start = trainer().validate(copy.deepcopy(model), val_loader(), verbose=False)[0]["val_loss"]
    result = find(tuner(tmp_path)[0], model, monitor="val_loss", mode="min", dims=[4, 512], threshold=0.7)
    assert result.start == pytest.approx(start)
    assert result.target == pytest.approx(start - 0.7 * (start - result.baseline))
    assert result.suggestion() == 512


def test_full_training_and_subspaces_are_of_the_same_parameters(tmp_path):
    """Both train the last layer alone, or also the first one in full, as a head that is outside of n is."""
    ends = []

    class Watch(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            ends.append(copy.deepcopy((pl_module.module if isinstance(pl_module, SubspaceModule) else pl_module).net))

    def trainer_fn(dim):
        return trainer(Watch(), max_steps=8, default_root_dir=tmp_path)

    model = made()
    alone = {"parameters": "net.2.*"}
    for options, stays in (
        (alone, True),
        ({**alone, "others": "full"}, False),
        ({**alone, "head": "net.0.*"}, False),
    ):
        searcher = IntrinsicDimensionTuner(trainer_fn, **options, rates=1)
        assert find(searcher, model, dims=[8], monitor="val_loss", mode="min").n == 170
        assert len(ends) == 2
        for net in ends:
            assert torch.equal(net[0].weight, model.net[0].weight) == stays
            assert not torch.equal(net[2].weight, model.net[2].weight)
        ends.clear()


def test_a_head_is_outside_of_n_and_of_the_subspace(tmp_path):
    """Of 1,210 parameters 170 are the last layer's; the result says where they are."""
    result = search(by_dimension(), tmp_path, dims=[4], baseline=1.0, tuner={"head": "net.2.*"})
    assert result.n == 1040
    assert "head='net.2.*' is outside of the subspace, and trained in full" in repr(result)


def test_layers_with_scales_of_their_own_take_some_of_the_dims(tmp_path):
    """Two layers, with weights and biases of the same scale."""
    structured = {"tuner": {"structure": "layers"}, "baseline": 1.0}
    assert search(by_dimension(), tmp_path, dims=None, **structured).results["dim"] == [8, 16, 4]
    with pytest.raises(ValueError, match=r"need dims from 3 to n=1210, got \[2\]"):
        search(by_dimension(), tmp_path, dims=[2, 8], **structured)
    with pytest.raises(ValueError, match="use method='bisect'"):
        search(by_dimension(), tmp_path, method="doubling", **structured)


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.AdamW, 5.0), (torch.optim.SGD, 5**0.5)])
def test_the_alias_is_a_factor_of_the_learning_rate(tmp_path, kind, rate):
    """It is a rate for Adam, and the square of one for SGD; rounded to float32 the runs are the same."""

    class Model(Classifier):
        def configure_optimizers(self):
            return kind(self.parameters(), lr=3e-3)

    asked = {"dims": [8], "monitor": "val_loss", "mode": "min"}
    one, other = (
        search(made(Model), tmp_path / str(place), tuner={"rates": None, **given}, **asked)
        for place, given in enumerate(({"lr_scale": 5}, {"rates": rate}))
    )
    assert one.results["value"] == pytest.approx(other.results["value"], rel=1e-5)
    assert len(one.results["dim"]) == 1


def square(width):
    class Model(ByDimension):
        def network(self, _):
            return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(width), nn.Linear(width, width, bias=False))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    return Model


@pytest.mark.parametrize(
    ("width", "method", "dims"),
    [(8, "grid", [8, 16, 32, 64]), (2, "grid", [4, 2, 1]), (8, "doubling", [8, 32, 64]), (2, "doubling", [4, 2, 4, 1])],
)
def test_dims_by_default_are_powers_of_two_and_all(tmp_path, width, method, dims):
    """A power of two that is n is tried once; a search doubles to less than n if it can."""
    model = made(square(width))
    model.values = dict.fromkeys((8, 16, 32), 0.2)
    result = search(model, tmp_path, steps=1, dims=None, method=method, baseline=1.0)
    assert result.n == width**2
    assert result.results["dim"][0] == dims[0]
    if method == "grid":
        assert result.results["dim"] == dims


def test_dims_are_tried_once_each_from_the_smallest_on_up_to_all(tmp_path):
    result = search(made(square(8)), tmp_path, steps=1, dims=[64, 4, 64, 8], baseline=1.0)
    assert result.results["dim"] == [4, 8, 64]


@pytest.mark.parametrize("dims", [2 ** np.arange(3, 5), torch.tensor([8, 16]), [8.0, 16.0], (16, np.int64(8), 8)])
def test_dims_are_any_whole_numbers(tmp_path, untyped, dims):
    result = find(tuner(tmp_path, steps=2)[0], made(), dims=dims, baseline=0.9)
    assert result.results["dim"] == [8, 16]
    assert len(recorded(tmp_path)) == 2


def test_a_baseline_spares_grids_a_length(tmp_path):
    result = search(by_dimension(), tmp_path, trainers={"max_epochs": 1, "max_steps": -1}, baseline=1.0)
    assert result.results["steps"] == [8, 8]


def test_doubling_with_a_baseline_needs_the_length_of_full_training(tmp_path):
    def trainer_fn(dim):
        return trainer(max_epochs=1, max_steps=-1, default_root_dir=tmp_path)

    with pytest.raises(MisconfigurationException, match=r"Trainer\(max_steps=...\)"):
        find(IntrinsicDimensionTuner(trainer_fn), made(), method="doubling", baseline=0.9)


def test_bad_input_is_refused_before_training(tmp_path, untyped):
    class Untouched(Classifier):
        def on_train_start(self):
            raise AssertionError("training began")

    one, logger = trainer(), pl.loggers.CSVLogger(tmp_path)
    fine = tuner(tmp_path)[0]
    for searcher, options, error, said in [
        (IntrinsicDimensionTuner(lambda dim: one), {}, MisconfigurationException, "Trainer that is already in use"),
        (
            IntrinsicDimensionTuner(lambda dim: trainer(logger=logger)),
            {},
            MisconfigurationException,
            "two Trainers the same logger",
        ),
        (IntrinsicDimensionTuner(lambda dim: dim), {}, MisconfigurationException, "returned int, not a Trainer"),
        (fine, {"monitor": "accuracy"}, MisconfigurationException, "'accuracy' is not logged in validation.*'val_acc'"),
        (fine, {"threshold": 0.0}, ValueError, r"threshold in \(0, 1\], got 0.0"),
        (fine, {"threshold": 1.5}, ValueError, r"threshold in \(0, 1\], got 1.5"),
        (fine, {"dims": [0, 4]}, ValueError, r"dims from 1 to n=.*\[0\]; leave these or dims out"),
        (fine, {"dims": [10**6]}, ValueError, r"\[1000000\]"),
        (fine, {"dims": []}, ValueError, "need dims from 1 to n=1210, got none"),
        (fine, {"value": "first"}, ValueError, "value='first' is not known; use 'last', 'best'"),
        (fine, {"mode": "up"}, ValueError, "mode='up'"),
        (fine, {"method": "halving"}, ValueError, "method='halving'"),
        (fine, {"seeds": 0}, ValueError, "seeds >= 1"),
        (tuner(tmp_path, parameters="head.*")[0], {}, ValueError, "no trainable parameter matches 'head"),
    ]:
        with pytest.raises(error, match=said):
            find(searcher, Untouched(), **options)


@pytest.mark.parametrize("rates", [0, -1.0, [], (1, 0), math.inf, [1, math.nan]])
def test_rates_that_are_none(rates):
    with pytest.raises(ValueError, match="need rates above 0"):
        IntrinsicDimensionTuner({}, rates=rates)


def test_rates_and_their_alias_are_not_both_given():
    with pytest.raises(ValueError, match="leave out lr_scale"):
        IntrinsicDimensionTuner({}, rates=1, lr_scale=10)


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


def test_the_wrong_mode_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="is it the other mode"):
        find(tuner(tmp_path)[0], made(), monitor="val_loss", mode="max")


def test_a_metric_that_is_never_positive_is_refused_in_mode_max(tmp_path):
    class Likelihood(Classifier):
        def validation_step(self, batch):
            self.log("likelihood", -F.cross_entropy(self(batch[0]), batch[1]))

    with pytest.raises(MisconfigurationException, match="log the negative of likelihood and use mode='min'"):
        find(tuner(tmp_path, steps=2)[0], Likelihood(), monitor="likelihood")


def test_full_training_that_gives_no_number(tmp_path):
    model = by_dimension()
    n = sum(parameter.numel() for parameter in model.parameters())
    model.values = {n: math.nan}
    with pytest.raises(MisconfigurationException, match="full training ended with val_acc=nan"):
        search(model, tmp_path)
