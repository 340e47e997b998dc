"""How a run goes: when it stops, what it repeats, what it leaves alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_sketch.curvature import Hessian, spectrum

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def network(dropout=0.0):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))


def quartic(module, x):
    return module(x).pow(4).mean()


def run(operator, **kwargs):
    return spectrum(operator, **{"num_matvecs": 64, "top_k": 5, "bottom_k": 1} | kwargs)


def test_it_stops_once_what_is_wanted_is_accepted(outliers):
    early, late = run(outliers()), run(outliers(), tol=0.0)
    assert early.num_products < late.num_products == 64 + 16 + 3  # a quarter searches for copies
    assert (early.residuals <= early.tol * early.eigenvalues.abs())[[0, 1, 2, 3, -1]].all()
    torch.testing.assert_close(early.top(4), torch.tensor([5.0, 4, 3, 2]).double(), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(early.bottom(1), torch.tensor([-2.0]).double(), rtol=1e-2, atol=0.0)


def test_it_stops_later_where_more_is_wanted(outliers):
    few = run(outliers(), top_k=2, bottom_k=0)
    more = run(outliers(), top_k=5, bottom_k=0)  # the fifth is the edge of the bulk
    below = run(outliers(), top_k=2, bottom_k=2)  # and so is the second from below
    finer = run(outliers(), top_k=2, bottom_k=0, tol=1e-12)
    assert few.num_products < min(more.num_products, below.num_products, finer.num_products)


def test_a_run_that_never_gets_there_takes_all_its_products(outliers):
    sp = run(outliers(), num_matvecs=20, top_k=15)
    assert sp.num_products == 20 + 8 + 3
    assert not sp.converged[:15].all()


@pytest.mark.parametrize("tol", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("num_matvecs", [6, 20, 64, 96])
def test_the_number_of_products_is_bounded(outliers, num_matvecs, tol):
    """`num_matvecs`, a quarter as many (at least 8) that search for copies, and 3 that measure the defect."""
    operator, calls = outliers(), []
    product = operator.matvec
    operator.matvec = lambda x: calls.append(0) or product(x)
    sp = run(operator, num_matvecs=num_matvecs, tol=tol)
    assert sp.num_products == len(calls) <= num_matvecs + max(8, num_matvecs // 4) + 3


def test_every_product_is_announced(outliers):
    calls = []
    sp = run(outliers(), on_product=lambda *done: calls.append(done))
    assert calls == [(i, max(i, 64)) for i in range(1, sp.num_products - 3 + 1)]


def test_the_same_seed_gives_the_same_bits(outliers):
    one, two = run(outliers(), seed=5), run(outliers(), seed=5)
    assert torch.equal(one.eigenvalues, two.eigenvalues)
    assert torch.equal(one.residuals, two.residuals)


def test_another_seed_starts_elsewhere_and_agrees(outliers):
    one, two = run(outliers(), seed=5, tol=1e-6, top_k=4), run(outliers(), seed=6, tol=1e-6, top_k=4)
    assert not torch.equal(one.eigenvalues, two.eigenvalues)
    torch.testing.assert_close(one.top(4), two.top(4), rtol=1e-6, atol=0.0)


def test_the_random_state_stays(untyped):
    """Compared under `untyped`: the checks of types draw from Python's generator themselves."""

    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    h, before = Hessian(quartic, network(), [X]), state()
    run(h)
    assert state() == before


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5, 1e-6])
def test_noise_does_not_multiply_the_outliers(outliers, noise):
    """The threshold follows the noise: 96 noisy products, far more than needed, find each outlier once."""
    sp = run(outliers(noise=noise), num_matvecs=96, tol=0.0)
    assert (sp.eigenvalues > 1.5).sum() == 4
    assert (sp.eigenvalues < -1).sum() == 1
    torch.testing.assert_close(sp.top(4), torch.tensor([5.0, 4, 3, 2]).double(), rtol=1e-3, atol=0)
