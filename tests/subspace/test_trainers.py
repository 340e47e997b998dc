"""The Trainers of a search: a new one for each run, and what their loggers and callbacks see."""

import gc
import weakref
from collections import UserList
from collections.abc import Mapping

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import train_loader, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import ByDimension, by_dimension, find, made, search

from lightning_sketch.subspace import IntrinsicDimensionTuner
from lightning_sketch.subspace._ledger import FOLDER


class Configuration(Mapping):
    """A mapping that is no dict, with sequences that are no lists, as Hydra's are."""

    def __init__(self, values):
        self.values_of = values

    def __getitem__(self, name):
        value = self.values_of[name]
        return UserList(value) if isinstance(value, list) else value

    def __iter__(self):
        return iter(self.values_of)

    def __len__(self):
        return len(self.values_of)


@pytest.mark.parametrize("kind", [dict, Configuration])
def test_a_mapping_of_arguments_makes_trainers(tmp_path, kind):
    class Once(pl.Callback):
        fits = 0

        def on_fit_start(self, trainer, pl_module):
            self.fits += 1
            assert self.fits == 1

    once = Once()
    arguments = {
        "max_steps": 2,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "callbacks": [once],
        "logger": lambda dim: pl.loggers.CSVLogger(tmp_path, name=f"dim-{dim}"),
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    result = find(IntrinsicDimensionTuner(kind(arguments), rates=1), made(), dims=[4, 32])
    assert once.fits == 0
    for dim in (result.n, 4, 32):
        lines = (tmp_path / f"dim-{dim}" / "version_0" / "metrics.csv").read_text().splitlines()
        last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
        assert float(last["subspace/dim"]) == dim
        assert float(last["val_acc"]) > 0
    assert (tmp_path / FOLDER).exists()


@pytest.mark.slow
def test_trainers_and_modules_of_finished_runs_are_freed(tmp_path, request):
    """At each training, since Python's own collections may come after the memory is needed."""
    alive = []
    request.addfinalizer(gc.enable)
    gc.disable()

    def trainer_fn(dim):
        alive.append(sum(one() is not None for one in made_before))
        run = trainer(max_steps=2, val_check_interval=2, default_root_dir=tmp_path)
        made_before.append(weakref.ref(run))
        return run

    made_before: list[weakref.ref] = []
    find(IntrinsicDimensionTuner(trainer_fn, rates=1), made(), dims=[4, 8, 16, 32, 64])
    assert max(alive) <= 2


def test_a_trainer_that_has_fitted_something_else_is_refused():
    used = trainer(max_steps=1)
    used.fit(made(), train_loader())
    trainers = iter([used, trainer(), trainer()])
    with pytest.raises(MisconfigurationException, match="Trainer that is already in use"):
        IntrinsicDimensionTuner(lambda dim: next(trainers)).find(
            made(), train_loader(), val_loader(), dims=[4], monitor="val_acc"
        )


def test_loggers_see_training_and_one_last_line(tmp_path):
    """They do not see the validation before training."""
    written = []

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            written.append((self.name, step, *sorted(set(metrics) - {"epoch", "train_loss"})))
            super().log_metrics(metrics, step)

    class Model(ByDimension):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    def trainer_fn(dim):
        options = {"val_check_interval": 8, "max_steps": 12, "default_root_dir": tmp_path}
        return trainer(logger=Logger(tmp_path, name=f"dim {dim}"), **options, check_val_every_n_epoch=None)

    model = made(Model)
    result = IntrinsicDimensionTuner(trainer_fn, rates=1).find(
        model, train_loader(), val_loader(), dims=[4], monitor="val_acc"
    )
    assert [line for line in written if line[2:]] == [
        (f"dim {dim}", *line) for dim in (result.n, 4) for line in ((7, "val_acc"), (12, "subspace/dim", "val_acc"))
    ]


def test_callbacks_see_fits_alone(tmp_path):
    """In the validation before training, a checkpoint callback would choose its folder without the loggers."""
    seen = []

    class Watch(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(stage)

    def trainer_fn(dim):
        options = {"enable_checkpointing": True, "logger": pl.loggers.CSVLogger(tmp_path, name=f"dim-{dim}")}
        return trainer(Watch(), max_steps=8, **options)

    result = find(IntrinsicDimensionTuner(trainer_fn, rates=1), made(), dims=[8], monitor="val_loss", mode="min")
    assert seen == ["fit", "fit"]
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("epoch=*.ckpt")}
    assert folders == {"dim-8", f"dim-{result.n}"}


def test_a_callback_of_the_user_sees_the_current_w_after_validation(tmp_path):
    """A search validates the mean of w, and restores w before other callbacks may save it."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.w = pl_module.coordinates().detach().clone()

        def on_validation_end(self, trainer, pl_module):
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                seen.append(torch.equal(pl_module.coordinates()[:4], self.w[:4]))

    model = by_dimension(dim4=0.2)
    search(model, tmp_path, steps=32, dims=[4], callbacks=lambda: [Watch()], method="doubling", baseline=1.0)
    assert seen[:16] == [True] * 16


def test_the_validation_before_training_leaves_no_trace(tmp_path):
    """It changes neither the given model nor its copies."""
    starts = []

    class Model(ByDimension):
        def __init__(self):
            super().__init__()
            self.validated = 0

        def on_fit_start(self):
            starts.append(self.validated)

        def validation_step(self, batch, batch_idx):
            self.validated += 1
            super().validation_step(batch, batch_idx)

    model = made(Model)
    search(model, tmp_path)
    assert (starts, model.validated) == ([0, 0, 0, 0], 0)  # the first is the fit of no steps


@pytest.mark.slow
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
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": lambda dim: pl.loggers.WandbLogger(project="digits", save_dir=tmp_path, offline=True),
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    result = find(IntrinsicDimensionTuner(arguments, rates=1), made(), dims=[4, 32])
    assert [name for name, _, _ in ended] == ["dim 1210", "dim 4", "dim 32", "result"]
    del ended[3]
    assert len({group for _, group, _ in ended}) == 1
    for (_, _, summary), dim in zip(ended, (result.n, 4, 32), strict=True):
        assert summary["subspace/dim"] == dim
    assert [summary["val_acc"] for _, _, summary in ended[1:]] == pytest.approx(result.results["value"])


@pytest.mark.slow
@pytest.mark.parametrize("agent", [False, True])
@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")
def test_an_active_wandb_run_is_left_alone(tmp_path, monkeypatch, agent):
    """Each run of the search is another one; an agent gives its run's id by a variable of the environment."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if agent:
        monkeypatch.setenv("WANDB_RUN_ID", "ofagent1")
    ended = []
    finish = wandb.Run.finish

    def finished(run, *args, **kwargs):
        ended.append((run.id, run.project, dict(run.summary)))
        return finish(run, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "finish", finished)
    with wandb.init(project="outer", dir=tmp_path) as outer:

        def trainer_fn(dim):
            logger = pl.loggers.WandbLogger(project="digits", save_dir=tmp_path, offline=True)
            return trainer(max_steps=2, val_check_interval=2, default_root_dir=tmp_path, logger=logger)

        find(IntrinsicDimensionTuner(trainer_fn, rates=1), made(), dims=[4])
        assert wandb.run is outer
        assert "val_acc" not in dict(outer.summary)
        outer.summary["mine"] = 1.0
        assert len({outer.id, *(name for name, _, _ in ended)}) == 4
        assert [project for _, project, _ in ended] == ["digits"] * 3
        assert [summary.get("subspace/dim") for _, _, summary in ended] == [1210, 4, None]


@pytest.mark.slow
def test_a_wandb_run_that_a_logger_is_given_is_not_finished(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runs = []

    def trainer_fn(dim):
        runs.append(wandb.init(project="mine", dir=tmp_path, mode="offline", reinit="create_new"))
        logger = pl.loggers.WandbLogger(experiment=runs[-1], save_dir=tmp_path)
        return trainer(max_steps=2, val_check_interval=2, default_root_dir=tmp_path, logger=logger)

    find(IntrinsicDimensionTuner(trainer_fn, rates=1), made(), dims=[4])
    for run in runs:
        run.log({"mine": 1})  # an error if it is finished
        run.finish()


def test_lightning_says_once_what_it_says_of_each_trainer(tmp_path, caplog):
    """What others log, and warnings, are not dropped; nor is anything after the search."""

    class Talks(ByDimension):
        def on_train_start(self):
            pl.utilities.rank_zero_info("mine")
            summaries.append(sum("ModelSummary" in type(one).__name__ for one in self.trainer.callbacks))

    summaries: list[int] = []
    options = {"dims": [4, 8, 16], "trainers": {"enable_model_summary": True}}
    with caplog.at_level("INFO"):
        search(made(Talks), tmp_path, **options)
        texts = [record.getMessage() for record in caplog.records]
        trainer()
    once = [text for text in texts if text.startswith(("GPU available", "`Trainer.fit` stopped", "💡"))]
    assert len(once) == len(set(once)) > 1
    assert texts.count("mine") == 4
    assert summaries == [1, 0, 0, 0]
    assert sum(text.startswith(("full training", "dim ")) for text in texts) == 4
    assert any(record.getMessage().startswith("GPU available") for record in caplog.records[len(texts) :])
