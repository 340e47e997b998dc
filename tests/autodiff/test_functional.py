"""Inside, a module computes with other tensors; afterwards it has its own again, the very same."""

import copy

import pytest
import torch
from torch import nn

from lightning_sketch.autodiff.functional import swap_tensors


class Nested(nn.Module):
    """Shared weights, a buffer, one module under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm

    def forward(self, x):
        return self.last(self.again(self.norm(self.first(x))))


MODULES = {
    "nested": (Nested, (5, 3)),
    "LSTM": (lambda: nn.LSTM(3, 2, num_layers=2), (4, 2, 3)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (5, 3)),
    "list": (lambda: Listed(), (5, 3)),
}


class Listed(nn.Module):
    """A list of parameters beside the registered ones."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3, 3)) for _ in range(2)])
        self.order = list(self.weights)

    def forward(self, x):
        return x @ self.order[0] @ self.order[1]


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def pair(request):
    make, shape = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), torch.randn(shape)


def out(module, x):
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def unique(module):
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def places(module):
    holders = [holder for part in module.modules() for holder in (part._parameters, part._buffers)]
    holders += [
        dict(enumerate(value)) for part in module.modules() for value in vars(part).values() if type(value) is list
    ]
    return [(key, value) for holder in holders for key, value in holder.items()]


def test_inside_it_computes_with_the_others(pair):
    """As a copy does that holds them."""
    module, x = pair
    other = copy.deepcopy(module)
    with torch.no_grad():
        for t in unique(other):
            t.copy_(t * 1.5)
    before = out(module, x)
    old, new = unique(module), [t.detach().clone() for t in unique(other)]
    with swap_tensors(module, old, new):
        torch.testing.assert_close(out(module, x), out(other, x))
    assert torch.equal(out(module, x), before)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_afterwards_it_has_its_own_wherever_they_were(pair, error):
    module, _ = pair
    before, state = places(module), copy.deepcopy(module.state_dict())
    try:
        with swap_tensors(module, unique(module), [t.detach() + 1 for t in unique(module)]):
            assert all(
                new is not old
                for (_, old), (_, new) in zip(before, places(module), strict=True)
                if isinstance(old, torch.Tensor)
            )
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert all(new is old for (_, old), (_, new) in zip(before, places(module), strict=True))
    torch.testing.assert_close(dict(module.state_dict()), dict(state), rtol=0, atol=0)


def test_the_others_may_carry_a_graph(pair):
    """Then derivatives go to them, and none to the module's own."""
    module, x = pair
    old = list(module.parameters())
    factor = torch.ones((), requires_grad=True)
    with swap_tensors(module, old, [p.detach() * factor for p in old]):
        out(module, x).square().sum().backward()
    assert factor.grad != 0
    assert all(p.grad is None for p in old)


def test_only_what_is_named_is_replaced():
    module, x = nn.Linear(3, 2), torch.ones(1, 3)
    with swap_tensors(module, [module.weight], [torch.zeros(2, 3)]):
        assert torch.equal(module(x)[0], module.bias)
        assert isinstance(module.bias, nn.Parameter)
    with swap_tensors(module, [], []):
        assert isinstance(module.weight, nn.Parameter)


def test_as_many_as_are_replaced():
    module = nn.Linear(3, 2)
    with (
        pytest.raises(ValueError, match="shorter"),
        swap_tensors(module, [module.weight, module.bias], [torch.zeros(2, 3)]),
    ):
        pass
