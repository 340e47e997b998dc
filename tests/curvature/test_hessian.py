"""A product with the Hessian is a product with the dense one, whatever the loss is made of."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.utils.data import DataLoader

from lightning_sketch.curvature import Hessian


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(loss_fn, module, batch, names=None):
    """Return the dense Hessian by torch.func, forward over reverse: not the way of the package."""
    named = {k: p.detach() for k, p in module.named_parameters() if names is None or k in names}

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {k: part.view(p.shape) for (k, p), part in zip(named.items(), parts, strict=True)}
        return loss_fn(lambda *x: functional_call(module, values, x), batch)

    return hessian(loss)(torch.cat([p.flatten() for p in named.values()]))


def seeded(make, *args, **kwargs):
    """Return a module in float64 and evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **kwargs).double().eval()


def tanh_net():
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def quartic(module, x):
    """A mean over examples, with curvature of its own."""
    return module(x).pow(4).sum(-1).mean()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_a_product_is_that_of_the_dense_hessian(case):
    h, v = case.hessian(), normal(len(case.dense))
    torch.testing.assert_close(h.matvec(v), case.dense @ v)


def test_batches_are_weighted_by_their_number_of_examples():
    module, x = tanh_net(), normal(30, 3)
    h = Hessian(quartic, module, list(x.split([20, 7, 3])))
    torch.testing.assert_close(h.as_matrix(dtype=torch.float64), truth(quartic, module, x))
    assert h.loss() == pytest.approx(quartic(module, x).item(), rel=1e-12)


def test_batches_may_be_a_shuffling_loader():
    module, x = tanh_net(), normal(30, 3)
    h = Hessian(quartic, module, DataLoader(x, batch_size=7, shuffle=True))
    torch.testing.assert_close(h.as_matrix(dtype=torch.float64), truth(quartic, module, x))


def test_tied_weights_count_once():
    module, x = seeded(Tied), normal(5, 3)
    h = Hessian(quartic, module, [x])
    assert h.shape == (15, 15)
    torch.testing.assert_close(h.as_matrix(dtype=torch.float64), truth(quartic, module, x))


def test_frozen_parameters_are_left_out():
    module, x = tanh_net(), normal(5, 3)
    module[0].weight.requires_grad_(False)
    expected = truth(quartic, module, x, ["0.bias", "2.weight", "2.bias"])
    torch.testing.assert_close(Hessian(quartic, module, [x]).as_matrix(dtype=torch.float64), expected)


def test_a_pattern_takes_a_block():
    module, x = tanh_net(), normal(5, 3)
    h = Hessian(quartic, module, [x], parameters="2.*")
    torch.testing.assert_close(h.as_matrix(dtype=torch.float64), truth(quartic, module, x)[16:, 16:])


def test_it_is_symmetric(case):
    h, (u, v) = case.hessian(), normal(2, len(case.dense))
    torch.testing.assert_close(u @ h.matvec(v), v @ h.rmatvec(u))


def test_batch_axes_are_independent():
    h = Hessian(quartic, tanh_net(), [normal(5, 3)])
    v = normal(2, 3, h.shape[0])
    got = h.matvec(v)
    assert got.shape == v.shape
    assert torch.equal(got[1, 2], h.matvec(v[1, 2]))
    assert h.matvec(v[:0]).shape == (0, 3, h.shape[0])


def test_a_compiled_module_runs_eagerly():
    module, x = tanh_net(), normal(5, 3)
    h = Hessian(quartic, torch.compile(module), [x])
    assert h.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    torch.testing.assert_close(h.as_matrix(dtype=torch.float64), truth(quartic, module, x))


def test_a_loss_linear_in_the_parameters_has_no_curvature():
    h = Hessian(lambda module, x: module(x).mean(), nn.Linear(3, 2), [torch.ones(4, 3)])
    assert torch.equal(h.matvec(torch.ones(8)), torch.zeros(8))


def test_unused_parameters_have_no_curvature():
    module, x = tanh_net(), normal(5, 3)
    module.spare = nn.Linear(2, 2).double()
    h = Hessian(lambda m, x: quartic(m[2], torch.tanh(m[0](x))), module, [x]).as_matrix(dtype=torch.float64)
    assert h[:26, :26].any()
    assert not h[26:].any()
    assert not h[:, 26:].any()


def test_parameters_may_differ_in_precision():
    module, x = tanh_net(), normal(5, 3)
    expected = truth(quartic, module, x)
    module[2].float()
    mixed = Hessian(lambda m, x: m[2](torch.tanh(m[0](x)).float()).pow(4).sum(-1).mean(), module, [x])
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed.as_matrix(dtype=torch.float64), expected, rtol=1e-4, atol=1e-4)
