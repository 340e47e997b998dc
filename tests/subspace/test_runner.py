"""One run of a search: its weights, seed, data, learning rate, optimizer and value, and how it may fail."""

import math
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from marks import slow
from nets import Classifier, Late, digits, train_loader, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import ByDimension, by_dimension, find, made, recorded, search, tuner
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lightning_sketch.subspace import IntrinsicDimensionTuner


@pytest.mark.slow
def test_runs_are_the_same_alone_or_in_a_row(tmp_path):
    """Each run has its own seed: earlier runs do not matter, and the caller's random state is not changed."""
    first = find(tuner(tmp_path / "a")[0], made(), dims=[4, 32], baseline=0.9)
    model, loader, state = made(), train_loader(shuffle=True), torch.get_rng_state()
    second = tuner(tmp_path / "b")[0].find(
        model, loader, val_loader(), dims=[32], baseline=0.9, monitor="val_acc", threshold=0.7
    )
    assert first.results["value"][1] == second.results["value"][0]
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_a_run_depend_on_its_seed_only(tmp_path, untyped):
    """Python's, numpy's and torch's random numbers are seeded, whatever the caller drew before, and restored.

    Without the checker of types, which draws from Python's, as a part of it always does: its state is not compared.
    """
    drawn = []

    class Model(ByDimension):
        def training_step(self, batch, batch_idx):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return super().training_step(batch, batch_idx)

    for before in (1, 2):
        model = made(Model)
        pl.seed_everything(before, verbose=False)
        here = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        search(model, tmp_path / str(before), steps=1, dims=[4], seeds=2, baseline=1.0)
        assert here == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert drawn[:2] == drawn[2:]
    assert all(one != other for one, other in zip(*drawn[:2], strict=True))


def test_a_function_makes_the_model_and_all_start_alike(tmp_path):
    starts = []

    class Seen(Classifier):
        def on_train_start(self):
            starts.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    pl.seed_everything(0, verbose=False)
    find(tuner(tmp_path, steps=2)[0], Seen, dims=[4, 32], monitor="val_loss", mode="min")
    assert len(starts) == 3
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_a_module_may_save_a_part_of_itself(tmp_path):
    """Replicas copy all parameters, not only those that are saved."""
    starts = []

    class Adapter(Classifier):
        strict_loading = False

        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {name: tensor for name, tensor in state.items() if "net.2" in name}

        def on_train_start(self):
            starts.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    find(tuner(tmp_path, steps=2)[0], lambda: Adapter(), dims=[4], baseline=0.9)
    find(tuner(tmp_path, steps=2)[0], lambda: Adapter(), dims=[4, 8], baseline=0.9)
    assert len(starts) == 3
    assert torch.equal(starts[1], starts[2])
    assert not torch.equal(starts[0], starts[1])


class Unlogged(Classifier):
    """Lightning's `log` cannot be compiled."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "model",
    [Late, lambda: Late(), slow(lambda: torch.compile(Unlogged(), backend="eager"))],
    ids=["late", "made", "compiled"],
)
def test_modules_that_are_made_late_or_compiled(tmp_path, model):
    pl.seed_everything(0, verbose=False)
    result = find(tuner(tmp_path, steps=4)[0], model() if model is Late else model, dims=[4, 32], baseline=0.9)
    assert result.n == 64 * 16 + 16 + 16 * 10 + 10
    assert result.results["status"] == ["done", "done"]


def test_a_module_that_is_compiled_in_place_is_refused(tmp_path, untyped):
    model = pl.utilities.compile.from_compiled(torch.compile(made(), backend="eager"))
    with pytest.raises(TypeError, match="compiled module cannot be copied"):
        search(model, tmp_path)


def test_a_module_that_shards_itself_where_there_is_a_trainer(tmp_path):
    """Its parameters exist already, so `configure_model` is called by Lightning only."""

    class Model(ByDimension):
        def configure_model(self):
            assert self.trainer.world_size == 1

    result = search(made(Model), tmp_path, dims=[4], baseline=1.0)
    assert result.results["status"] == ["done"]


def test_data_of_a_data_module(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    result = search(by_dimension(), tmp_path, datamodule=Data())
    assert result.results["status"] == ["done", "done"]


class Documented(pl.LightningDataModule):
    """The data module of Lightning's documentation, which splits at random whenever it is set up."""

    stages: tuple[str, ...] = ("fit", "validate")

    def setup(self, stage):
        if stage in self.stages:
            both = torch.utils.data.TensorDataset(*digits(slice(0, 400)))
            self.train, self.val = torch.utils.data.random_split(both, [256, 144])
            seen.append((stage, sorted(self.val.indices)))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=32)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, batch_size=144)


