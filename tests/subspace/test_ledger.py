"""Finished runs are recorded, and skipped by a search with the same settings only."""

import functools
import json
import os

import pytest
import pytorch_lightning as pl
import torch
from marks import slow
from nets import Classifier, digits, train_loader, trainer, val_loader
from pytorch_lightning.loggers.logger import DummyLogger
from small_searches import ByDimension, by_dimension, find, made, recorded, search, tuner

from lightning_sketch._files import CorruptFile
from lightning_sketch.subspace import IntrinsicDimensionTuner
from lightning_sketch.subspace._ledger import FOLDER, checked_checkpoint, hashed
from lightning_sketch.subspace._run_callbacks import description


@pytest.mark.slow
def test_a_restart_trains_only_what_is_not_recorded(tmp_path):
    model = made()
    searcher, made_for = tuner(tmp_path)
    first = find(searcher, model, dims=[4, 32])
    made_for.clear()
    again = find(tuner(tmp_path)[0], made(), dims=[4, 32, 128])
    assert again.results["value"][:2] == first.results["value"]
    assert [entry["run"]["dim"] for entry in recorded(tmp_path)] == [first.n, 4, 32, 128]
    other = find(tuner(tmp_path)[0], made(seed=1), dims=[4])  # other weights: no recorded run is used
    assert other.results["value"] != first.results["value"][:1]
    find(tuner(tmp_path, rates=20)[0], made(), dims=[4])
    assert len(recorded(tmp_path)) == 4 + 2 + 1


@pytest.mark.parametrize(
    "changed",
    [
        {"max_steps": 5},
        {"max_epochs": 1},
        {"limit_train_batches": 3},
        {"limit_val_batches": 1},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_runs_with_other_settings_of_the_trainer_are_done_again(tmp_path, changed):
    for options in ({}, {}, changed):
        search(made(), tmp_path, trainers={"gradient_clip_val": 0.5, **options}, dims=[4], baseline=0.9)
    assert len(recorded(tmp_path)) == 2


def test_runs_of_another_module_or_metric_or_of_other_loaders_are_done_again(tmp_path):
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
        (made(), {"train_dataloaders": train_loader(slice(0, 64))}),
    ]:
        search(model, tmp_path, **{**same, **options})
    assert len(recorded(tmp_path)) == 7


def test_searches_of_another_rule_start_end_kind_or_rate_are_done_again(tmp_path):
    """The target and the first and the last dimension are parts of the rule."""
    same = {"method": "doubling", "dims": [4, 8], "baseline": 1.0, "threshold": 1.0}
    for options, changed in [
        ({}, {}),
        ({}, {}),
        ({"threshold": 0.9}, {}),
        ({"dims": [2, 8]}, {}),
        ({"dims": [4, 16]}, {}),
        ({}, {"sketch": "qk"}),
        ({}, {"rates": 3}),
    ]:
        search(by_dimension(dim8=0.2, dim16=0.2), tmp_path, **{**same, **options}, tuner=changed)
    assert sum(entry["asked"][0] == "search" for entry in recorded(tmp_path)) == 6


def test_parameters_may_be_given_as_several_patterns_and_the_runs_are_found_again(tmp_path):
    """The folder does not exist before."""
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        search(made(), folder, tuner={"parameters": ("net.0.*", "net.2.bias")}, dims=[4], baseline=0.9)
    assert len(recorded(folder)) == 1


class Activation:
    """An object whose repr contains its address, like a function's."""


def test_runs_are_found_again_though_hyper_parameters_have_an_address(tmp_path):
    class Active(Classifier):
        def __init__(self, activation):
            super().__init__()
            self.save_hyperparameters("activation")

    for _ in range(2):
        pl.seed_everything(0, verbose=False)
        find(tuner(tmp_path, steps=2)[0], Active(Activation()), dims=[8], baseline=0.9)
    assert len(recorded(tmp_path)) == 1


def test_runs_are_recorded_where_a_logger_writes_in_a_folder_that_is_made(tmp_path):
    """It is the first logger that writes files."""

    def trainer_fn(dim):
        folder = tmp_path / "a" / "b"
        loggers = [DummyLogger(), pl.loggers.CSVLogger(folder, name=str(dim))]
        return trainer(max_steps=1, val_check_interval=1, default_root_dir=tmp_path / "d", logger=loggers)

    options = {"dims": [4], "monitor": "val_acc", "baseline": 1.0}
    IntrinsicDimensionTuner(trainer_fn, rates=1).find(by_dimension(), train_loader(), val_loader(), **options)
    assert len(recorded(tmp_path / "a" / "b")) == 1


def test_a_fast_dev_run_tries_all_and_records_nothing(tmp_path):
    def trainer_fn(dim):
        return trainer(fast_dev_run=True, default_root_dir=tmp_path)

    for method in ("grid", "doubling"):
        result = find(IntrinsicDimensionTuner(trainer_fn, rates=1), made(), method=method, dims=[4, 32], threshold=1.0)
        assert set(result.results["steps"]) <= {1, 2}  # a search may take twice the steps of full training
    assert not (tmp_path / FOLDER).exists()


def test_what_is_logged_of_runs(tmp_path, caplog):
    with caplog.at_level("INFO"):
        search(by_dimension(), tmp_path, dims=[4])
        search(by_dimension(), tmp_path, dims=[4])
    lines = [record.message for record in caplog.records if ", seed " in record.message]
    texts = ["full training, seed 0: val_acc 1, 4 steps, done", "dim 4, seed 0, rate 10: val_acc 1, 4 steps, done"]
    assert lines == [*texts, *(f"{line}, recorded before" for line in texts)]


class Unsaved(Classifier):
    """A module whose rate is no hyper-parameter."""

    def __init__(self, lr=3e-3, schedule=None):
        pl.LightningModule.__init__(self)
        self.net, self.rate, self.schedule, self.calls = self.network(16), lr, schedule, []

    def validation_step(self, batch):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
        return [optimizer], [] if self.schedule is None else [self.schedule(optimizer)]


def noisy(noise, rows=256):
    """Return a loader of digits with noise, in random order."""
    images, labels = digits(slice(0, rows))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images + noise * torch.randn(images.shape), labels), 32, shuffle=True
    )


