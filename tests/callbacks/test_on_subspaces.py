"""On a SubspaceModule the monitor measures D H Dᵀ, the Hessian of w, and the writer stores gradients of w."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from models import loader
from torch import nn

from lightning_sketch import GGN, GradientSketchWriter, GradientStore, Hessian, SpectrumMonitor, SubspaceModule


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

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


def dense(sub, batch):
    """Return the Hessian and the Gauss-Newton matrix of w by autograd at θ, D H Dᵀ and D Jᵀ (H of the loss) J Dᵀ."""
    images, labels = batch
    theta = torch.cat([p.detach().flatten() for p in sub.weights.parameters()]).double()

    def logits(vector):
        parts = dict(zip(sub.weights.layout.names, sub.weights.layout.unflatten(vector), strict=True))
        hidden = torch.tanh(F.linear(images.flatten(1).double(), parts["net.1.weight"], parts["net.1.bias"]))
        return F.linear(hidden, parts["net.3.weight"], parts["net.3.bias"])

    d = sub.directions.as_matrix(dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda vector: F.cross_entropy(logits(vector), labels), theta)
    jacobian = torch.autograd.functional.jacobian(logits, theta) @ d.T
    p = logits(theta).softmax(1)
    of_loss = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)
    return d @ hessian @ d.T, torch.einsum("bcw,bce,bev->wv", jacobian, of_loss, jacobian)


def test_the_hessian_is_that_of_w():
    """Eigenvalues agree with those of the dense matrix; training is the same to the bit."""
    monitor = SpectrumMonitor(num_batches=1, every_n_train_steps=6, bottom_k=1, tol=1e-5, num_matvecs=20)
    sub = fitted(monitor)
    assert torch.equal(sub.w, fitted().w)
    eigenvalues = torch.linalg.eigvalsh(dense(sub, next(iter(loader(shuffle=False))))[0]).flip(0)
    found = monitor.history[-1]
    assert found.n == 20
    assert torch.allclose(found.top(5).double(), eigenvalues[:5], rtol=1e-3)


LOSSES = [
    lambda module, batch: module.training_step(batch, 0),
    lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
    lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_loss_depends_on_w_however_it_calls_the_module(loss_fn):
    """By its step, by a call, or by a part of the module inside; as does the output for a Gauss-Newton matrix."""
    sub, batch = fitted(), next(iter(loader(shuffle=False)))
    hessian, ggn = dense(sub, batch)
    assert torch.allclose(
        Hessian(loss_fn, sub, [batch]).as_matrix().double(), hessian, atol=1e-4 * float(hessian.norm())
    )
    outputs = [None, lambda module, batch: module(batch[0]), lambda module, batch: module.net(batch[0])]
    found = GGN(sub, [batch], model_fn=outputs[LOSSES.index(loss_fn)], output_loss_fn="cross_entropy").as_matrix()
    assert torch.allclose(found.double(), ggn, atol=1e-4 * float(ggn.norm()))


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


class WithoutForward(pl.LightningModule):
    """A module of one network, which its step calls."""

    def __init__(self):
        super().__init__()
        self.net = Small().net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    configure_optimizers = Small.configure_optimizers


def test_a_module_without_forward_has_the_output_of_its_network_in_a_subspace_too():
    """The Gauss-Newton matrix by default is that of this output; the monitor measures it, and training is the same."""
    monitor = SpectrumMonitor("ggn", num_batches=1, every_n_train_steps=6, tol=1e-5, num_matvecs=20, top_k=5)
    sub, batch = fitted(monitor, kind=WithoutForward), next(iter(loader(shuffle=False)))
    assert torch.equal(sub.w, fitted(kind=WithoutForward).w)
    ggn = dense(sub, batch)[1]
    assert torch.allclose(GGN(sub, [batch]).as_matrix().double(), ggn, atol=1e-4 * float(ggn.norm()))
    top = torch.linalg.eigvalsh(ggn).flip(0)[:5]
    assert torch.allclose(monitor.history[-1].top(5).double(), top, rtol=1e-3)
