"""Callbacks and schedulers that monitor an eigenvalue find its key at every epoch, also where none is measured."""

import math

import pytest
import torch
from marks import slow
from models import Digits, fit, loader, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch import SpectrumMonitor

# Lightning warns that the resuming Trainers lack the ModelCheckpoint that made the checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

KEY = "hessian/lambda_max"


def monitor(**arguments):
    few = {"num_matvecs": 24, "dim": 48, "num_batches": 1, "top_k": 1, "bottom_k": 0, "tol": 0.05}
    return SpectrumMonitor(**{**few, **arguments})


class Seen(Callback):
    """Keep what other callbacks find at the end of each epoch."""

    def __init__(self, key=KEY):
        self.key, self.values = key, []

    def on_train_start(self, trainer, pl_module):
        self.start = float(trainer.callback_metrics[self.key])

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append(float(trainer.callback_metrics[self.key]))


def test_between_measurements_the_last_value_is_kept_and_before_the_first_it_is_nan(tmp_path):
    watch, seen = monitor(every_n_epochs=3), Seen()
    fit(tmp_path, watch, seen, max_epochs=7)
    first, second = (m.lambda_max for m in watch.history)
    assert seen.values == pytest.approx([math.nan, math.nan, first, first, first, second, second], nan_ok=True)


@pytest.mark.slow
def test_layers_have_their_keys_from_the_start(tmp_path):
    seen = Seen("hessian_layers/net.5/trace")
    fit(tmp_path, monitor(every_n_epochs=2, per_layer=True), seen)
    assert math.isnan(seen.values[0])
    assert math.isfinite(seen.values[1])


@pytest.mark.parametrize("mode", ["min", slow("max")])
def test_the_best_checkpoint_is_one_that_was_measured(tmp_path, mode):
    """NaN is worse than any number: its checkpoint is replaced by the first that has a number."""
    best = ModelCheckpoint(tmp_path, monitor=KEY, mode=mode, filename="{epoch}")
    watch = monitor(every_n_epochs=2)
    fit(tmp_path, watch, best, enable_checkpointing=True, max_epochs=6)
    wanted = {"min": min, "max": max}[mode](watch.history, key=lambda m: m.lambda_max)
    assert best.best_model_score == pytest.approx(wanted.lambda_max)
    assert best.best_model_path.endswith(f"epoch={wanted.epoch}.ckpt")
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


@pytest.mark.slow
def test_checkpoints_by_steps(tmp_path):
    """Their first is due before anything is measured."""
    best = ModelCheckpoint(tmp_path, monitor=KEY, mode="max", every_n_train_steps=3, filename="{step}")
    watch = monitor(every_n_train_steps=5)
    fit(tmp_path, watch, best, enable_checkpointing=True)
    assert best.best_model_score == pytest.approx(max(m.lambda_max for m in watch.history))


@pytest.mark.slow
def test_a_file_name_without_a_folder(tmp_path):
    best = ModelCheckpoint(
        tmp_path, monitor=KEY, filename=f"sharp={{{KEY}:.3f}}", auto_insert_metric_name=False, save_top_k=-1
    )
    watch = monitor()
    fit(tmp_path, watch, best, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"sharp={m.lambda_max:.3f}.ckpt" for m in watch.history)


def test_early_stopping_waits_for_its_patience_in_epochs(tmp_path):
    """A sharpness that never falls by 1e9 stops training `patience` epochs after the first measurement."""
    stopping = EarlyStopping(KEY, mode="min", min_delta=1e9, patience=4, check_finite=False)
    model = fit(tmp_path, monitor(every_n_epochs=2), stopping, max_epochs=9)
    assert model.trainer.current_epoch == 2 + 4
    stopping = EarlyStopping(KEY, mode="min", patience=2, check_finite=False)
    with pytest.raises(MisconfigurationException, match=r"patience=2\) counts epochs.*every_n_epochs=3.*set patience"):
        fit(tmp_path, monitor(every_n_epochs=3), stopping)


def test_every_key_is_checked_for_early_stopping(tmp_path):
    with pytest.raises(MisconfigurationException, match="check_finite=False"):
        fit(tmp_path, monitor(), EarlyStopping("hessian/loss", check_finite=True))


@pytest.mark.slow
def test_a_scheduler_that_waits_for_a_plateau(tmp_path):
    class Scheduled(Digits):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            never = {"threshold": 1e9, "threshold_mode": "abs"}  # better than the first number
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, factor=0.5, **never)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": KEY}}

    model = fit(tmp_path, monitor(every_n_epochs=2), model=Scheduled, max_epochs=4)
    # epoch 0 is bad (NaN), epoch 1 the best, 2 and 3 are bad
    assert model.optimizers().param_groups[0]["lr"] == 0.1
    model = fit(tmp_path, monitor(every_n_epochs=2), model=Scheduled, max_epochs=5)
    assert model.optimizers().param_groups[0]["lr"] == 0.05


@pytest.mark.slow
def test_a_resumed_fit_has_the_values_of_its_checkpoint(tmp_path):
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    watch = monitor(every_n_epochs=2)
    fit(tmp_path, watch, kept, data=loader(shuffle=False), enable_checkpointing=True, max_epochs=3)
    again, seen = monitor(every_n_epochs=2), Seen()
    run = trainer(tmp_path, again, seen, max_epochs=4)
    run.fit(Digits(), loader(shuffle=False), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert seen.start == pytest.approx(watch.history[0].lambda_max)
    assert seen.values == pytest.approx([again.history[1].lambda_max])
