"""What is trained beside w: a head, and scales of layers; and w itself, where it is computed from something else."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Late, Tied, trainer, val_loader
from projected import Net, assert_same, batches, both, moved
from small_searches import made
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lightning_sketch.subspace import SubspaceModel, SubspaceModule


def seeded(kind=Net, dim=7, **options):
    pl.seed_everything(7, verbose=False)
    return SubspaceModule(kind(), dim, **options)


def test_a_head_is_no_part_of_the_subspace_and_is_saved():
    """It takes the optimizer's own steps, whatever the scale is; other parameters stay frozen."""
    sub, plain = both(Net, head="last.*", scale=4.0)
    assert_same(sub, plain)
    assert sub.n == 6 * 5 + 6
    assert sub.state_dict().keys() == {"w", "_extra_state", "module.last.weight", "module.last.bias"}
    other = seeded(head="last.*", scale=4.0)
    other.load_state_dict(sub.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(sub.module.parameters(), other.module.parameters(), strict=True))


def test_a_head_may_have_a_rate_of_its_own():
    class Rates(Net):
        def inner(self, parameters):
            w, *rest = parameters
            return torch.optim.SGD([{"params": [w]}, {"params": rest, "lr": 0.5}], lr=0.05)

        def configure_optimizers(self):
            groups = [{"params": self.body.parameters()}, {"params": self.last.parameters(), "lr": 0.5}]
            return torch.optim.SGD(groups, lr=0.05)

    assert_same(*both(Rates, head="last.*"))


@pytest.mark.parametrize(
    ("options", "trained", "n"),
    [
        ({"head": ["*.bias", "last.*"]}, {"w", "module.body.bias", "module.last.weight", "module.last.bias"}, 30),
        ({"head": "last.bias", "parameters": "last.*"}, {"w", "module.last.bias"}, 12),
        ({"head": "last.bias", "parameters": "body.*"}, {"w", "module.last.bias"}, 36),
        (
            {"head": "last.bias", "parameters": "body.*", "others": "full"},
            {"w", "module.last.bias", "module.last.weight"},
            36,
        ),
    ],
)
def test_patterns_of_a_head(options, trained, n):
    sub = seeded(**options)
    assert sub.n == n
    assert {name for name, p in sub.named_parameters() if p.requires_grad} == trained
    trainer().fit(sub, batches())
    assert {name for name, p in sub.named_parameters() if p.requires_grad} == trained
    assert all(p.requires_grad for p in sub.materialize().parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"head": "classifier.*"},
            r"no trainable parameter matches 'classifier\.\*'; the names start with body",
        ),
        ({"head": "*"}, "no parameter is left without body.weight"),
        ({"structure": "blocks"}, "structure='blocks' is not known; use 'layers' or None"),
        ({"structure": "layers", "max_dim": 28}, "no directions that can be doubled; leave max_dim out"),
        ({"structure": "layers", "dim": 2}, r"one number for each of 2 layers, so it needs dim > 2, got dim=2"),
    ],
)
def test_what_cannot_be_is_refused(options, said, untyped):
    with pytest.raises(ValueError, match=said):
        seeded(**{"dim": 7, **options})


def dense_values(sub, w):
    """Return θ₀ + (1 + λ) Dᵀ v for w = (v, λ), with a dense D, by name."""
    matrix, layers = sub.directions.as_matrix(dtype=torch.float64), {"body": 0, "last": 1}
    v, scales = w[:-2], w[-2:]
    steps = sub.weights.layout.unflatten(matrix.T @ v)
    return {
        name: start + (1 + scales[layers[name.split(".")[0]]]) * step
        for (name, start), step in zip(sub.theta0().items(), steps, strict=True)
    }


def test_scales_of_layers_have_the_gradient_of_the_dense_formula():
    """At a w that is not zero, in a loop of one's own, in a training step and through `following`."""
    x, y = next(iter(batches()))
    sub = seeded(structure="layers", scale=2.0)
    assert (sub.w.shape, sub.directions.shape) == ((7,), (5, 48 + 2))
    sub.w.data.normal_()
    w = sub.w.detach().clone().requires_grad_()
    loss = F.mse_loss(functional_call(sub.module, dense_values(sub, w), (x,)), y)
    (expected,) = torch.autograd.grad(loss, w)
    F.mse_loss(sub(x), y).backward()
    assert torch.allclose(sub.w.grad, expected, rtol=1e-9)
    model = SubspaceModel(sub.materialize(), 7, structure="layers", scale=2.0)
    for p, start in zip(model.weights.parameters(), sub.theta0().values(), strict=True):
        p.data.copy_(start)
    model.ready()
    model.w.data.copy_(sub.w.data)
    F.mse_loss(model(x), y).backward()
    assert torch.allclose(model.w.grad, expected, rtol=1e-9)
    for (name, value), p in zip(dense_values(sub, w).items(), sub.weights.parameters(), strict=True):
        assert torch.allclose(value, p, rtol=1e-12), name


