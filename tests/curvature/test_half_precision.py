"""A module in half precision has the curvature of its float32 copy, and stays the module that it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_sketch.curvature import EmpiricalFisher, Hessian, spectrum

HALF = [torch.bfloat16, torch.float16]


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def normalized():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    module(1 + 2 * torch.randn(50, 4))
    return module


MODULES = {"batch norm": (normalized, (5, 4)), "LSTM": (lambda: nn.LSTM(4, 2), (3, 2, 4)), "tied": (Tied, (5, 4))}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def pair(request):
    """A module with the input that it takes."""
    make, shape = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), normal(*shape)


def quartic(module, x):
    y = module(x)
    return (y[0] if isinstance(y, tuple) else y).pow(4).mean()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("hvp", ["auto", "finite_differences"])
def test_products_are_those_of_the_float32_copy(pair, dtype, hvp):
    """Bit by bit: batches, buffers and parameters are all converted to float32 before anything is computed."""
    module, x = pair
    half, batch = copy.deepcopy(module).to(dtype), x.to(dtype)
    wide = copy.deepcopy(half).float()
    got, expected = (Hessian(quartic, m, [b], hvp=hvp) for m, b in ((half, batch), (wide, batch.float())))
    v = normal(got.shape[0])
    assert got.dtype == torch.float32
    assert torch.equal(got.matvec(v), expected.matvec(v))
    assert torch.equal(got.gradient(), expected.gradient())
    assert got.loss() == expected.loss()


def test_the_module_keeps_its_own_parameters(pair):
    """The very same objects in all places, bit by bit, with their gradients."""
    module, x = pair[0].bfloat16().train(), pair[1].bfloat16()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    places = [(part._parameters, k, p) for part in module.modules() for k, p in part._parameters.items()]
    places += [(part._buffers, k, b) for part in module.modules() for k, b in part._buffers.items()]
    places += [
        (part._flat_weights, i, p)
        for part in module.modules()
        if isinstance(part, nn.LSTM)
        for i, p in enumerate(part._flat_weights)
    ]
    before = copy.deepcopy(module.state_dict())
    h = Hessian(quartic, module, [x])
    h.matvec(normal(h.shape[0]))
    assert all(holder[key] is value for holder, key, value in places)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    assert h.parameters == list(module.parameters())


def test_what_was_trained_meanwhile_is_seen(pair):
    """The float32 copy is made again for every product, or for every run."""
    module, x = pair[0].bfloat16(), pair[1].bfloat16()
    h = Hessian(quartic, module, [x])
    v = normal(h.shape[0])
    h.matvec(v)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    assert torch.equal(h.matvec(v), Hessian(quartic, copy.deepcopy(module), [x]).matvec(v))


def test_only_a_part_may_be_half():
    """A frozen base in bfloat16 under a float32 head, whose input the model casts itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.head = nn.Linear(4, 3).bfloat16().requires_grad_(False), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.base(x).float())

    module, x = Net(), normal(5, 4).bfloat16()
    wide = copy.deepcopy(module).float()
    h = Hessian(quartic, module, [x])
    v = normal(h.shape[0])
    torch.testing.assert_close(h.matvec(v), Hessian(quartic, wide, [x.float()]).matvec(v))
    assert module.base.weight.dtype == torch.bfloat16
    assert not module.base.weight.requires_grad


def test_an_error_inside_puts_the_module_back():
    module = nn.Linear(4, 2).bfloat16()
    weight = module.weight
    h = Hessian(lambda module, x: module(x, x), module, [normal(5, 4)])
    with pytest.raises(TypeError, match="positional argument"):
        h.matvec(normal(10))
    assert module.weight is weight


def test_a_spectrum_in_half_precision_converges_as_in_float32(pair):
    """No warning of a product that is linear only to 1e-2, as products in bfloat16 would be."""
    module, x = pair[0].bfloat16(), pair[1].bfloat16()
    sp = spectrum(Hessian(quartic, module, [x]), top_k=2, bottom_k=0)
    assert sp.linearity_defect < 1e-5
    assert sp.converged[:2].all()


def test_the_fisher_matrix_is_that_of_the_copy(pair):
    module, x = copy.deepcopy(pair[0]).bfloat16(), pair[1].bfloat16()
    losses = lambda m, x: (y[0] if isinstance(y := m(x), tuple) else y).pow(4).flatten(1).mean(1)  # noqa: E731
    got, expected = (
        EmpiricalFisher(losses, module, [x]),
        EmpiricalFisher(losses, copy.deepcopy(module).float(), [x.float()]),
    )
    v = normal(got.shape[0])
    assert torch.equal(got.matvec(v), expected.matvec(v))
