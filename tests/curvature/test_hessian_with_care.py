"""Losses that need care: attention, recomputed activations, and derivatives inside the loss."""

import pytest
import torch
from marks import some
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sketch.curvature import Hessian


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def central_differences(loss_fn, module, batch):
    """Return central differences of the gradient, which need no second derivative; right to 1e-9 at this step."""
    parameters = list(module.parameters())

    def gradient(entries, i, value):
        entries[i] = value
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(module, batch), parameters)])

    rows = []
    for entries in [p.detach().view(-1) for p in parameters]:
        for i, value in enumerate(entries.tolist()):
            ahead, behind = (gradient(entries, i, value + step) for step in (1e-5, -1e-5))
            entries[i] = value
            rows.append((ahead - behind) / 2e-5)
    return torch.stack(rows)


def quartic(module, x):
    return module(x).pow(4).sum(-1).mean()


def equation(module, x):
    """As physics-informed losses are: ∂u/∂x is part of it."""
    x = x.clone().requires_grad_()
    u = module(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope - u.sum(-1, keepdim=True)).square().sum(-1).mean()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(checkpoint(lambda z: torch.tanh(self.first(z)), x, use_reentrant=False))


CARE = {
    "attention": (quartic, Attention, (2, 3, 4)),
    "encoder layer": (quartic, lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), (2, 3, 4)),
    "checkpointing": (quartic, Checkpointed, (5, 3)),
    "derivative inside": (equation, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (6, 3)),
}


@pytest.fixture(params=some(CARE, set(CARE) - {"encoder layer"}))
def problem(request):
    loss_fn, make, shape = CARE[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loss_fn, make().double().eval(), normal(*shape)


def test_a_product_is_that_of_central_differences(problem):
    """With one batch, whose graph is kept over the products, and with two, where it is not."""
    loss_fn, module, x = problem
    expected = central_differences(loss_fn, module, x)
    for batches in ([x], [x, x]):
        h = Hessian(loss_fn, module, batches)
        torch.testing.assert_close(h.as_matrix(dtype=torch.float64), expected, rtol=1e-6, atol=1e-7)


def test_the_loss_is_that_of_the_module(problem):
    loss_fn, module, x = problem
    assert Hessian(loss_fn, module, [x]).loss() == pytest.approx(loss_fn(module, x).item(), rel=1e-12)
