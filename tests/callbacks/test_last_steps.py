"""The verdict is of the step that was taken: its rate, its clipping, and batches that it can be judged on."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import Hessian, SpectrumMonitor, spectrum

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))


class Model(pl.LightningModule):
    def __init__(self, optimizer=torch.optim.SGD, lr=0.1, schedule=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.make, self.lr, self.schedule = optimizer, lr, schedule

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]).squeeze(1) - batch[0].sum(1)).square().mean()

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=self.lr)
        if not self.schedule:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def fit(model, monitor, batch_size=32, epochs=2, **options):
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[monitor], **quiet, **options)
    trainer.fit(model, DataLoader(TensorDataset(X), batch_size))
    return trainer


def test_a_schedule_may_end_at_zero():
    """The rate is that of the last step, not that which the scheduler sets after it."""
    monitor = SpectrumMonitor(preconditioner="optimizer", top_k=2, bottom_k=0, on_error="raise")
    fit(Model(torch.optim.Adam, 1e-2, schedule=True), monitor)
    first, last = monitor.history
    assert (first.lr, last.lr) == pytest.approx((1e-2, 5e-3))
    assert math.isfinite(last.stable_below)


def test_clipped_steps_have_a_larger_edge():
    """By a factor c, as if the learning rate were c times as large: the norm is of all gradients together."""
    model = Model(lr=1e-6)  # the weights hardly move, so that the gradient is that of the start
    loss = model.training_step((X,), 0)
    size = float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm())
    plain, clipped, free = (SpectrumMonitor(top_k=1, bottom_k=0) for _ in range(3))
    fit(Model(lr=1e-6), plain, epochs=1)
    fit(Model(lr=1e-6), clipped, epochs=1, gradient_clip_val=size / 4)
    fit(Model(lr=1e-6), free, epochs=1, gradient_clip_val=size * 4)
    assert clipped.history[0].stable_below == pytest.approx(4 * plain.history[0].stable_below, rel=1e-3)
    assert "clipped to 0.25" in clipped.history[0].verdict
    assert free.history[0].stable_below == plain.history[0].stable_below
    by_value = SpectrumMonitor(top_k=1, bottom_k=0)
    fit(Model(lr=1e-6), by_value, epochs=1, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert math.isnan(by_value.history[0].stable_below)
    assert "gradients are clipped by value" in by_value.history[0].verdict


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"curvature": "fisher"}, "the empirical Fisher matrix is not the curvature"),
        ({"method": "projected", "dim": 256}, "eigenvalues of a projected matrix are approximate"),
    ],
)
def test_matrices_without_an_edge_say_so(options, reason):
    monitor = SpectrumMonitor(top_k=1, bottom_k=0, **options)
    fit(Model(), monitor, epochs=1)
    assert reason in monitor.history[0].verdict
    assert math.isnan(monitor.history[0].stable_below)


def test_parameters_alone_are_named():
    monitor = SpectrumMonitor(top_k=1, bottom_k=0, parameters="net.0.*")
    fit(Model(), monitor, epochs=1)
    assert "(SGD, parameters 'net.0.*' alone, lr 0.1)" in monitor.history[0].verdict


def test_a_measurement_that_came_due_too_early_is_made_up_for():
    """An epoch of two batches, where four are to be kept, with a measurement after each step."""
    monitor = SpectrumMonitor(top_k=1, bottom_k=0, num_batches=4, every_n_train_steps=1)
    fit(Model(), monitor, batch_size=16, epochs=1)
    assert [m.step for m in monitor.history] == [2]


def test_a_loss_that_fails_far_away_does_not_lose_the_spectrum():
    """The line search tries steps many times as long."""
    start = Model()

    def loss_fn(module, batch):
        moved = (module.net[0].weight - start.net[0].weight).norm()
        if moved > 1e-3:
            raise RuntimeError("too far")
        return module.training_step(batch, 0)

    monitor = SpectrumMonitor(top_k=1, bottom_k=0, loss_fn=loss_fn)
    fit(Model(lr=1e-6), monitor, epochs=1)
    (measured,) = monitor.history
    assert measured.critical is not None
    assert math.isfinite(measured.critical.factor) or "failed at a trial step" in measured.critical.reason


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint that ended")
def test_a_resume_inside_an_epoch_waits_for_the_first_batches_of_the_next(tmp_path):
    def trained(folder, path=None):
        monitor, model = SpectrumMonitor(top_k=1, bottom_k=0, num_batches=3), Model()
        saving = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=7, save_top_k=-1)
        quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
        trainer = pl.Trainer(max_epochs=4, accelerator="cpu", callbacks=[monitor, saving], **quiet)
        trainer.fit(model, DataLoader(TensorDataset(X), 8), ckpt_path=path)
        return monitor.history[-1], model

    trained(tmp_path / "whole")
    last, model = trained(tmp_path / "resumed", tmp_path / "whole" / "epoch=1-step=7.ckpt")
    kept = [(x,) for x in X.split(8)[:3]]
    expected = Hessian(lambda m, b: m.training_step(b, 0), model, kept)
    assert last.step == 16
    torch.testing.assert_close(last.top(1), spectrum(expected, top_k=1, bottom_k=0).top(1), rtol=1e-4, atol=0)