class Gated(Documented):
    """The other one, which has data in a fit only."""

    stages = ("fit",)


seen: list = []


@pytest.mark.parametrize("kind", [Documented, Gated])
def test_data_modules_of_the_documentation(tmp_path, kind):
    """Each fit sets them up once, and nothing else does: no validation sees examples of another split than training.

    The random numbers of a run are those of its seed, so that all runs of a seed have the same split, as has the metric
    before training.
    """
    seen.clear()
    result = search(by_dimension(), tmp_path, datamodule=kind(), steps=12, trainers={"val_check_interval": 8})
    assert result.results["status"] == ["done", "done"]
    assert [stage for stage, _ in seen] == ["fit"] * 4
    assert len({str(indices) for _, indices in seen}) == 1


def test_a_module_may_load_its_data_in_setup(tmp_path):
    class Model(ByDimension):
        def setup(self, stage):
            assert stage == "fit"
            self.data = train_loader(), val_loader()

        def train_dataloader(self):
            return self.data[0]

        def val_dataloader(self):
            return self.data[1]

    result = search(made(Model), tmp_path, train_dataloaders=None, val_dataloaders=None)
    assert result.results["status"] == ["done", "done"]


def test_a_module_may_log_nothing_in_a_sanity_check(tmp_path):
    class Model(ByDimension):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    assert search(made(Model), tmp_path).start == pytest.approx(0.1)


def test_data_without_a_length(tmp_path):
    """The loader of a stream has no len."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(train_loader().dataset)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=32)
    result = search(by_dimension(), tmp_path, train_dataloaders=loader, dims=[4], baseline=1.0)
    assert result.results["status"] == ["done"]


def test_an_optimizer_of_ones_own_in_every_method(tmp_path):
    """The module's own optimizer would be Adam, at another rate."""
    rates = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            rates.append((type(trainer.optimizers[0]).__name__, trainer.optimizers[0].param_groups[0]["lr"]))

    for method in ("grid", "doubling"):
        options = {
            "tuner": {"optimizer_fn": lambda params: torch.optim.SGD(params, lr=0.5)},
            "callbacks": lambda: [Watch()],
        }
        search(by_dimension(), tmp_path / method, method=method, baseline=1.0, dims=[4], **options)
    assert set(rates) == {("SGD", 0.5)}


def test_the_sketch_that_is_asked_for(tmp_path):
    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert pl_module.directions.spec()["kind"] == "qk"

    search(by_dimension(), tmp_path, tuner={"sketch": "qk"}, callbacks=lambda: [Watch()], baseline=1.0)
    assert len(recorded(tmp_path)) == 2


def scheduled(schedule, rate=3e-3):
    class Model(ByDimension):
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
    model.values = {8: 0.2}
    search(model, tmp_path, callbacks=lambda: [Watch()], method="doubling", baseline=1.0)
    assert rates[:8] == [pytest.approx(3e-3)] * 8


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
        lambda dim: trainer(Watch(), max_steps=8, default_root_dir=tmp_path), optimizer_fn=optimizer_fn, rates=1
    )
    find(searcher, made(), method="doubling", baseline=1.0, threshold=1.0)
    assert set(rates[:16]) == {0.05}


def test_the_value_of_a_run_is_that_of_its_last_validation_of_which_the_step_is_said(tmp_path, caplog):
    """Of twelve steps with a validation every eight, nothing is validated after the eighth."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                seen.append(pl_module.materialize())

    def trainer_fn(dim):
        options = {"val_check_interval": 8, "check_val_every_n_epoch": None}
        return trainer(Watch(), max_steps=12, default_root_dir=tmp_path, **options)

    with caplog.at_level("INFO"):
        result = find(IntrinsicDimensionTuner(trainer_fn, rates=1), made(), dims=[64], baseline=0.9)
    at_eight = trainer().validate(seen[0], val_loader(), verbose=False)[0]["val_acc"]
    assert result.results["value"] == [pytest.approx(at_eight)]
    (run,) = (entry["run"] for entry in recorded(tmp_path))
    assert (run["validated"], run["steps"]) == (8, 12)
    assert f"val_acc {at_eight:.4g} at step 8, 12 steps, done" in caplog.text


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"max_steps": 7}, True),
        ({"max_steps": 8}, False),
        ({"max_steps": 20, "check_val_every_n_epoch": 3}, True),
        ({"max_steps": 24, "check_val_every_n_epoch": 3}, False),
        ({"max_epochs": 2, "max_steps": -1, "check_val_every_n_epoch": 3}, True),
        ({"max_steps": 5, "val_check_interval": 6, "check_val_every_n_epoch": None}, True),
        ({"max_steps": 1, "val_check_interval": 0.25}, True),
        ({"max_steps": 2, "val_check_interval": 0.25}, False),
        ({"max_steps": 1, "val_check_interval": 2, "accumulate_grad_batches": 2}, False),
    ],
)
def test_training_without_validation_is_refused_before_it_begins(tmp_path, options, refused):
    """There are eight batches in an epoch."""
    began = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            began.append(True)

    searcher = IntrinsicDimensionTuner(lambda dim: trainer(Watch(), default_root_dir=tmp_path, **options), rates=1)
    if refused:
        with pytest.raises(MisconfigurationException, match=r"end before its first validation.*val_check_interval"):
            find(searcher, made(), dims=[4], baseline=0.9)
    else:
        find(searcher, made(), dims=[4], baseline=0.9)
    assert len(began) == (not refused)


def test_a_stream_that_ends_without_validation_is_refused_after_it(tmp_path):
    """Its length is not known before."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(train_loader().dataset)

    options = {"trainers": {"check_val_every_n_epoch": 1, "val_check_interval": 1.0}, "dims": [4], "baseline": 1.0}
    loader = torch.utils.data.DataLoader(Stream(), batch_size=32)
    with pytest.raises(MisconfigurationException, match=r"dim 4, seed 0.*ended after 4 steps without a validation"):
        search(by_dimension(), tmp_path, train_dataloaders=loader, **options)


