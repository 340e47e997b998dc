"""Searches by several runs: what is noted and found again, what is said, what fails."""

import math
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from edges import Judged, find, judged, made, noted
from nets import Classifier, train_loader, trainer, val_loader
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lightning_sketch.subspace import IntrinsicDimensionTuner


@pytest.mark.parametrize(
    "changed",
    [{"max_steps": 5}, {"max_epochs": 1}, {"limit_val_batches": 1}, {"gradient_clip_algorithm": "value"}],
    ids=lambda changed: next(iter(changed)),
)
def test_runs_of_another_length_validation_or_clipping_are_done_again(tmp_path, changed):
    for options in ({}, {}, changed):
        find(made(), tmp_path, trainers={"gradient_clip_val": 0.5, **options}, dims=[4], baseline=0.9)
    assert len(noted(tmp_path)) == 2


def test_runs_of_another_module_metric_or_validation_set_are_done_again(tmp_path):
    class Other(Classifier):
        pass

    same = {"dims": [4], "baseline": 0.9}
    for model, options in [
        (made(), {}),
        (made(), {}),
        (made(lr=1e-2), {}),
        (made(Other), {}),
        (made(), {"monitor": "val_loss", "mode": "min"}),
        (made(), {"val_dataloaders": val_loader(slice(1700, None))}),
        (made(), {"train_dataloaders": train_loader(slice(0, 128), batch_size=16)}),  # as many batches
    ]:
        find(model, tmp_path, **{**same, **options})
    assert len(noted(tmp_path)) == 6


def test_parameters_may_be_given_as_several_patterns_and_the_runs_are_found_again(tmp_path):
    """In a folder that nobody had made before."""
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        find(made(), folder, tuner={"parameters": ("net.0.*", "net.2.bias")}, dims=[4], baseline=0.9)
    assert len(noted(folder)) == 1


def test_searches_of_another_rule_start_end_kind_or_seed_are_done_again(tmp_path):
    """Each is one run where it does not arrive."""
    same = {"method": "doubling", "dims": [4, 8], "baseline": 1.0, "threshold": 1.0}
    for options, tuner in [
        ({}, {}),
        ({}, {}),
        ({"threshold": 0.9}, {}),
        ({"dims": [2, 8]}, {}),
        ({"dims": [4, 16]}, {}),
        ({}, {"sketch": "qk"}),
        ({"seeds": 2}, {}),
    ]:
        find(judged(dim8=0.2, dim16=0.2), tmp_path, **{**same, **options}, tuner=tuner)
    assert [entry["run"]["seed"] for entry in noted(tmp_path)] == [0, 0, 0, 0, 0, 1]


def test_the_rule_of_a_search(tmp_path):
    """A twentieth of what is gained, every eighth of full training, for twice that; up to the largest of dims."""
    find(judged(dim64=0.2), tmp_path, steps=16, method="doubling", dims=[4, 64], threshold=0.5)
    full, search = (entry["settings"] for entry in noted(tmp_path))
    assert search["rule"] == [pytest.approx(0.5), pytest.approx((1.0 - 0.1) / 20), 2, 32]
    assert (search["from"], search["dim"]) == (4, 64)
    assert (full["full"], full["seed"]) == (True, 0)


def test_what_is_said_of_runs(tmp_path, caplog):
    with caplog.at_level("INFO"):
        find(judged(), tmp_path, dims=[4])
        find(judged(), tmp_path, dims=[4])
    lines = [record.message for record in caplog.records if ", seed " in record.message]
    told = ["full training, seed 0: val_acc 1, 4 steps, done", "dim 4, seed 0: val_acc 1, 4 steps, done"]
    assert lines == [*told, *(f"{line}, as noted before" for line in told)]


def test_an_optimizer_of_ones_own_in_every_method(tmp_path):
    """A function is not noted; the module's own would be Adam, at another rate."""
    rates = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            rates.append((type(trainer.optimizers[0]).__name__, trainer.optimizers[0].param_groups[0]["lr"]))

    for method in ("grid", "doubling"):
        options = {
            "tuner": {"optimizer_fn": lambda params: torch.optim.SGD(params, lr=0.5)},
            "callbacks": lambda: [Watch()],
        }
        find(judged(), tmp_path / method, method=method, baseline=1.0, dims=[4], **options)
    assert rates == [("SGD", 0.5)] * 3


def test_the_sketch_that_is_asked_for(tmp_path):
    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert pl_module.directions.spec()["kind"] == "qk"

    find(judged(), tmp_path, tuner={"sketch": "qk"}, callbacks=lambda: [Watch()], baseline=1.0)
    assert {entry["settings"]["sketch"] for entry in noted(tmp_path)} == {"qk"}


