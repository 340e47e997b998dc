"""Finished runs are recorded, and skipped by a search with the same settings only."""

import pytest
import pytorch_lightning as pl
from nets import Classifier, train_loader, trainer, val_loader
from pytorch_lightning.loggers.logger import DummyLogger
from small_searches import by_dimension, find, made, recorded, search, tuner

from lightning_sketch.subspace import IntrinsicDimensionTuner
from lightning_sketch.subspace._ledger import FOLDER


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
