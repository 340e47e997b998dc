"""The methods of a search by several runs, on real digits, and what is refused before training."""

import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
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


@pytest.mark.slow
def test_without_dims_it_goes_up_until_reached(tmp_path):
    result = find(tuner(tmp_path)[0], made(), dims=None)
    assert result.results["dim"] == [8 * 2**i for i in range(len(result.results["dim"]))]
    assert result.suggestion() == result.results["dim"][-1] in (64, 128, 256)


def test_bisection(tmp_path):
    result = find(tuner(tmp_path)[0], made(), method="bisect", baseline=0.9)
    assert result.results["dim"] == [128, 32]
    assert result.suggestion() == 128
    assert result.baseline == 0.9


def test_the_mean_over_seeds_is_what_a_bisection_judges(tmp_path):
    """The mean of 0.5 and 0.9 does not reach 0.8."""
    model = by_dimension(dim8=(0.5, 0.9), dim4=(0.0, 0.0))
    result = search(model, tmp_path, method="bisect", dims=[4, 8, 16], seeds=2, threshold=0.8)
    assert result.results["dim"] == [8, 8, 16, 16]
    assert result.suggestion() == 16


@pytest.mark.slow
def test_doubling_is_verified_at_half(tmp_path):
    result = find(tuner(tmp_path, steps=80)[0], made(), method="doubling", dims=[4, 512])
    found, half = result.results["dim"]
    assert half == found // 2
    assert result.results["steps"][0] <= 2 * 80
    assert result.results["kind"] == ["search", "fit"]
    assert result.suggestion() in (found, half)
    assert found >= 64


def test_a_search_from_one_direction_has_no_half(tmp_path):
    result = search(by_dimension(), tmp_path, method="doubling", dims=[1, 4], baseline=1.0)
    assert (result.results["kind"], result.results["dim"]) == (["search"], [1])
    assert result.suggestion() == 1


def test_searches_of_several_seeds_are_verified_each_by_its_own(tmp_path):
    result = search(by_dimension(), tmp_path, method="doubling", seeds=2, baseline=1.0)
    assert list(zip(result.results["kind"], result.results["dim"], result.results["seed"], strict=True)) == [
        ("search", 4, 0),
        ("fit", 2, 0),
        ("search", 4, 1),
        ("fit", 2, 1),
    ]


def test_the_directions_of_a_search_are_of_its_seed(tmp_path):
    orders = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            orders.append((pl_module.directions.nested, pl_module.directions.sketch.seed))

    search(by_dimension(), tmp_path, method="doubling", seeds=2, baseline=1.0, callbacks=lambda: [Watch()])
    assert orders == [(True, 0), (False, 0), (True, 1), (False, 1)]


def test_the_rule_of_a_search(tmp_path):
    """A twentieth of the gain of full training is delta, an eighth of its length the interval, twice it the limit."""
    search(by_dimension(dim64=0.2), tmp_path, steps=16, method="doubling", dims=[4, 64], threshold=0.5)
    full, found = (entry["settings"] for entry in recorded(tmp_path))
    assert found["rule"] == [pytest.approx(0.5), pytest.approx((1.0 - 0.1) / 20), 2, 32]
    assert (found["from"], found["dim"]) == (4, 64)
    assert (full["full"], full["seed"]) == (True, 0)


class Halting(Classifier):
    """A module that improves until the last validation of a search of sixteen steps."""

    def validation_step(self, batch):
        self.log("val_acc", 0.06 * min(self.trainer.global_step, 15))


def test_a_search_that_does_not_reach_the_target_reports_its_last_value(tmp_path):
    """The dimension is the one at which the last value was measured, although it was doubled after that."""
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
    """Both train the last layer alone, or also the first one in full."""
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


def square(width):
    class Model(ByDimension):
        def network(self, _):
            return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(width), nn.Linear(width, width, bias=False))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    return Model


@pytest.mark.parametrize(
    ("width", "method", "dims"),
    [(8, "grid", [8, 16, 32, 64]), (2, "grid", [4]), (8, "doubling", [8]), (2, "doubling", [4])],
)
def test_dims_by_default_are_powers_of_two_and_all(tmp_path, width, method, dims):
    """A power of two that is n is tried once; doubling stays below n if it can."""
    model = made(square(width))
    model.values = dict.fromkeys((8, 16, 32), 0.2)
    result = search(model, tmp_path, steps=1, dims=None, method=method, baseline=1.0)
    assert result.n == width**2
    assert result.results["dim"][: len(dims)] == dims
    if method == "grid":
        assert result.results["dim"] == dims
    else:
        assert {entry["settings"]["dim"] for entry in recorded(tmp_path) if entry["run"]["kind"] == "search"} == {
            32 if width == 8 else 4
        }


def test_dims_are_tried_once_each_from_the_smallest_on_up_to_all(tmp_path):
    result = search(made(square(8)), tmp_path, steps=1, dims=[64, 4, 64, 8], baseline=1.0)
    assert result.results["dim"] == [4, 8, 64]


def test_dims_of_numpy(tmp_path, untyped):
    result = find(tuner(tmp_path, steps=2)[0], made(), dims=2 ** np.arange(3, 5), baseline=0.9)
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
        def on_fit_start(self):
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
        (fine, {"dims": [0, 4]}, ValueError, r"dims from 1 to n=.*\[0\]; leave these out"),
        (fine, {"dims": [10**6]}, ValueError, r"\[1000000\]"),
        (fine, {"dims": []}, ValueError, "dims is empty; pass whole numbers from 1 to"),
        (fine, {"mode": "up"}, ValueError, "mode='up'"),
        (fine, {"method": "halving"}, ValueError, "method='halving'"),
        (fine, {"seeds": 0}, ValueError, "seeds >= 1"),
        (tuner(tmp_path, parameters="head.*")[0], {}, ValueError, "no trainable parameter matches 'head"),
    ]:
        with pytest.raises(error, match=said):
            find(searcher, Untouched(), **options)


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
