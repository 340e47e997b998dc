"""Gradients that are visited, or sketched, one parameter after the other: autograd's own, of which none is held."""

import pytest
import torch
from torch import nn

from lightning_sketch.autodiff.gradients import gradients_of, sketched_gradient, visit_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import make_sketch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Mixed(nn.Module):
    """A sparse embedding, a layer that is used twice and past its module, one that is not used, and one with hooks."""

    def __init__(self, size=6, rows=20):
        super().__init__()
        self.table = nn.Embedding(rows, size, sparse=True)
        self.unused, self.shared, self.hooked = nn.Linear(3, 3), nn.Linear(size, size), nn.Linear(size, size)
        self.hooked.weight.register_hook(lambda gradient: 3 * gradient)
        self.hooked.bias.register_hook(lambda gradient: None)

    def forward(self, x):
        x = self.shared(self.shared(self.table(x)).tanh())
        return self.hooked(x) @ self.shared.weight


def loss_of(module, rows=20):
    return module(torch.arange(0, rows, 4)).square().mean()


def copies(found):
    return {name: gradient.to_dense().clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hold", [0, 1 << 20])
def test_each_gradient_is_visited_once_and_is_that_of_autograd(dtype, hold):
    """Equal bit for bit: what hooks of the user do, and how uses of one parameter are added up, is in both."""
    torch.manual_seed(0)
    module, visited = Mixed().to(dtype), []
    parameters = dict(module.named_parameters())
    truth = copies(gradients_of(loss_of(module), parameters))
    before = {name: dict(p._backward_hooks or {}) for name, p in parameters.items()}
    names = visit_gradients(
        loss_of(module), parameters, lambda name, g: visited.append((name, g.to_dense().clone(), g.layout)), hold
    )
    assert names == list(truth) == [name for name in parameters if not name.startswith("unused")]
    assert sorted(name for name, _, _ in visited) == sorted(names)
    for name, gradient, layout in visited:
        assert torch.equal(gradient, truth[name])
        assert (gradient.dtype, bool(gradient.any())) == (dtype, True)
        assert (layout == torch.sparse_coo) == (name == "table.weight")
    assert all(parameter.grad is None for parameter in parameters.values())
    assert {name: dict(p._backward_hooks or {}) for name, p in parameters.items()} == before


class Halved(torch.autograd.Function):
    """x w, whose own backward runs a pass through w and halves what it finds; nothing goes to `free`."""

    @staticmethod
    def forward(ctx, x, w, free):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        with torch.enable_grad():
            (inner,) = torch.autograd.grad(x.detach() @ w, w, gradient)
        return gradient @ w.T, inner / 2, None


def test_a_pass_inside_the_pass_keeps_its_gradients_and_none_means_no_visit():
    """The inner gradient must not be visited, or be replaced by zero, which the outer one would be made of."""
    torch.manual_seed(0)
    w, free = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    x, visited = torch.randn(3, 4), {}
    free.register_hook(lambda gradient: None)  # PyTorch calls hooks with None too
    names = visit_gradients(Halved.apply(x, w, free).sum(), {"w": w, "free": free}, visited.__setitem__, hold=0)
    assert names == list(visited) == ["w"]
    torch.testing.assert_close(visited["w"], x.T @ torch.ones(3, 4) / 2)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_pass_leaves_no_hook(error):
    module = nn.Linear(3, 2)
    loss = module(torch.ones(1, 3)).sum()

    def visit(name, gradient):
        raise error("in a visit")

    with pytest.raises(error, match="in a visit"):
        visit_gradients(loss, dict(module.named_parameters()), visit, hold=0)
    assert not any(tensor._backward_hooks for tensor in (module.weight, module.bias, loss))


@pytest.mark.parametrize("hold", [0, 1 << 20])
def test_a_loss_without_a_graph_has_the_error_of_autograd(hold):
    with pytest.raises(RuntimeError, match="does not require grad"):
        visit_gradients(torch.ones(()), {"w": nn.Parameter(torch.ones(2))}, print, hold)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_srht", "count_sketch", "affd"])
@pytest.mark.parametrize("numbers", [1000, 1 << 23])
def test_the_sketch_of_the_gradient_is_that_of_the_whole_vector(kind, numbers):
    """In float64, of fewer numbers than are held and of more; sums in another order differ by rounding."""
    torch.manual_seed(0)
    size = int((numbers / 3) ** 0.5) + 1
    module = Mixed(size, rows=size).double()
    layout = Layout.of(module)
    assert layout.n > numbers
    sketch = make_sketch(kind=kind, n=layout.n, dim=500, seed=3)
    parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
    del parameters["shared.bias"]  # which is zero then
    found = sketched_gradient(loss_of(module, size), parameters, layout, sketch)
    gradients = gradients_of(loss_of(module, size), parameters)
    whole = layout.flatten([gradients.get(name) for name in layout.names], torch.empty(0, dtype=torch.float64))
    truth = sketch.matvec(whole)
    assert found.dtype == torch.float64
    assert truth.norm() > 0
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13 * float(truth.abs().max()))
