"""How a run goes: when it stops, what it repeats, what it refuses."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_sketch.curvature import Hessian, spectrum
from lightning_sketch.operators import LinearOperator

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def decaying(n=3000):
    """Five outliers over a bulk of both signs."""
    values = torch.linspace(-0.5, 1, n, dtype=torch.float64)
    values[:5] = torch.tensor([5.0, 4, 3, 2, -2])
    return Diagonal(values)


class Diagonal(LinearOperator):
    """A diagonal matrix, with noise of relative size `noise` in every product."""

    def __init__(self, values, noise=0.0):
        self.values, self.dtype, self.noise = values, values.dtype, noise
        self.generator = torch.Generator().manual_seed(0)

    @property
    def shape(self):
        return len(self.values), len(self.values)

    def matvec(self, x):
        y = self.values * x
        noise = torch.randn(y.shape, dtype=y.dtype, generator=self.generator)
        return y + self.noise * y.norm() * noise / noise.norm()

    rmatvec = matvec


class FreshHalf:
    """Batches that can be read again, and differ every time."""

    def __iter__(self):
        yield X[torch.randperm(len(X))[: len(X) // 2]]


def network(dropout=0.0):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))


def quartic(module, x):
    return module(x).pow(4).mean()


def run(operator, **kwargs):
    return spectrum(operator, **{"num_matvecs": 64, "top_k": 5, "bottom_k": 1} | kwargs)


def test_it_stops_once_what_is_wanted_is_accepted():
    early, late = run(decaying()), run(decaying(), tol=0.0)
    assert early.num_products < late.num_products == 64 + 6
    assert (early.residuals <= early.tol * early.eigenvalues.abs())[[0, 1, 2, 3, -1]].all()
    torch.testing.assert_close(early.top(4), torch.tensor([5.0, 4, 3, 2]).double(), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(early.bottom(1), torch.tensor([-2.0]).double(), rtol=1e-2, atol=0.0)


def test_it_stops_later_where_more_is_wanted():
    few, more = run(decaying(), top_k=2, bottom_k=0), run(decaying(), top_k=5, bottom_k=1)
    finer = run(decaying(), top_k=2, bottom_k=0, tol=1e-8)
    assert few.num_products < min(more.num_products, finer.num_products)


def test_a_run_that_never_gets_there_takes_all_its_products():
    sp = run(decaying(), num_matvecs=20, top_k=15)
    assert sp.num_products == 26
    assert not sp.converged[:15].all()


def test_every_product_is_announced():
    calls = []
    sp = run(decaying(), on_product=lambda *done: calls.append(done))
    assert calls == [(i, 64) for i in range(1, sp.num_products - 6 + 1)]


def test_the_same_seed_gives_the_same_bits():
    one, two = run(decaying(), seed=5), run(decaying(), seed=5)
    assert torch.equal(one.eigenvalues, two.eigenvalues)
    assert torch.equal(one.residuals, two.residuals)


def test_another_seed_starts_elsewhere_and_agrees():
    one, two = run(decaying(), seed=5, tol=1e-6, top_k=4), run(decaying(), seed=6, tol=1e-6, top_k=4)
    assert not torch.equal(one.eigenvalues, two.eigenvalues)
    torch.testing.assert_close(one.top(4), two.top(4), rtol=1e-6, atol=0.0)


def test_the_random_state_stays(untyped):
    """Compared under `untyped`: the checks of types draw from Python's generator themselves."""

    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    h, before = Hessian(quartic, network(), [X]), state()
    run(h)
    assert state() == before


@pytest.mark.parametrize("batches", [FreshHalf(), [X]], ids=["fresh batches", "one batch"])
@pytest.mark.parametrize(
    ("module", "loss_fn", "mode"),
    [
        (network(), quartic, "eval"),
        (network(dropout=0.5), quartic, "train"),
        (network(), lambda module, x: functional.dropout(module(x), 0.5).pow(4).mean(), "eval"),
    ],
    ids=["plain", "live dropout", "dropout in the loss"],
)
def test_a_loss_that_changes_between_calls_is_refused(batches, module, loss_fn, mode):
    h = Hessian(loss_fn, module, batches, mode=mode)
    if isinstance(batches, list) and loss_fn is quartic and mode == "eval":
        assert run(h).linearity_defect < 1e-5  # nothing is drawn here
        return
    with pytest.raises(ValueError, match=r"not linear: A\(u \+ v\) differs .* by .*%.*drawn anew.*mode='eval'"):
        run(h)


def test_what_is_only_roughly_linear_is_warned_of():
    """Noise of 1 % in every product: a defect of about 2 %, between 3e-3 and 0.05."""
    noisy = Diagonal(decaying().values, noise=1e-2)
    with pytest.warns(UserWarning, match=r"linear only to [123]\.\de-02 .* mean nothing"):
        sp = run(noisy, num_matvecs=32)
    assert 3e-3 < sp.linearity_defect < 0.05
    assert (sp.residuals >= sp.linearity_defect * sp.lambda_max).all()


def test_bfloat16_like_noise_does_not_multiply_the_outliers():
    """The threshold follows the noise: 64 noisy products show each outlier once."""
    noisy = Diagonal(decaying().values, noise=1e-3)
    sp = run(noisy, tol=0.0)
    assert (sp.eigenvalues > 1.5).sum() == 4
    torch.testing.assert_close(sp.top(4), torch.tensor([5.0, 4, 3, 2]).double(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bad):
    h = Hessian(lambda module, x: bad * quartic(module, x), network(), [X])
    with pytest.raises(ValueError, match="not finite; the loss is NaN or infinite at these parameters"):
        run(h)


def test_a_product_that_overflows_on_the_way_is_refused():
    """Finite on the vectors that measure the defect, not on a later one."""
    products = iter(range(100))

    class Late(Diagonal):
        def matvec(self, x):
            return super().matvec(x) * (float("nan") if next(products) > 8 else 1)

    with pytest.raises(ValueError, match="not finite"):
        run(Late(decaying().values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 127}, r"need dim >= 2 num_matvecs .* got dim=127, num_matvecs=64"),
        ({"num_matvecs": 5}, r"5 products show at most 5 .* top_k=5 and bottom_k=1; raise num_matvecs"),
        ({"top_k": 0, "bottom_k": 0}, "one above 0, got top_k=0, bottom_k=0"),
        ({"top_k": -1}, "got top_k=-1"),
        ({"tol": -1.0}, "need tol >= 0, got tol=-1.0"),
        ({"tol": float("nan")}, "need tol >= 0, got tol=nan"),
    ],
)
def test_arguments_out_of_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(decaying(), **arguments)


def test_an_operator_that_is_not_square(dense_operator):
    with pytest.raises(ValueError, match=r"needs a square operator, got shape \(3, 4\)"):
        spectrum(dense_operator(torch.ones(3, 4)))