def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def slower(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"lr": 3e-3}, {"lr": 1e-3}, "other optimizer"),
        slow({"schedule": halved}, {"schedule": slower}, "other optimizer"),
        ({"noise": 0.0}, {"noise": 5.0}, "other data"),
        slow({"rows": 256}, {"rows": 512}, "other data"),
        ({"seed": 0}, {"seed": 1}, "other initial weights; call seed_everything before"),
    ],
)
def test_what_is_not_found_again_is_said(tmp_path, caplog, one, other, said):
    """Neither the order of data nor the random state of the caller matters; rate and noise are no hyper-parameters."""

    def run(lr=3e-3, schedule=None, noise=0.0, rows=256, seed=0):
        pl.seed_everything(seed, verbose=False)
        loader = noisy(noise, rows)
        model = made(Unsaved, seed, lr=lr, schedule=schedule)
        torch.rand(seed + len(recorded(tmp_path)))
        search(model, tmp_path, steps=8, train_dataloaders=loader, dims=[4], baseline=0.9)

    with caplog.at_level("INFO"):
        run(**one)
        run(**one)
        assert len(recorded(tmp_path)) == 1
        assert "are not used" not in caplog.text
        run(**other)
    assert len(recorded(tmp_path)) == 2
    assert f"are not used: they have {said}" in caplog.text


def test_an_optimizer_of_ones_own_is_compared_by_its_class_and_rate(tmp_path):
    for make in (torch.optim.SGD, torch.optim.SGD, torch.optim.Adam):
        for rate in (0.1, 0.2):
            own = {"optimizer_fn": lambda params, make=make, rate=rate: make(params, lr=rate)}
            search(made(), tmp_path, tuner=own, dims=[4], baseline=0.9)
    assert len(recorded(tmp_path)) == 4


def test_hyper_parameters_are_not_written(tmp_path):
    """Not even into the checkpoint's name; only into the checkpoint itself, as Lightning does."""

    class Model(ByDimension):
        def __init__(self, api_key="sk-SECRET"):
            super().__init__()
            self.save_hyperparameters()

    search(made(Model), tmp_path, trainers={"enable_checkpointing": True})
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".ckpt"]
    assert len(files) > 4
    assert not any(b"SECRET" in path.read_bytes() for path in files)


