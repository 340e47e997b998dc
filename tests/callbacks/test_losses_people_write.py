"""The monitor on modules as people write them: noise in the step, losses in training mode only, list batches."""

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import SpectrumMonitor


class Base(pl.LightningModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Diffusion(Base):
    """Predicts the noise that was added to an example at a random time."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        time, noise = torch.rand(len(x), 1, device=x.device), torch.randn_like(x)
        noisy = time.sqrt() * noise + (1 - time).sqrt() * x
        loss = F.mse_loss(self.net(torch.cat([noisy, time], 1)), noise)
        self.log("loss", loss)
        return loss


class Contrastive(Base):
    """Two augmented views of each example that attract each other."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def views(self, x):
        keep = F.dropout(torch.ones_like(x), 0.3, training=True)
        return F.normalize(self.encoder(x * keep + 0.1 * torch.randn_like(x)), dim=1)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        logits = self.views(x) @ self.views(x).T / 0.2
        return F.cross_entropy(logits, torch.arange(len(x), device=x.device))


class Masked(Base):
    """Predicts entries that are hidden at random, with batch norm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 6))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        hidden = torch.zeros_like(x, dtype=torch.bool)
        hidden[:, torch.randperm(6)[:2]] = True
        return (self.net(x.masked_fill(hidden, 0.0)) - x)[hidden].square().mean()


class Detector(Base):
    """Returns its loss in training mode only, as torchvision's detection models do, with batch norm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return {"loss": out.square().mean()} if self.training else {"boxes": out}


def fit(model, *callbacks, epochs=2):
    pl.seed_everything(1, verbose=False)
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)
    data = TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    trainer.fit(model, DataLoader(data, 16, shuffle=True))
    return trainer


@pytest.mark.parametrize("kind", [Diffusion, Contrastive, Masked])
@pytest.mark.parametrize("options", [{}, {"mode": "train", "noise_samples": 2}], ids=["eval", "train"])
def test_a_step_that_draws_noise_is_measured_and_trains_as_without(kind, options):
    if kind is Contrastive and options:
        options = {"noise_samples": 2}
    monitor = SpectrumMonitor(top_k=2, bottom_k=1, num_batches=2, on_error="raise", **options)
    weights = []
    for callbacks in ([], [monitor]):
        pl.seed_everything(2, verbose=False)
        model = kind()
        trainer = fit(model, *callbacks)
        weights.append([t.clone() for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert len(monitor.history) == 2
    last = monitor.history[-1]
    assert last.noise_samples == options.get("noise_samples", 1)
    assert f"for {'1 draw' if last.noise_samples == 1 else '2 draws'} of" in repr(last)
    assert math.isfinite(trainer.callback_metrics["hessian/lambda_max"])
    again = monitor.measure(model)
    torch.testing.assert_close(again.eigenvalues[:2], last.eigenvalues[:2])


def test_a_loss_in_training_mode_only():
    with pytest.raises(Exception, match=r"returned no loss.*evaluation mode.*mode='train'"):
        fit(Detector(), SpectrumMonitor(num_batches=2))
    monitor = SpectrumMonitor(num_batches=2, mode="train", top_k=2, bottom_k=1, on_error="raise")
    model = Detector()
    fit(model, monitor)
    assert len(monitor.history) == 2
    assert int(model.net[1].num_batches_tracked) == 8  # of training alone


def test_the_error_over_batches_is_logged():
    monitor = SpectrumMonitor(top_k=2, bottom_k=1, num_batches=4, over_batches=True, per_layer=True, density_probes=2)
    trainer = fit(Masked(), monitor, epochs=1)
    last = monitor.history[-1]
    assert 0 < last.data_error < last.lambda_max
    assert trainer.callback_metrics["hessian/data_error"] == pytest.approx(last.data_error)
    assert last.batch_lambda_max is not None
    assert last.batch_lambda_max.shape == (4,)
    for name, layer in last.layers.items():
        assert layer.quadrature is not None
        assert float(layer.quadrature.weights.sum()) == pytest.approx(1)
        mass = trainer.callback_metrics[f"hessian_layers/{name}/negative_mass"]
        assert 0 <= mass <= 1
    assert "hessian/data_error" not in fit(Masked(), SpectrumMonitor(top_k=1), epochs=1).callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "training"}, "mode is 'eval' or 'train', got"),
        ({"noise_samples": 0}, "need noise_samples >= 1, got 0"),
    ],
)
def test_arguments_out_of_range(options, message, untyped):
    with pytest.raises(ValueError, match=message):
        SpectrumMonitor(**options)


def test_densities_of_layers_are_saved_and_drawn(tmp_path):
    from lightning_sketch import load_spectrum
    from lightning_sketch.curvature import save_spectrum

    monitor = SpectrumMonitor(top_k=2, bottom_k=1, per_layer=True, density_probes=1)
    fit(Masked(), monitor, epochs=1)
    save_spectrum(monitor.history[-1], tmp_path / "layers.safetensors")
    again = load_spectrum(tmp_path / "layers.safetensors")
    assert torch.equal(again.eigenvalues, monitor.history[-1].eigenvalues)
    assert monitor.plot_layers()
    with pytest.raises(ValueError, match="over_batches=True leaves out one batch after the other, got num_batches=1"):
        SpectrumMonitor(over_batches=True, num_batches=1)