def test_data_of_a_data_module(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    result = find(judged(), tmp_path, datamodule=Data())
    assert result.results["status"] == ["done", "done"]


def test_data_without_a_length(tmp_path):
    """A loader of a stream has no number of batches."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(train_loader().dataset)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=32)
    result = find(judged(), tmp_path, train_dataloaders=loader, dims=[4], baseline=1.0)
    assert result.results["status"] == ["done"]


def scheduled(schedule, rate=3e-3):
    class Model(Judged):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=rate)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    return made(Model)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 8),
        lambda optimizer: LambdaLR(optimizer, lambda step: (step + 1) / 8),
        lambda optimizer: OneCycleLR(optimizer, 3e-3, total_steps=8),
    ],
    ids=["falling", "rising", "one cycle"],
)
def test_the_rate_of_a_search_is_constant(tmp_path, schedule):
    rates = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    model = scheduled(schedule)
    model.told = {8: 0.2}
    find(model, tmp_path, callbacks=lambda: [Watch()], method="doubling", baseline=1.0)
    assert rates == [pytest.approx(3e-3)] * 8


def test_loggers_see_training_and_one_last_line(tmp_path):
    """Nothing of the validation before training, nor of one that is for the value at the end alone."""
    written = []

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            written.append((self.name, step, *sorted(set(metrics) - {"epoch", "train_loss"})))
            super().log_metrics(metrics, step)

    class Model(Judged):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    def trainer_fn(dim):
        options = {"val_check_interval": 8, "max_steps": 12, "default_root_dir": tmp_path}
        return trainer(logger=Logger(tmp_path, name=f"dim {dim}"), **options, check_val_every_n_epoch=None)

    model = made(Model)
    result = IntrinsicDimensionTuner(trainer_fn).find(model, train_loader(), val_loader(), dims=[4], monitor="val_acc")
    assert [line for line in written if line[2:]] == [
        (f"dim {dim}", *line) for dim in (result.n, 4) for line in ((7, "val_acc"), (12, "subspace/dim", "val_acc"))
    ]


def test_a_run_that_ends_with_validation_is_not_validated_again(tmp_path):
    counts = []

    class Watch(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step:
                counts.append((trainer.state.fn, trainer.global_step))

    every = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    find(judged(), tmp_path, steps=8, dims=[4], baseline=1.0, trainers=every, callbacks=lambda: [Watch()])
    assert counts == [("fit", 4), ("fit", 8)]


def test_a_callback_of_ones_own_sees_the_present_w_after_validation(tmp_path):
    """In a search the mean of w is validated; it is put back before anybody saves it."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.w = pl_module.coordinates().detach().clone()

        def on_validation_end(self, trainer, pl_module):
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                seen.append(torch.equal(pl_module.coordinates()[:4], self.w[:4]))

    model = judged(dim4=0.2)
    find(model, tmp_path, steps=32, dims=[4], callbacks=lambda: [Watch()], method="doubling", baseline=1.0)
    assert seen == [True] * 16


def test_the_order_of_a_run_is_of_its_seed_whoever_draws_it(tmp_path):
    """Python's, numpy's and torch's random numbers: what the caller drew before does not matter, nor what comes next.

    What checks types in the tests draws from Python's.
    """
    drawn = []

    class Model(Judged):
        def training_step(self, batch, batch_idx):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return super().training_step(batch, batch_idx)

    for before in (1, 2):
        model = made(Model)
        pl.seed_everything(before, verbose=False)
        here = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        find(model, tmp_path / str(before), steps=1, dims=[4], seeds=2, baseline=1.0)
        assert here == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert drawn[:2] == drawn[2:]
    assert all(one != other for one, other in zip(*drawn[:2], strict=True))


class Fails(Judged):
    """No memory from some step on."""

    at = 0
    error: BaseException = MemoryError()

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= self.at:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
@pytest.mark.parametrize(("at", "value"), [(0, math.nan), (3, 0.2)])
def test_a_search_without_memory_says_how_far_it_came(tmp_path, error, at, value):
    model = made(type("Model", (Fails,), {"at": at, "error": error, "told": {8: 0.2}}))
    result = find(model, tmp_path, steps=16, method="doubling", baseline=1.0)
    assert result.results["status"] == ["out of memory"]
    assert result.results["value"] == [pytest.approx(value, nan_ok=True)]
    assert result.suggestion() is None


def test_a_run_without_memory_leaves_the_callers_random_state_alone(tmp_path):
    model, state = made(Fails), torch.get_rng_state()
    assert find(model, tmp_path, dims=[4], baseline=1.0).results["status"] == ["out of memory"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_search_from_one_direction_has_no_half(tmp_path):
    result = find(judged(), tmp_path, method="doubling", dims=[1, 4], baseline=1.0)
    assert (result.results["kind"], result.results["dim"]) == (["search"], [1])
    assert result.suggestion() == 1


def test_searches_of_several_seeds_are_verified_each_by_its_own(tmp_path):
    result = find(judged(), tmp_path, method="doubling", seeds=2, baseline=1.0)
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

    find(judged(), tmp_path, method="doubling", seeds=2, baseline=1.0, callbacks=lambda: [Watch()])
    assert orders == [(True, 0), (False, 0), (True, 1), (False, 1)]


def test_the_mean_over_seeds_is_what_a_bisection_judges(tmp_path):
    """0.5 and 0.9 do not reach 0.8 together, although they would in sum."""
    result = find(
        judged(dim8=(0.5, 0.9), dim4=(0.0, 0.0)), tmp_path, method="bisect", dims=[4, 8, 16], seeds=2, threshold=0.8
    )
    assert result.results["dim"] == [8, 8, 16, 16]
    assert result.suggestion() == 16


def test_a_baseline_spares_grids_a_length(tmp_path):
    result = find(judged(), tmp_path, trainers={"max_epochs": 1, "max_steps": -1}, baseline=1.0)
    assert result.results["steps"] == [8, 8]


def test_full_training_that_gives_no_number(tmp_path):
    model = judged()
    n = sum(parameter.numel() for parameter in model.parameters())
    model.told = {n: math.nan}
    with pytest.raises(MisconfigurationException, match=r"full training gives val_acc = nan; mend that"):
        find(model, tmp_path)


def square(width):
    class Model(Judged):
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
    """Each once, where their number is itself a power of two; nested directions only below it, where there are any."""
    model = made(square(width))
    model.told = dict.fromkeys((8, 16, 32), 0.2)
    result = find(model, tmp_path, steps=1, dims=None, method=method, baseline=1.0)
    assert result.n == width**2
    assert result.results["dim"][: len(dims)] == dims
    if method == "grid":
        assert result.results["dim"] == dims
    else:
        assert {entry["settings"]["dim"] for entry in noted(tmp_path) if entry["run"]["kind"] == "search"} == {
            32 if width == 8 else 4
        }


def test_dims_are_tried_once_each_from_the_smallest_on_up_to_all(tmp_path):
    result = find(made(square(8)), tmp_path, steps=1, dims=[64, 4, 64, 8], baseline=1.0)
    assert result.results["dim"] == [4, 8, 64]


def test_a_module_that_is_compiled_in_place_is_refused(tmp_path, untyped):
    model = pl.utilities.compile.from_compiled(torch.compile(made(), backend="eager"))
    with pytest.raises(TypeError, match="compiled module cannot be copied"):
        find(model, tmp_path)


def test_a_module_that_shards_itself_where_there_is_a_trainer(tmp_path):
    """Its parameters are there already: `configure_model` is Lightning's to call."""

    class Model(Judged):
        def configure_model(self):
            assert self.trainer.world_size == 1

    result = find(made(Model), tmp_path, dims=[4], baseline=1.0)
    assert result.results["status"] == ["done"]


def test_a_trainer_that_has_fitted_something_else_is_refused():
    used = trainer(max_steps=1)
    used.fit(made(), train_loader())
    trainers = iter([used, trainer(), trainer()])
    with pytest.raises(MisconfigurationException, match="Trainer that is in use"):
        IntrinsicDimensionTuner(lambda dim: next(trainers)).find(
            made(), train_loader(), val_loader(), dims=[4], monitor="val_acc"
        )


def test_runs_are_noted_where_a_logger_writes_in_a_folder_that_is_made(tmp_path):
    """The first that writes to a folder at all."""

    def trainer_fn(dim):
        folder = tmp_path / "a" / "b"
        loggers = [DummyLogger(), pl.loggers.CSVLogger(folder, name=str(dim))]
        return trainer(max_steps=1, default_root_dir=tmp_path / "d", logger=loggers)

    options = {"dims": [4], "monitor": "val_acc", "baseline": 1.0}
    IntrinsicDimensionTuner(trainer_fn).find(judged(), train_loader(), val_loader(), **options)
    assert len(noted(tmp_path / "a" / "b")) == 1


def test_the_best_is_told_whatever_the_mode_and_whatever_failed(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert find(judged(dim4=math.nan, dim8=0.3, dim16=0.2), tmp_path, dims=[4, 8, 16]).suggestion() is None
        assert find(judged(dim4=math.nan), tmp_path, dims=[4]).suggestion() is None
        model = judged(dim4=0.09, dim8=0.08)
        model.told[sum(parameter.numel() for parameter in model.parameters())] = 0.01
        assert find(model, tmp_path / "min", mode="min").suggestion() is None
    for said in ("the best is 0.3 at dim 8", "no run gave a number", "the best is 0.08 at dim 8"):
        assert caplog.text.count(said) == 1