class Doubles(Net):
    """A module with a hook that doubles the gradient of one layer."""

    def on_before_optimizer_step(self, optimizer):
        for p in self.body.parameters():
            p.grad *= 2


@pytest.mark.parametrize("kind", [Net, Doubles])
def test_scales_of_layers_are_trained(kind):
    """The run is that of a loop by hand, by autograd through the dense formula; scales change from the third step on.

    With w = 0 the gradient of the scales is zero.
    """
    sub = seeded(kind, structure="layers")
    w = nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = sub.module.inner([w])
    for x, y in batches():
        values = dense_values(sub, w)
        if kind is Doubles:
            for name in ("body.weight", "body.bias"):
                values[name].register_hook(lambda g: 2 * g)
        optimizer.zero_grad()
        F.mse_loss(functional_call(sub.module, values, (x,)), y).backward()
        optimizer.step()
    trainer().fit(sub, batches())
    assert torch.allclose(sub.w, w, rtol=1e-9)
    assert sub.w[-2:].abs().min() > 1e-4
    assert moved(sub) > 1e-3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_scales_of_layers_are_saved_and_may_get_another_scale(tmp_path):
    """The scale of D is not theirs: a w of another scale has the same ones."""
    sub = seeded(structure="layers", scale=2.0)
    trainer().fit(sub, batches())
    state = sub.state_dict()
    for scale in (2.0, 8.0):
        other = seeded(structure="layers", scale=scale)
        other.load_state_dict(state)
        assert torch.equal(other.w[-2:], sub.w[-2:])
        assert torch.allclose(other.w[:-2] * scale, sub.w[:-2] * 2)
        for p, q in zip(sub.weights.parameters(), other.weights.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-14)
    with pytest.raises(ValueError, match="other directions"):
        seeded().load_state_dict(state)


def test_layers_are_modules_that_have_weights():
    """A weight and a bias share a scale; a matrix of two layers belongs to the first one."""
    assert SubspaceModule(made(Tied), 9, structure="layers").weights.layers == [0, 0, 1, 2, 2]


def test_layers_that_are_made_late_have_scales_too():
    sub = SubspaceModule(made(Late), 16, structure="layers")
    trainer().fit(sub, val_loader())
    assert (sub.w.shape, sub.directions.dim, len(set(sub.weights.layers))) == ((16,), 14, 2)


class Rounded(nn.Module):
    """Numbers that are rounded to 64ths, with the gradient of the identity."""

    def forward(self, w):
        return w + ((w * 64).round() / 64 - w).detach()


@pytest.mark.parametrize("kind", [Net, Doubles])
def test_a_w_that_is_computed_is_trained(kind):
    """Quantization-aware training: the parameter below takes the steps, and θ follows its rounded values."""
    sub = seeded(kind, scale=3.0)
    parametrize.register_parametrization(sub, "w", Rounded())
    matrix, w = sub.directions.as_matrix(dtype=torch.float64), nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer, rounded = sub.module.inner([w]), Rounded()
    for x, y in batches():
        steps = sub.weights.layout.unflatten(matrix.T @ rounded(w))
        values = {name: start + step for (name, start), step in zip(sub.theta0().items(), steps, strict=True)}
        if kind is Doubles:
            for name in ("body.weight", "body.bias"):
                values[name].register_hook(lambda g: 2 * g)
        optimizer.zero_grad()
        F.mse_loss(functional_call(sub.module, values, (x,)), y).backward()
        optimizer.step()
    trainer().fit(sub, batches())
    below = sub.parametrizations.w.original
    assert torch.allclose(below, w, rtol=1e-9)
    assert torch.equal(sub.w * 64, (below * 64).round())
    steps = sub.weights.layout.unflatten(matrix.T @ sub.w.detach())
    for p, start, step in zip(sub.weights.parameters(), sub.theta0().values(), steps, strict=True):
        assert torch.allclose(p, start + step, rtol=1e-12)
    other = seeded(kind, scale=3.0)
    parametrize.register_parametrization(other, "w", Rounded())
    other.load_state_dict(sub.state_dict())
    assert torch.equal(other.w, sub.w)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.body = nn.LazyLinear(6)


def test_a_layer_without_a_shape_is_refused():
    with pytest.raises(ValueError, match=r"body.weight has no shape before the first batch.*run the module on a batch"):
        seeded(Lazy)
    lazy = Lazy()
    lazy.float()(torch.ones(1, 5))
    assert SubspaceModule(lazy, 7).n == 50


def test_whole_numbers_may_come_as_floats(untyped):
    """As from a sweep that draws them from a quantized uniform distribution."""
    sub = seeded(dim=8.0, seed=2.0, max_dim=16.0)
    assert sub.directions == seeded(dim=8, seed=2, max_dim=16).directions
    assert isinstance(sub.hparams["dim"], int)
    for wrong in ("8", 8.5, None):
        with pytest.raises(ValueError, match="dim is a whole number, got"):
            seeded(dim=wrong)
