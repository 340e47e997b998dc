"""The edge of stability is where PyTorch's own optimizers begin to diverge on quadratics."""

import math
import re

import pytest
import torch
from marks import slow, some
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

from lightning_sketch.curvature import (
    CriticalLearningRate,
    Hessian,
    Preconditioned,
    Stability,
    spectrum,
    stability_edge,
    verdict,
)

LONG = 1 - 1e-12  # the decay of a mean over so many steps that it stays as it is


def adam(kind=Adam, beta=0.9, **options):
    return lambda p: kind(p, lr=0.1, betas=(beta, LONG), **options)


# Each with its edge at lr 0.1, derived by hand: 0.96^5 = 0.8154, so that the momentum of the last is 0.5331.
OPTIMIZERS = {
    "sgd": (lambda p: SGD(p, lr=0.1), 20),
    "momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9), 38),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 38 / 2.8),
    "dampening": (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.4), 38 / 0.6),
    "adam": (adam(), 380),
    "adam beta 0.5": (adam(beta=0.5), 60),
    "adam beta 0": (adam(beta=0.0), 20),
    "adamw": (adam(AdamW, weight_decay=0), 380),
    "amsgrad": (adam(AdamW, beta=0.5, amsgrad=True, weight_decay=0), 60),
    "adamax": (adam(Adamax), 380),
    "rmsprop": (lambda p: RMSprop(p, lr=0.1, alpha=LONG), 20),
    "rmsprop momentum": (lambda p: RMSprop(p, lr=0.1, alpha=LONG, momentum=0.9, centered=True), 38),
    "adagrad": (lambda p: Adagrad(p, lr=0.1, lr_decay=1e-15), 20),
    "nadam, schedule at its end": (adam(NAdam, momentum_decay=1.0), 380 / 2.8),
    "nadam, amid its schedule": (adam(NAdam, momentum_decay=5e-15), 38 / (1.9 * 0.4669 + 0.1 * 0.5331)),
}


