"""The Trainers of a search: a new one for each run, and what their loggers and callbacks see."""

import gc
import weakref

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import train_loader, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import ByDimension, by_dimension, find, made, search

from lightning_sketch.subspace import IntrinsicDimensionTuner
from lightning_sketch.subspace._runner import FILE


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


@pytest.mark.slow
def test_trainers_and_modules_of_finished_runs_are_freed(tmp_path):
    alive = []

    def trainer_fn(dim):
        gc.collect()
        alive.append(sum(one() is not None for one in made_before))
        made_before.append(weakref.ref(run := trainer(max_steps=2, default_root_dir=tmp_path)))
        return run

    made_before: list[weakref.ref] = []
    find(IntrinsicDimensionTuner(trainer_fn), made(), dims=[4, 8, 16, 32, 64])
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
    """They see neither the validation before training nor one that only measures the value at the end."""
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
    result = IntrinsicDimensionTuner(trainer_fn).find(model, train_loader(), val_loader(), dims=[4], monitor="val_acc")
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
        return trainer(Watch(), max_steps=4, **options)

    result = find(IntrinsicDimensionTuner(trainer_fn), made(), dims=[8], monitor="val_loss", mode="min")
    assert seen == ["fit", "fit"]
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.ckpt")}
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
    assert seen == [True] * 16


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
    assert (starts, model.validated) == ([0, 0, 0], 0)


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
