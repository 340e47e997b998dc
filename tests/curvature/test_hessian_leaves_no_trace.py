"""A product changes nothing that can be seen, and the graph that is kept is never stale."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch.curvature import Hessian

X = torch.linspace(-2, 2, 24).view(8, 3)


def network():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
    module[1].eval()  # a frozen layer stays one
    return module


def squares(module, x):
    return module(x).square().mean()


def direction(h):
    return torch.linspace(-1, 1, h.shape[1])


def random_state():
    """Compare it under `untyped` only: the checks of types draw from Python's generator themselves."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def sampled(module, x):
    """Draw noise in the loss, as a variational autoencoder does."""
    return module(x + torch.randn(x.shape, dtype=x.dtype)).square().mean()


@pytest.mark.parametrize(("loss", "mode"), [(squares, "train"), (sampled, "eval")], ids=["dropout", "noise"])
@pytest.mark.parametrize("count", [1, 2], ids=["one batch", "two batches"])
def test_all_columns_are_those_of_one_matrix(loss, mode, count):
    """Random numbers are put back after each product: a matrix with other noise in each column is not symmetric."""
    module = network().double()
    dense = Hessian(loss, module, [X.double(), X[:3].double()][:count], mode=mode).as_matrix()
    torch.testing.assert_close(dense, dense.T)
    assert dense.norm() > 0.1


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("batches", [[X], [X, X[:3]]], ids=["one batch", "two batches"])
def test_gradients_buffers_modes_and_random_state_stay(untyped, mode, batches):
    module = network().train()
    module[1].eval()
    squares(module, X).backward()
    before = [p.grad.clone() for p in module.parameters()], [b.clone() for b in module.buffers()], random_state()
    h = Hessian(squares, module, batches, mode=mode)
    h.matvec(direction(h))
    h.loss()
    after = [p.grad for p in module.parameters()], list(module.buffers()), random_state()
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    assert after[2] == before[2]
    assert [part.training for part in module] == [True, False, True, True, True]


def test_statistics_of_the_batch_leave_the_running_ones():
    """Batch norm changes its buffers without increasing their version counters."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    before = [b.clone() for b in module.buffers()]
    h = Hessian(squares, module, [X], mode="train")
    of_batch = h.matvec(direction(h))
    torch.testing.assert_close(list(module.buffers()), before, rtol=0, atol=0)
    assert not torch.allclose(of_batch, Hessian(squares, module, [X]).matvec(direction(h)), rtol=1e-2)


def test_a_graph_in_the_making_can_still_run_backward():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    alone, loss = squares(module, X), squares(module, X)
    expected = torch.autograd.grad(alone, module[0].weight)
    h = Hessian(squares, module, [X], mode="train")
    h.matvec(direction(h))
    torch.testing.assert_close(torch.autograd.grad(loss, module[0].weight), expected)


def test_a_loader_draws_nothing_from_the_global_generator(untyped):
    module = network()
    before = random_state()
    h = Hessian(squares, module, DataLoader(X, batch_size=4, shuffle=True))
    h.matvec(direction(h))
    assert random_state() == before


def test_the_kept_graph_gives_the_same_products():
    module = network()
    one, two = Hessian(squares, module, [X]), Hessian(squares, module, [X, X])
    v = direction(one)
    with one.hold():
        products = [one.matvec(v), one.matvec(2 * v), one.matvec(v)]
    torch.testing.assert_close(products, [two.matvec(v), two.matvec(2 * v), two.matvec(v)])


def test_one_fixed_batch_costs_no_forward_pass_after_the_first_product():
    calls = []

    def counted(module, x):
        calls.append(0)
        return squares(module, x)

    h = Hessian(counted, network(), [X])
    with h.hold():
        h.matvec(direction(h))
        first = len(calls)
        h.matvec(direction(h))
        assert len(calls) == first


@pytest.mark.parametrize("inside", [True, False])
def test_the_graph_is_made_again_when_parameters_have_changed(inside):
    module = network()
    h = Hessian(squares, module, [X])
    for _ in range(2):
        fresh = Hessian(squares, module, [X]).matvec(direction(h))
        if inside:
            with h.hold():
                h.matvec(direction(h))
                got = h.matvec(direction(h))
        else:
            got = h.matvec(direction(h))
        torch.testing.assert_close(got, fresh)
        with torch.no_grad():
            module[0].weight.mul_(1.5)


def test_an_error_inside_releases_the_module():
    module = network().train()
    h = Hessian(squares, module, [X])
    with contextlib.suppress(KeyboardInterrupt), h.hold():
        h.matvec(direction(h))
        raise KeyboardInterrupt
    assert module[0].training
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    torch.testing.assert_close(h.matvec(direction(h)), Hessian(squares, module, [X]).matvec(direction(h)))


def test_products_work_where_gradients_are_off():
    module = network()
    h = Hessian(squares, module, [X])
    expected = h.matvec(direction(h))
    for off in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with off:
            got = h.matvec(direction(h))
        assert torch.equal(got, expected)