def frozen(make, groups, square=4.0):
    """Return an optimizer whose P stays as it is, since gradients are tiny beside its state."""
    optimizer = make(groups)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        for key in state.keys() & {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"}:
            state[key].copy_(torch.as_tensor(square).expand_as(state[key]))
        if "step" in state:
            state["step"].fill_(1e15)
        if "mu_product" in state:
            state["mu_product"].zero_()
    return optimizer


def growth(optimizer, parameters, loss, steps=500):
    """Return by what factor an optimizer multiplies the parameters from steps / 2 to the end."""
    sizes = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        sizes.append(max(float(p.detach().abs().max()) for p in parameters))
        if sizes[-1] > 1e-10:  # from 1e-90; larger gradients would change P
            return math.inf
    return max(sizes[-40:]) / (max(sizes[steps // 2 : steps // 2 + 40]) or 1.0)


@pytest.mark.parametrize("name", some(OPTIMIZERS, ["adam", "nesterov", "rmsprop momentum", "nadam, amid its schedule"]))
def test_steps_on_a_parabola_shrink_below_the_edge_and_grow_above(name):
    make, edge = OPTIMIZERS[name]

    def run(eigenvalue):
        x = nn.Parameter(torch.full((), 1e-90, dtype=torch.float64))
        optimizer = frozen(make, [x])
        p = {SGD: 1, Adamax: 4, Adagrad: 2 * 2}.get(type(optimizer), 2)
        found = stability_edge(optimizer)
        assert (found.lr, found.reason, found.optimizer) == (0.1, "", type(optimizer).__name__)
        assert found.edge == pytest.approx(edge, rel=1e-3)
        return growth(optimizer, [x], lambda: eigenvalue * p * x**2 / 2)

    for share in (0.05, 0.5, 0.97):
        assert run(share * edge) < 1
    assert run(1.03 * edge) > 1


class Parabola(nn.Module):
    """x H x / 2 with two parameters."""

    def __init__(self, h):
        super().__init__()
        self.h = h
        self.first = nn.Parameter(1e-90 * torch.randn(2, 2, dtype=torch.float64))
        self.second = nn.Parameter(1e-90 * torch.randn(3, dtype=torch.float64))

    def forward(self, factor):
        x = torch.cat([self.first.flatten(), self.second])
        return factor * (x @ self.h @ x) / 2


@pytest.mark.parametrize("name", ["adam beta 0.5", slow("adagrad"), slow("rmsprop momentum"), slow("momentum")])
def test_the_ratio_of_two_groups_predicts_divergence(name):
    """P differs from number to number, H is dense, and the second group has a third of the rate."""
    torch.manual_seed(0)
    a = torch.randn(7, 7, dtype=torch.float64)
    module = Parabola(a @ a.T)

    def optimizer(square):
        groups = [{"params": [module.first]}, {"params": [module.second], "lr": 0.1 / 3}]
        made = frozen(OPTIMIZERS[name][0], groups)
        for parameter, values in ((module.first, square[:4]), (module.second, square[4:])):
            for key in made.state[parameter].keys() & {"exp_avg_sq", "square_avg", "sum"}:
                made.state[parameter][key].copy_(values.view_as(parameter))
        return made

    square = 0.1 + 3 * torch.rand(7, dtype=torch.float64)

    def ratio(factor):
        made, h = optimizer(square), Hessian(lambda module, batch: module(batch), module, [torch.tensor(factor)])
        edge = stability_edge(made)
        assert edge.lr == 0.1
        return spectrum(Preconditioned.from_optimizer(h, made), top_k=1, bottom_k=0).lambda_max / edge.edge

    once = ratio(1.0)
    for aim in (0.9, 0.98, 1.02, 1.1):
        factor = aim / once
        assert ratio(factor) == pytest.approx(aim, rel=1e-6)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(1e-90 * torch.randn_like(p))
        grown = growth(optimizer(square), list(module.parameters()), lambda f=factor: module(torch.tensor(f)))
        assert (grown > 1) == (aim > 1)


def groups(**options):
    module = nn.Linear(2, 1)
    return [{"params": [module.weight]}, {"params": [module.bias], **options}]


@pytest.mark.parametrize(
    ("optimizers", "preconditioned", "reason"),
    [
        (
            lambda: Adam(groups(betas=(0.5, 0.99))),
            True,
            "different betas or momentum have different edges: 6 / lr and 38",
        ),
        (lambda: [SGD(groups(), lr=0.1, momentum=0.9), Adam(groups())], True, "have different edges: 3.8 / lr and 38"),
        (lambda: Adam(groups()), False, r"Adam divides its steps by a diagonal; pass preconditioner='optimizer'"),
        (lambda: SGD(groups(lr=0.2), lr=0.1), False, "param groups have different learning rates"),
        (lambda: SGD(groups(), lr=0.1, maximize=True), True, "SGD with maximize=True climbs the loss"),
        (lambda: SGD(groups(), lr=0.1, momentum=0.9, dampening=1), True, "SGD with dampening=1 takes no steps"),
        (lambda: SGD(groups(), lr=0.0), True, "the learning rate of SGD is not positive"),
        (lambda: torch.optim.LBFGS(nn.Linear(2, 1).parameters()), True, "no edge of stability is known for LBFGS"),
        (lambda: torch.optim.RAdam(groups()), False, "no edge of stability is known for RAdam"),
        (lambda: type("Own", (SGD,), {})(groups(), lr=0.1), True, "no edge of stability is known for Own"),
        (lambda: NAdam(groups()), True, "NAdam has not stepped yet"),
        (lambda: [], True, "the learning rate of no optimizer is not positive"),
    ],
)
def test_an_edge_that_is_not_known_is_nan_with_the_reason(optimizers, preconditioned, reason):
    found = stability_edge(optimizers(), preconditioned=preconditioned)
    assert math.isnan(found.edge)
    assert re.search(reason, found.reason)


def test_rates_of_groups():
    """Different second betas only change P; several optimizers of one kind have one edge, at the largest rate."""
    assert stability_edge(Adam(groups(betas=(0.9, 0.5)), lr=0.1)).edge == pytest.approx(380)
    assert stability_edge(SGD(groups(), lr=0.1), preconditioned=False).edge == pytest.approx(20)
    two = stability_edge([SGD(groups(), lr=0.1), SGD(groups(), lr=0.4)])
    assert two.edge == pytest.approx(5)
    assert two.lr == 0.4
    assert math.isnan(stability_edge([SGD(groups(), lr=0.1), SGD(groups(), lr=0.4)], preconditioned=False).lr)


ADAM = Stability(3e-4, 100.0, "Adam")


@pytest.mark.parametrize(
    ("lambda_max", "stability", "critical", "sentence"),
    [
        (
            70.0,
            ADAM,
            CriticalLearningRate(2.13, 3e-4),
            "stability: 0.7 of the edge (Adam, lr 3e-4); the largest step that still lowers the loss is 2.1 "
            "times yours.",
        ),
        (123.0, ADAM, None, "stability: 1.2 times the edge (Adam, lr 3e-4)."),
        (
            math.nan,
            ADAM,
            CriticalLearningRate(128.0, 3e-4, at_least=True),
            "stability: not known (Adam, lr 3e-4), since the largest eigenvalue has not converged; even 128 times the "
            "last step would still lower the loss.",
        ),
        (
            1.0,
            Stability(math.nan, math.nan, "SGD", "param groups have different learning rates"),
            CriticalLearningRate(0.4, math.nan),
            "stability: no edge is known (SGD, different learning rates), since param groups have different learning "
            "rates; the last step raised the loss; the largest that still lowers it is 0.4 times yours.",
        ),
        (
            1e-9,
            ADAM,
            CriticalLearningRate(0.0, 3e-4),
            "stability: 1e-11 of the edge (Adam, lr 3e-4); the last step was not downhill on these batches, as is "
            "common with momentum and small batches, so that it says nothing about the rate.",
        ),
        (
            1e6,
            ADAM,
            CriticalLearningRate(math.nan, 3e-4, reason="the last step does not change the loss"),
            "stability: 10000 times the edge (Adam, lr 3e-4); no critical learning rate, since the last step does not "
            "change the loss.",
        ),
    ],
)
def test_the_sentence(lambda_max, stability, critical, sentence):
    assert verdict(lambda_max, stability, critical) == sentence
