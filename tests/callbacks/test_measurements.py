"""A measurement has the loss, learning rate and data of training; its failure costs no training run and no result."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, fit, loader, trainer
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import SpectrumMonitor
from lightning_sketch.callbacks._optimizers import stability


def monitor(**arguments):
    return SpectrumMonitor(**{"num_matvecs": 8, "dim": 64, "num_batches": 1, "top_k": 2, "bottom_k": 1, **arguments})


class Calls(Digits):
    def forward(self, images):
        return self.net(images)


def test_a_gauss_newton_matrix_of_another_loss_is_refused_at_once_at_a_head_of_zeros(tmp_path):
    """With zeros any temperature gives the same loss, but another gradient."""

    class Tempered(Calls):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[-1].weight)
            nn.init.zeros_(self.net[-1].bias)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]) / 5, batch[1])

    with pytest.raises(ValueError, match=r"would be of a loss of .* with a gradient that differs"):
        fit(tmp_path, monitor(curvature="ggn"), model=Tempered, max_epochs=1)


def test_a_gauss_newton_matrix_of_a_loss_that_changes_later_is_not_measured(tmp_path):
    """The temperature is 1 when training starts, and no longer when the curvature is measured."""

    class Tempered(Calls):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]) / (5 if self.global_step else 1), batch[1])

    watch = monitor(curvature="ggn")
    with pytest.warns(UserWarning, match=r"no measurement at step 8: the Gauss-Newton matrix would be of a loss of"):
        model = fit(tmp_path, watch, model=Tempered, max_epochs=1)
    assert not watch.history
    assert math.isnan(model.trainer.callback_metrics["ggn/lambda_max"])


def test_gauss_newton_in_half_precision(tmp_path):
    watch = monitor(curvature="ggn")
    fit(tmp_path, watch, model=Calls, precision="bf16-true", max_epochs=1)
    assert watch.history[0].lambda_max > 0


def test_the_initial_weights_are_measured_although_a_buffer_is_registered_later(tmp_path):
    class Registers(Digits):
        def on_train_batch_start(self, batch, batch_idx):
            if "seen" not in dict(self.named_buffers()):
                self.register_buffer("seen", torch.zeros(1))

    watch = monitor(at_start=True, num_batches=2)
    fit(tmp_path, watch, model=Registers, max_epochs=1)
    assert [m.step for m in watch.history] == [0, 8]


@pytest.mark.slow
def test_learning_rates_are_those_of_their_steps(tmp_path):
    """Under a warm-up by steps the start is measured four batches later; a decay by epochs precedes the measurement."""

    class Scheduled(Digits):
        interval, factor = "step", staticmethod(lambda step: 1 + step)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
            return [optimizer], [{"scheduler": schedule, "interval": self.interval}]

    watch = monitor(at_start=True, num_batches=4)
    fit(tmp_path, watch, model=Scheduled, max_epochs=1)
    assert [m.lr for m in watch.history] == pytest.approx([0.01, 0.08])
    Scheduled.interval, watch = "epoch", monitor(at_start=True, num_batches=4)
    fit(tmp_path, watch, model=Scheduled, max_epochs=2)
    assert [m.lr for m in watch.history] == pytest.approx([0.01, 0.01, 0.02])


@pytest.mark.parametrize(
    ("options", "below"),
    [
        ({}, 20),
        ({"momentum": 0.9}, 38),
        ({"momentum": 0.9, "nesterov": True}, 38 / 2.8),
        ({"momentum": 0.9, "dampening": 0.9}, 380),
        ({"maximize": True}, math.nan),
    ],
)
def test_stability_is_that_of_a_parabola(tmp_path, options, below):
    """Just below the edge gradient descent on a parabola of that curvature shrinks, just above it grows."""

    def size(curvature):
        x = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.1, **options)
        for _ in range(3000):
            optimizer.zero_grad()
            (curvature / 2 * x**2).backward()
            optimizer.step()
            if not 1e-100 < x.detach().abs() < 1e100:
                break
        return float(x.detach().abs())

    class Optimized(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, **options)

    found = stability(fit(tmp_path, model=Optimized, max_steps=1, max_epochs=-1).trainer)
    assert found.lr == 0.1
    assert found.edge == pytest.approx(below, nan_ok=True)
    if math.isfinite(below):
        assert size(0.99 * below) < 1 < size(1.01 * below)


def test_files_that_cannot_be_written_do_not_end_training(tmp_path):
    """A file is where the folder of the spectra should be."""

    class Blocked(Digits):
        def on_train_start(self):
            folder = Path(self.logger.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hessian_spectra").touch()

    with pytest.warns(UserWarning, match="hessian: no pictures or files of CSVLogger at step 8: .*hessian_spectra"):
        model = fit(tmp_path, monitor(), model=Blocked, logger=CSVLogger(tmp_path), max_epochs=1)
    assert model.trainer.global_step == 8
    with pytest.raises(OSError, match="hessian_spectra"):
        fit(tmp_path, monitor(on_error="raise"), model=Blocked, logger=CSVLogger(tmp_path), max_epochs=1)


def test_layers_of_a_failed_measurement_are_nan_too(tmp_path):
    class Diverging(Digits):
        def on_train_batch_end(self, *args):
            if self.global_step == 16:
                self.net[-1].weight.data.fill_(math.nan)

    with pytest.warns(UserWarning, match="no measurement at step 16"):
        metrics = fit(tmp_path, monitor(per_layer=["net.0.*"]), model=Diverging).trainer.callback_metrics
    assert math.isnan(metrics["hessian_layers/net.0.*/lambda_max"])


def test_unknown_layers_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"no trainable parameter matches \['nett.*the names start with net.0.weight"):
        fit(tmp_path, monitor(per_layer=["nett.*"]))


def test_a_validation_after_a_fit_replaces_nothing(tmp_path):
    class Model(Digits):
        pass

    watch, logger = monitor(stages=["fit", "validate"]), CSVLogger(tmp_path)
    model = fit(tmp_path, watch, model=Model, logger=logger, max_epochs=1)
    Model.validation_step = lambda self, batch, batch_idx: None
    for _ in range(2):
        model.trainer.validate(model, DataLoader(dataset(64), batch_size=64), verbose=False)
    fitted, *validated = watch.history
    assert (fitted.stage, *(m.stage for m in validated)) == ("fit", "validate", "validate")
    for m in validated:  # on other data, so it does not continue the curve of the fit
        assert m.loss != fitted.loss
        assert math.isnan(m.overlap_with_last)
    names = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert len(names) == 3


def test_a_second_fit_of_one_trainer_on_other_data_warns(tmp_path):
    watch = monitor()
    run = trainer(tmp_path, watch, max_epochs=1)
    model = Digits()
    run.fit(model, loader(shuffle=False))
    run.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="the first batches differ from those of the last fit"):
        run.fit(model, loader(shuffle=False, batch_size=16))


def test_hooks_keep_their_order(tmp_path):
    """A hook of W&B is removed during a measurement, and put back in its place."""
    from lightning_sketch.autodiff.preserve_state import preserve_state

    module, called = nn.Linear(2, 2), []

    def watching(*args):
        called.append("wandb")

    watching.__module__ = "wandb.sdk"
    module.register_forward_hook(watching)
    module.register_forward_hook(lambda *args: called.append("user"))
    with preserve_state(module):
        module(torch.ones(1, 2))
    module(torch.ones(1, 2))
    assert called == ["user", "wandb", "user"]