FAULTS = {
    "empty": "",
    "cut": '{"kind": "fit", "dim"',
    "null": "null",
    "list": "[1]",
    "nothing in it": "{}",
    "a number too large": lambda text: text.replace('"dim": 4', '"dim": 1e999'),
    "a changed value": lambda text: text.replace('"value": 1.0', '"value": 0.0'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_record_is_named_and_left_alone(tmp_path, fault):
    search(by_dimension(), tmp_path, dims=[4], baseline=1.0)
    (path,) = tmp_path.glob(f"{FOLDER}/*/run.json")
    change = FAULTS[fault]
    path.write_text(change(path.read_text()) if callable(change) else change)
    damaged = path.read_bytes()
    with pytest.raises(CorruptFile, match=rf"{path}.*delete the folder {path.parent}, and the run is trained again"):
        search(by_dimension(), tmp_path, dims=[4], baseline=1.0)
    assert path.read_bytes() == damaged


def test_a_file_of_the_first_version_is_left_alone(tmp_path, caplog):
    old = tmp_path / "intrinsic_dimension.json"
    old.write_text('[{"settings": {"dim": 4}, "run": {"value": 1.0}}]')
    with caplog.at_level("INFO"):
        search(by_dimension(), tmp_path, dims=[4], baseline=1.0)
    assert len(recorded(tmp_path)) == 1
    assert old.exists()
    assert f"{old} is of an earlier version: its runs are not used; delete it" in caplog.text


class Stops(ByDimension):
    """A module that fails at some step, as if the process had been killed."""

    at = 12

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.at:
            raise KeyError("killed")
        return super().training_step(batch, batch_idx)


EVERY = {"enable_checkpointing": True, "val_check_interval": 8}


def stopped(folder):
    """Search until the training of one run fails after its first validation; return the path of the checkpoint."""
    with pytest.raises(KeyError, match="killed"):
        search(made(Stops), folder, steps=16, trainers=EVERY, dims=[4], baseline=1.0)
    (path,) = folder.glob(f"{FOLDER}/*/step=8.ckpt")
    return path


@pytest.mark.parametrize("fault", ["one byte", "cut", "gone", "another run's"])
def test_a_damaged_checkpoint_is_named_and_not_loaded(tmp_path, fault):
    """A file that torch loads without an error may have other weights."""
    path, other = stopped(tmp_path / "a"), stopped(tmp_path / "b")
    data = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    elif fault == "another run's":
        path.write_bytes(other.read_bytes())
        state = torch.load(path, weights_only=True)
        state["state_dict"]["w"] += 1
        torch.save(state, path)
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if fault == "one byte" else data[: len(data) // 2])
    with pytest.raises(CorruptFile, match=rf"{path} is not the checkpoint that was written there.*delete the folder"):
        search(made(Stops), tmp_path / "a", steps=16, trainers=EVERY, dims=[4], baseline=1.0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_is_stopped_goes_on_and_its_checkpoint_is_that_of_its_value(tmp_path, caplog, monkeypatch):
    """It is a checkpoint of Lightning's, which torch loads with weights_only=True, of the last validation."""
    stopped(tmp_path)
    monkeypatch.setattr(Stops, "at", 16)
    with caplog.at_level("INFO"):
        result = search(made(Stops), tmp_path, steps=16, trainers=EVERY, dims=[4], baseline=1.0)
    assert "dim 4, seed 0, rate 10: val_acc 1, 16 steps, done, resumed" in caplog.text
    (path,) = result.results["checkpoint"]
    assert checked_checkpoint(path).name == "step=16.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 16
    assert [file.name for file in checked_checkpoint(path).parent.glob("*.ckpt")] == ["step=16.ckpt"]


def test_checkpoints_of_the_user_are_in_a_folder_for_each_run(tmp_path):
    """Without loggers they would share one, and the names in it."""
    search(made(), tmp_path, trainers={"enable_checkpointing": True})
    saved = [path.parent for path in tmp_path.rglob("epoch=*.ckpt")]
    assert len(saved) == len(set(saved)) == 3


def test_without_checkpoints_that_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        result = search(by_dimension(), tmp_path, dims=[4], baseline=1.0)
    assert result.results["checkpoint"] == [None]
    assert "enable_checkpointing=False: a run that is killed will begin again" in caplog.text


def test_the_file_of_a_run_has_what_a_person_reads(tmp_path):
    search(by_dimension(), tmp_path, dims=[4], baseline=1.0)
    (path,) = tmp_path.glob(f"{FOLDER}/*/run.json")
    found = json.loads(path.read_text())
    assert found.pop("checksum")
    assert all(len(text) == 16 for text in found.pop("settings").values())
    expected = {"kind": "fit", "dim": 4, "seed": 0, "scale": 10.0, "value": 1.0, "best": 1.0, "steps": 4}
    assert found == {**expected, "validated": 4, "status": "done", "monitor": "val_acc"}
    assert sorted(os.listdir(path.parent)) == ["lock", "run.json"]


def test_schedules_that_differ_in_a_function_only_are_told_apart():
    """A scheduler's state leaves out the functions that it calls, as warm-ups of transformers are."""

    def described(warm_up):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
        rise = functools.partial(lambda step, of: min(1.0, step / of), of=warm_up)
        return description([optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, rise)])

    assert described(10) == described(10) != described(90)


def test_hyper_parameters_that_are_arrays_are_compared_whole():
    long = torch.zeros(5000)
    other = long.clone()
    other[2500] = 1e-6
    assert hashed({"a": {"weights": long}}) == hashed({"a": {"weights": long.clone()}})
    assert hashed({"a": {"weights": long}}) != hashed({"a": {"weights": other}})
