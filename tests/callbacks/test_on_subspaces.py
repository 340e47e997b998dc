"""On a SubspaceModule the monitor measures D H Dᵀ, the Hessian of w, and the writer stores gradients of w."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from models import loader
from torch import nn

from lightning_sketch import GradientSketchWriter, GradientStore, SpectrumMonitor, SubspaceModule


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def fitted(*callbacks, steps=6, kind=Small, **options):
    pl.seed_everything(0, verbose=False)
    sub = SubspaceModule(kind(), 20, scale=10, **options)
    pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    ).fit(sub, loader(shuffle=False))
    return sub


def test_the_hessian_is_that_of_w():
    """Eigenvalues agree with the dense D H Dᵀ, H by autograd at θ; training is the same to the bit."""
    monitor = SpectrumMonitor(num_batches=1, every_n_train_steps=6, bottom_k=1, tol=1e-5, num_matvecs=20)
    sub = fitted(monitor)
    assert torch.equal(sub.w, fitted().w)
    images, labels = next(iter(loader(shuffle=False)))
    names = sub.weights.layout.names
    theta = torch.cat([p.detach().flatten() for p in sub.weights.parameters()]).double()

    def loss(vector):
        parts = dict(zip(names, sub.weights.layout.unflatten(vector), strict=True))
        hidden = torch.tanh(F.linear(images.flatten(1).double(), parts["net.1.weight"], parts["net.1.bias"]))
        return F.cross_entropy(F.linear(hidden, parts["net.3.weight"], parts["net.3.bias"]), labels)

    dense = torch.autograd.functional.hessian(loss, theta)
    d = sub.directions.as_matrix(dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(d @ dense @ d.T).flip(0)
    found = monitor.history[-1]
    assert found.n == 20
    assert torch.allclose(found.top(5).double(), eigenvalues[:5], rtol=1e-3)


def test_the_writer_stores_the_gradients_of_w(tmp_path):
    """With as many numbers as w has, a row is a rotation of its gradient; training is the same to the bit."""
    writer = GradientSketchWriter(tmp_path, dim=20, dtype="float32")
    sub = fitted(writer)
    assert torch.equal(sub.w, fitted().w)
    rows = GradientStore.open(tmp_path).read()
    assert rows.sketches.shape == (6, 20)
    assert rows.sketches.norm(dim=1).min() > 0
    assert rows.columns["lr"].tolist() == pytest.approx([3e-3] * 6)


class Descent(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=3e-3)


def test_the_edge_of_stability_is_that_of_the_modules_own_rate():
    """The edge is 2 / rate; the scale of D is in the Hessian of w."""
    monitor = SpectrumMonitor(num_batches=1, every_n_train_steps=2, top_k=3)
    fitted(monitor, steps=2, kind=Descent)
    found = monitor.history[-1]
    assert found.lr == pytest.approx(3e-3)
    assert found.stable_below == pytest.approx(2 / 3e-3)