def test_the_best_validation_of_a_run_is_recorded(tmp_path):
    """The first value is measured before training."""

    class Rises(Classifier):
        def validation_step(self, batch):
            self.log("val_acc", [0.1, 0.5, 0.9, 0.7][self.trainer.global_step // 4])

    search(made(Rises), tmp_path, steps=12, trainers={"val_check_interval": 4}, dims=[4], baseline=0.75, mode="max")
    search(made(Rises), tmp_path, steps=12, trainers={"val_check_interval": 4}, dims=[4], baseline=0.05, mode="min")
    values = [(run["value"], run["best"]) for run in (entry["run"] for entry in recorded(tmp_path))]
    assert values == [pytest.approx((0.7, 0.9)), pytest.approx((0.7, 0.5))]


def test_a_run_that_ends_with_validation_is_not_validated_again(tmp_path):
    counts = []

    class Watch(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step:
                counts.append((trainer.state.fn, trainer.global_step))

    every = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    search(by_dimension(), tmp_path, steps=8, dims=[4], baseline=1.0, trainers=every, callbacks=lambda: [Watch()])
    assert counts == [("fit", 4), ("fit", 8)]


def test_a_callback_may_log_the_metric(tmp_path):
    class Logs(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("seen", float(trainer.global_step) + 1)

    searcher = IntrinsicDimensionTuner(lambda dim: trainer(Logs(), max_steps=8, default_root_dir=tmp_path), rates=1)
    result = find(searcher, made(), monitor="seen", dims=[4], threshold=0.9)
    assert (result.start, result.baseline, result.results["value"]) == (1.0, 9.0, [9.0])


class Diverges(Classifier):
    """A module whose loss is NaN at dim 4, and that runs out of memory at dim 32."""

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


def test_what_fails_is_recorded_and_the_search_goes_on(tmp_path):
    searcher = IntrinsicDimensionTuner(lambda dim: trainer(Dim(dim), max_steps=8, default_root_dir=tmp_path), rates=1)
    result = find(searcher, Diverges(), dims=[4, 32, 128], baseline=0.5)
    assert result.results["status"] == ["nan", "out of memory", "done"]
    assert [math.isnan(value) for value in result.results["value"]] == [True, True, False]
    assert result.suggestion() == 128
    assert result.plot().axes[0].get_xscale() == "log"


class Fails(ByDimension):
    """A module that runs out of memory from some step on."""

    at = 0
    error: BaseException = MemoryError()

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= self.at:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
@pytest.mark.parametrize(("at", "value"), [(0, math.nan), (3, 0.2)])
def test_a_search_without_memory_says_how_far_it_came(tmp_path, error, at, value):
    model = made(type("Model", (Fails,), {"at": at, "error": error, "values": {8: 0.2}}))
    result = search(model, tmp_path, steps=16, method="doubling", baseline=1.0)
    assert result.results["status"][0] == "out of memory"
    assert result.results["value"][0] == pytest.approx(value, nan_ok=True)
    assert result.suggestion() is None


def test_a_run_without_memory_leaves_the_callers_random_state_alone(tmp_path):
    model, state = made(Fails), torch.get_rng_state()
    assert search(model, tmp_path, dims=[4], baseline=1.0).results["status"] == ["out of memory"]
    assert torch.equal(torch.get_rng_state(), state)


def test_other_errors_are_the_users(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        find(tuner(tmp_path)[0], Broken())
