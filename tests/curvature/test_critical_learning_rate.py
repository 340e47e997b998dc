"""The critical learning rate is where the loss along the last step rises again, and finding it changes nothing."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forks import Started
from marks import slow
from torch import nn

from lightning_sketch.curvature import GGN, Hessian, copy_weights, critical_learning_rate

PROGRAM = Path(__file__).with_name("sharded_step.py")


class Parabola(nn.Module):
    """x H x / 2 with two parameters."""

    def __init__(self, h):
        super().__init__()
        self.h = h
        self.first, self.second = nn.Parameter(torch.randn(2, 3).to(h)), nn.Parameter(torch.randn(4).to(h))

    def forward(self, batch):
        x = torch.cat([self.first.flatten(), self.second])
        return x @ self.h @ x / 2


def on(module, batch):
    return module(batch)


def stepped(module, optimizer, loss):
    """Take a step, and return the copy of the weights before it."""
    before = copy_weights(module)
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    return before


@pytest.mark.parametrize("rate", [1e-3, 0.3, 1.5, 10.0])
def test_of_gradient_descent_on_a_parabola_it_is_that_of_theory(rate):
    """2 gᵀg / gᵀHg is where the loss along the gradient is what it was."""
    torch.manual_seed(3)
    a = torch.randn(10, 10, dtype=torch.float64) / 3
    module, batch = Parabola(a @ a.T), torch.zeros(1)
    h = Hessian(on, module, [batch])
    g = h.gradient()
    sharpness = float(g @ h.matvec(g) / (g @ g))
    lr = rate / sharpness
    before = stepped(module, torch.optim.SGD(module.parameters(), lr=lr), lambda: module(batch))
    found = critical_learning_rate(h, before, lr)
    assert 4 <= found.passes <= 9
    assert (found.lr, found.reason) == (lr, "")
    if rate < 0.01:  # the root is 2000 steps away
        assert found.at_least
        assert found.learning_rate < 2 / sharpness
    else:
        assert not found.at_least
        assert found.sharpness == pytest.approx(sharpness, rel=1e-6)
        assert found.learning_rate == pytest.approx(2 / sharpness, rel=1e-6)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).to(dtype)
    batches = [(torch.randn(6, 5).to(dtype), torch.randint(3, (6,))) for _ in range(3)]
    return module, batches


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]).float(), batch[1])


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=3.0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=3),
}


@pytest.mark.parametrize("name", ["adam", slow("sgd"), slow("adagrad"), slow("lbfgs")])
@pytest.mark.parametrize("kind", [Hessian, slow(GGN)])
def test_the_loss_rises_there_and_not_before(name, kind):
    module, batches = network()
    optimizer = OPTIMIZERS[name](module.parameters())

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(module, batches[0])
        loss.backward()
        return loss

    for _ in range(3):
        before = copy_weights(module)
        optimizer.step(closure)
    operator = Hessian(cross_entropy, module, batches) if kind is Hessian else GGN(module, batches)
    found = critical_learning_rate(operator, before, 0.02)
    after = copy_weights(module)

    def loss(factor):
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(before[key].lerp(after[key], factor))
        module.eval()
        return sum(float(cross_entropy(module, batch).detach()) for batch in batches) / 3

    start = loss(0.0)
    assert found.passes <= 9
    assert 0 < found.factor < 128
    assert all(loss(share * found.factor) <= start for share in (0.1, 0.5, 0.9, 0.97))
    assert loss(1.03 * found.factor) > start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_changed_even_by_errors_and_interrupts(dtype):
    module, batches = network(dtype)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    before = stepped(module, optimizer, lambda: cross_entropy(module, batches[0]))
    after = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    versions = [p._version for p in module.parameters()]
    calls, fails = [0], [math.inf]

    def loss_fn(module, batch):
        calls[0] += 1
        if calls[0] >= fails[0]:
            raise errors[-1]
        return cross_entropy(module, batch)

    h = Hessian(loss_fn, module, batches)
    pending = cross_entropy(module.eval(), batches[0])  # a graph that saved the weights
    module.train()
    random = torch.get_rng_state()
    errors = [RuntimeError("no"), KeyboardInterrupt()]
    found = critical_learning_rate(h, before, 0.02)
    assert found.factor > 1
    held = h.loss()
    for fails[0] in (8, 11):
        calls[0] = 0
        with pytest.raises(type(errors[-1])):
            critical_learning_rate(h, before, 0.02)
        errors.pop()
    fails[0] = math.inf
    assert torch.equal(random, torch.get_rng_state())
    assert versions == [p._version for p in module.parameters()]
    assert all(torch.equal(tensor, after[name]) for name, tensor in module.state_dict().items())
    assert h.loss() == held
    torch.autograd.grad(pending, list(module.parameters()), allow_unused=True)
    with h.hold():  # a graph that is kept for products stays valid
        x = torch.ones(h.shape[0])
        product = h.matvec(x)
        critical_learning_rate(h, before, 0.02)
        assert torch.equal(h.matvec(x), product)


def line(loss, start, end):
    """Return what is found where the loss is a function of one weight, which a step has moved."""
    module = nn.Module()
    module.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    before = copy_weights(module)
    with torch.no_grad():
        module.x.fill_(end)
    found = critical_learning_rate(Hessian(lambda m, batch: loss(m.x).sum(), module, [torch.ones(1)]), before, 0.1)
    assert float(module.x.detach()) == end
    assert found.passes <= 9
    return found


def test_steps_of_every_kind():
    """Of a loss that never rises, one that rises at once, a wall of NaN, kinks, a step that changes nothing."""
    never = line(lambda x: x, 1.0, 0.5)
    assert (never.factor, never.at_least) == (128, True)
    uphill = line(lambda x: x**2, 1.0, 1.5)
    assert (uphill.factor, uphill.learning_rate, uphill.sharpness, uphill.at_least) == (0, 0, math.inf, False)
    assert line(lambda x: x**2, 1.0, 0.5).factor == pytest.approx(4)
    assert line(lambda x: x**2, 1.0, -9.0).factor == pytest.approx(0.2)
    assert 0.9 * 3 <= line(lambda x: x + (4 - (x - 1) ** 2).sqrt() * 0, 0.0, -1 / 3).factor <= 3  # NaN below -1
    assert line(lambda x: (x - 0.6).abs(), 0.0, 0.2).factor == pytest.approx(6, rel=0.03)
    for loss, end in ((lambda x: x**2, 1.0), (lambda x: 0 * x, 3.0), (lambda x: 1e14 + x, 0.9999)):
        found = line(loss, 1.0, end)
        assert math.isnan(found.factor)
        assert math.isnan(found.sharpness)
        assert found.reason == "the last step does not change the loss"
    before_it = line(lambda x: x.log(), -1.0, 0.5)
    assert math.isnan(before_it.factor)
    assert before_it.reason == "the loss before the last step is not finite"
    with pytest.raises(ValueError, match=r"is nan"):
        line(lambda x: x.log(), 0.5, -1.0)


@pytest.mark.usefixtures("untyped")
def test_copies_of_another_module_are_refused():
    module, batches = network()
    h = Hessian(cross_entropy, module, batches)
    for wrong in ({}, {**copy_weights(module), "0.weight": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"the copied weights are of other parameters .*; call copy_weights"):
            critical_learning_rate(h, wrong, 0.1)


@pytest.mark.slow
def test_two_ranks_find_what_one_does_with_whole_weights_and_with_shards(tmp_path):
    def ran(ranks, how):
        (folder := tmp_path / f"{how}{ranks}").mkdir()
        started = [Started(PROGRAM, folder, rank, ranks, how) for rank in range(ranks)]
        found = [process.communicate(300) for process in started]
        assert all(process.returncode == 0 for process in started), found
        return [output.split() for output, _ in found]

    ((alone, passes, numbers, same),) = ran(1, "whole")
    assert (numbers, same) == ("43", "True")
    for how, own in (("whole", ("43", "43")), ("shards", ("27", "16"))):
        found = ran(2, how)
        assert tuple(line[2] for line in found) == own
        for line in found:
            assert float(line[0]) == pytest.approx(float(alone), rel=1e-4)
            assert (line[1], line[3]) == (passes, "True")
