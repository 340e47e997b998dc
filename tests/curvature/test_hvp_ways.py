"""Three ways to a product agree with differences of the gradient, for every kind of module that needs care."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_sketch.curvature import Hessian

EXACT = ["double_backward", "forward_over_reverse"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def quartic(module, x):
    y = module(x)
    return (y[0] if isinstance(y, tuple) else y).pow(4).mean()


def truth(module, batch, v, step=1e-5):
    """Return central differences of the gradient in evaluation mode, right to 1e-9, without second derivatives."""
    module = copy.deepcopy(getattr(module, "_orig_mod", module)).eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    pieces = [part.view(p.shape) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def gradient(t):
        for p, part in zip(parameters, pieces, strict=True):
            p.data.add_(part, alpha=t)
        module.zero_grad()
        quartic(module, batch).backward()  # as reentrant checkpoints demand
        return torch.cat([p.grad.flatten() for p in parameters])

    return (gradient(step) - gradient(-2 * step)) / (2 * step)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.qkv, self.options = nn.Linear(4, 12), options

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(-3, -2) for part in self.qkv(x).chunk(3, dim=-1))
        return scaled_dot_product_attention(q, k, v, **self.options).flatten(1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 3), nn.Linear(3, 2), reentrant

    def forward(self, x):
        hidden = self.first(x)
        return self.last(checkpoint(torch.tanh, hidden, use_reentrant=self.reentrant))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


def tanh_net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def frozen():
    module = tanh_net()
    module[0].weight.requires_grad_(False)
    return module


def normalized():
    """The running statistics differ from those of the batch."""
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 2))
    module(2 + 3 * torch.randn(50, 4))
    return module


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", batch_first=True, norm_first=True)


MASK = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
MODULES = {
    "plain": (tanh_net, (5, 4)),
    "LSTM": (lambda: nn.LSTM(4, 2, num_layers=2, batch_first=True), (2, 3, 4)),
    "GRU": (lambda: nn.GRU(4, 2, batch_first=True, bidirectional=True), (2, 3, 4)),
    "attention": (Attention, (2, 3, 4)),
    "causal attention": (lambda: Attention(is_causal=True), (2, 3, 4)),
    "masked attention": (lambda: Attention(attn_mask=MASK), (2, 3, 4)),
    "encoder": (encoder, (2, 3, 4)),
    "checkpointed": (lambda: Checkpointed(False), (5, 4)),
    "checkpointed, reentrant": (lambda: Checkpointed(True), (5, 4)),
    "compiled": (lambda: torch.compile(tanh_net()), (5, 4)),
    "tied": (Tied, (5, 4)),
    "partly frozen": (frozen, (5, 4)),
    "batch norm": (normalized, (5, 4)),
}
modules = pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)


@modules
def test_both_exact_ways_give_the_product(make, shape):
    """With one batch, whose graph may be kept, and with two."""
    module, x = seeded(make).train(), normal(*shape)
    v = normal(sum(p.numel() for p in module.parameters() if p.requires_grad))
    expected = truth(module, x, v)
    for hvp, batches in itertools.product(EXACT, [[x], [x, x]]):
        h = Hessian(quartic, module, batches, hvp=hvp)
        with h.hold():
            products = [h.matvec(v), h.matvec(-2 * v)]
        torch.testing.assert_close(products, [expected, -2 * expected], rtol=1e-5, atol=1e-7)


@modules
def test_differences_give_it_to_three_digits(make, shape):
    module, x = seeded(make).train(), normal(*shape)
    h = Hessian(quartic, module, [x], hvp="finite_differences")
    v = normal(h.shape[0])
    expected = truth(module, x, v)
    assert (h.matvec(v) - expected).norm() < 1e-3 * expected.norm()
    assert not h.matvec(0 * v).any()


@modules
def test_the_module_keeps_its_own_parameters(make, shape):
    """The very same objects are in their old places, bit by bit, with the gradients that they had."""
    module, x = seeded(make).train(), normal(*shape)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = list(module.parameters()), copy.deepcopy(module.state_dict()), [p.grad for p in module.parameters()]
    for hvp in [*EXACT, "finite_differences"]:
        h = Hessian(quartic, module, [x], hvp=hvp)
        h.matvec(normal(h.shape[0]))
    for old, new in zip(before[0], module.parameters(), strict=True):
        assert new is old
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            assert all(held is p for held, p in zip(part._flat_weights, part.parameters(), strict=True))
    torch.testing.assert_close(dict(module.state_dict()), dict(before[1]), rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(module.parameters(), before[2], strict=True))
