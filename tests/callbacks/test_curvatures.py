"""The monitor's Gauss-Newton and Fisher matrices, layers and further scalars agree with dense matrices by autodiff."""

import math

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from models import Digits, dataset, fit, loader
from torch.func import functional_call, jacrev, vmap

from lightning_sketch import SpectrumMonitor


class Calls(Digits):
    """Digits with a forward that returns logits."""

    def forward(self, images):
        return self.net(images)


def monitor(**arguments):
    return SpectrumMonitor(**{"num_matvecs": 64, "dim": 512, "num_batches": 2, "top_k": 3, "tol": 1e-3, **arguments})


def jacobian(model, function, examples):
    """Return the Jacobian of each example's outputs with respect to all parameters, (examples, ..., n)."""
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def one(parameters, image, label):
        return function(functional_call(model, parameters, (image[None],))[0], label)

    found = vmap(jacrev(one), in_dims=(None, 0, 0))(parameters, *examples)
    return torch.cat([found[k].flatten(start_dim=-parameters[k].ndim) for k in parameters], -1).double()


def top(matrix):
    return torch.linalg.eigvalsh(matrix).flip(0)[:3]


def test_ggn(tmp_path):
    watch = monitor(curvature="ggn")
    model = fit(tmp_path, watch, model=Calls, data=loader(shuffle=False)).eval()
    images, labels = dataset()[:64]
    j = jacobian(model, lambda logits, label: logits, (images, labels))
    p = model(images).detach().double().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    truth = torch.einsum("bin,bij,bjm->nm", j, h, j) / 64
    torch.testing.assert_close(watch.history[-1].top(3), top(truth), rtol=1e-3, atol=0)
    metrics = model.trainer.callback_metrics
    assert metrics["ggn/lambda_max"] == pytest.approx(float(top(truth)[0]), rel=1e-3)
    assert metrics["ggn/rneg"] == 0


def test_an_output_loss_may_be_given_by_name(tmp_path):
    def by_function(output, batch):
        return F.cross_entropy(output, batch[1])

    tops = []
    for i, given in enumerate(("cross_entropy", by_function)):
        watch = SpectrumMonitor("ggn", output_loss_fn=given, num_matvecs=24, dim=48, num_batches=1, top_k=3)
        fit(tmp_path / str(i), watch, model=Calls, data=loader(shuffle=False), max_epochs=1)
        tops.append(watch.history[-1].top(3))
    torch.testing.assert_close(*tops, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "loss_fn", [slow(None), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none")]
)
def test_fisher(tmp_path, loss_fn):
    """The loss is training_step, one example at a time, or a loss_fn that returns one number per example."""
    watch = monitor(curvature="fisher", loss_fn=loss_fn)
    model = fit(tmp_path, watch, model=Calls, data=loader(shuffle=False), max_epochs=1).eval()
    j = jacobian(model, F.cross_entropy, dataset()[:64])
    torch.testing.assert_close(watch.history[-1].top(3), top(j.T @ j / 64), rtol=1e-3, atol=0)


def test_a_gauss_newton_matrix_of_another_loss_is_refused(tmp_path):
    class Regularized(Calls):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.parameters())

    with pytest.raises(ValueError, match=r"would be of a loss of .*, but training_step returns .*output_loss_fn"):
        fit(tmp_path, monitor(curvature="ggn"), model=Regularized)


@pytest.mark.slow
def test_the_projected_spectrum_has_its_own_name_and_is_off_by_a_few_percent(tmp_path):
    full, projected = monitor(), monitor(method="projected", dim=256, num_matvecs=64)
    metrics = fit(tmp_path, full, projected, data=loader(shuffle=False), max_epochs=1).trainer.callback_metrics
    ratio = metrics["hessian_projected/lambda_max"] / metrics["hessian/lambda_max"]
    assert 0.7 < ratio < 1.4
    assert abs(ratio - 1) > 1e-3


@pytest.mark.slow
def test_each_layer_has_the_spectrum_of_its_own_block(tmp_path):
    everything, patterns = monitor(per_layer=True, name="all"), monitor(per_layer=["net.1.*", "*.weight"])
    model = fit(tmp_path, everything, patterns, data=loader(shuffle=False), max_epochs=1)
    model.eval()
    parameters = dict(model.named_parameters())
    images, labels = dataset()[:64]
    loss = F.cross_entropy(model.net(images), labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()), create_graph=True)])
    rows = [torch.autograd.grad(g, list(parameters.values()), retain_graph=True) for g in gradient]
    dense = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    owner = [name for name, p in parameters.items() for _ in range(p.numel())]
    metrics = model.trainer.callback_metrics

    def check(layers, key, belongs):
        block = dense[[belongs(name) for name in owner]][:, [belongs(name) for name in owner]]
        assert layers.lambda_max == pytest.approx(float(top(block)[0]), rel=1e-3)
        assert abs(layers.trace - float(block.trace())) < 4 * layers.trace_sem
        assert metrics[f"{key}/lambda_max"] == pytest.approx(layers.lambda_max)
        assert metrics[f"{key}/trace"] == pytest.approx(layers.trace)

    layers = everything.history[-1].layers
    assert list(layers) == ["net.0", "net.1", "net.5"]
    for module in layers:
        check(layers[module], f"all_layers/{module}", lambda name, module=module: name.startswith(module))
    check(patterns.history[-1].layers["*.weight"], "hessian_layers/*.weight", lambda name: name.endswith("weight"))
    assert len(everything.plot_layers().axes[0].patches) == 3
    with pytest.raises(ValueError, match="no layers to plot; use SpectrumMonitor"):
        monitor().plot_layers()


@pytest.mark.slow
def test_gradient_overlap_and_stability(tmp_path):
    """Shares of the gradient agree with the dense matrix, and SGD with momentum has an edge of stability."""

    class Slow(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.5)

    watch = monitor()
    model = fit(tmp_path, watch, model=Slow, data=loader(shuffle=False)).eval()
    images, labels = dataset()[:64]
    parameters = list(model.parameters())
    loss = F.cross_entropy(model.net(images), labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
    dense = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    values, vectors = torch.linalg.eigh(dense)
    gradient = gradient.detach().double()
    share = float((vectors[:, -3:].T @ gradient).square().sum() / gradient.square().sum())
    metrics, last = model.trainer.callback_metrics, watch.history[-1]
    assert metrics["hessian/gradient_in_top_k"] == pytest.approx(share, rel=0.15, abs=0.02)
    assert metrics["hessian/sharpness_lr"] == pytest.approx(float(values[-1]) * 1e-3, rel=1e-3)
    assert last.stable_below == pytest.approx(3000)  # 2 (1 + 1/2) / lr
    assert math.isnan(watch.history[0].overlap_with_last)
    assert last.overlap_with_last > 0.7  # small steps hardly rotate eigenvectors; for random spaces it is 3 / n
    assert metrics["hessian/overlap"] == pytest.approx(last.overlap_with_last)
    (line,) = (line for line in watch.plot().axes[0].get_lines() if line.get_label().startswith("edge"))
    assert line.get_ydata() == pytest.approx([3000, 3000])
    assert watch.plot()._repr_png_().startswith(b"\x89PNG")  # as a notebook shows it
