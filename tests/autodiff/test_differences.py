"""Differences of noisy gradients have the error that they state, at a step near the best one, or are refused."""

import math

import pytest
import torch

from lightning_sketch.autodiff.differences import CentralDifferences
from lightning_sketch.operators.space import VectorSpace

N = 2000
SPACE = VectorSpace(N, torch.float64, torch.device("cpu"))
DRAW = torch.Generator().manual_seed(0)
VALUES = torch.rand(N, generator=DRAW, dtype=torch.float64) + 0.5  # eigenvalues of the Hessian at zero
V = torch.nn.functional.normalize(torch.randn(N, generator=DRAW, dtype=torch.float64), dim=0)
KINKS = torch.randn(N, generator=DRAW, dtype=torch.float64)

NOISES = [0.0, 1e-9, 1e-6, 1e-3]
BENDS = [0.0, 0.1, 100.0]  # how far the loss is from a quadratic one


class Gradient:
    """The gradient d x + c (sin(50 x) / 50 - x), with independent noise of size sigma in each number.

    Its derivative at zero is d, and every odd power of a step is in a difference.
    """

    def __init__(self, sigma=0.0, bend=0.0, seed=1):
        self.sigma, self.bend, self.calls = sigma, bend, 0
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, x):
        self.calls += 1
        noise = torch.randn(N, generator=self.draw, dtype=torch.float64) if self.sigma else 0.0
        return VALUES * x + self.bend * ((50 * x).sin() / 50 - x) + self.sigma * noise

    @property
    def noise(self):
        """The length of the noise of half the difference of two gradients."""
        return self.sigma * math.sqrt(N / 2)


def differences(gradient, step=None):
    return CentralDifferences(lambda v, h: (gradient(h * v) - gradient(-h * v)) / (2 * h), SPACE, step)


def error_at(gradient, step):
    """Return the error of a product at a step, and the bound that is stated."""
    found = differences(gradient, step)
    found.choose(V, 1e-3)
    return float((found.product(V) - VALUES * V).norm()), float(found.error.norm())


CASES = [(sigma, bend) for sigma in NOISES for bend in BENDS if (sigma, bend) != (1e-3, 100.0)]


@pytest.mark.parametrize(("sigma", "bend"), CASES)
def test_the_stated_error_is_the_error(sigma, bend):
    """Measured: it is between 0.68 and 1.19 of what is stated.

    Where noise is twice the truncation error, this is the root of a difference, known to a quarter from N numbers.
    """
    found = differences(Gradient(sigma, bend))
    found.choose(V, 1e-3)
    for seed in range(5):
        v = torch.nn.functional.normalize(torch.randn(N, generator=torch.Generator().manual_seed(seed)).double(), dim=0)
        off = float((found.product(v) - VALUES * v).norm())
        assert off <= 1.25 * float(found.error.norm()) + 1e-14  # rounding, if there is no noise
        assert float(found.error.norm()) <= 2 * off


@pytest.mark.parametrize(("sigma", "bend"), [case for case in CASES if case[0]])
def test_noise_is_measured(sigma, bend):
    gradient = Gradient(sigma, bend)
    found = differences(gradient)
    found.choose(V, 1e-3)
    assert found.noise == pytest.approx(gradient.noise, rel=0.1)


@pytest.mark.parametrize(("sigma", "bend"), [case for case in CASES if min(case)])
def test_the_step_is_near_the_best_one(sigma, bend):
    """Measured: 1 to 17 times the least error. Truncation that extrapolation removes is counted in the choice."""
    found = differences(Gradient(sigma, bend))
    found.choose(V, 1e-3)
    best = min(error_at(Gradient(sigma, bend), 10 ** (k / 4))[0] for k in range(-28, 8))
    assert error_at(Gradient(sigma, bend), found.step)[0] <= 20 * best


@pytest.mark.parametrize("near", [1e-3, 1e-2, 0.3, 1.0])
def test_the_first_step_does_not_matter(near):
    found = differences(Gradient(1e-6, 0.1))
    found.choose(V, near)
    assert 0.04 <= found.step <= 0.5


@pytest.mark.parametrize("step", [1e-4, 1e-2, 1e-1])
def test_a_given_step_stays_and_its_error_is_known(step):
    """At a step that is too large, truncation up to the order h⁴ is removed; of a cubic gradient there is no more."""
    gradient = Gradient(1e-6, 1.0)
    found = differences(gradient, step)
    found.choose(V, 1e-3)
    assert found.step == step
    off = float((found.product(V) - VALUES * V).norm())
    assert off <= 1.1 * float(found.error.norm())


def test_a_product_is_linear_in_the_length_of_its_vector():
    found = differences(Gradient(0.0, 1.0))
    found.choose(V, 1e-3)
    product, error = found.product(V), found.error
    assert torch.allclose(found.product(-1e6 * V), -1e6 * product, rtol=1e-9, atol=0)
    assert float(found.error.norm()) == pytest.approx(1e6 * float(error.norm()), rel=1e-2)
    assert not found.product(torch.zeros_like(V)).any()
    assert found.error is None


def test_noise_as_large_as_the_smallest_truncation_is_refused():
    with pytest.raises(ValueError, match="too coarse"):
        differences(Gradient(1e-3, 100.0)).choose(V, 1e-3)


@pytest.mark.parametrize("at", [1e-3, 1e3])
def test_gradients_that_are_noise_alone_are_refused(at):
    noise = torch.Generator().manual_seed(2)
    found = differences(lambda x: torch.randn(N, generator=noise, dtype=torch.float64))
    with pytest.raises(ValueError, match="differences of gradients say nothing here"):
        found.choose(V, at)


def test_kinks_are_refused():
    """A gradient that jumps where |x| has kinks; between the jumps it says nothing of them."""
    found = differences(lambda x: 100 * (x - 1e-3 * KINKS * V).sign())
    with pytest.raises(ValueError, match="kinks"):
        found.choose(V, 1e-3)


def test_gradients_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="say nothing"):
        differences(lambda x: x / 0).choose(V, 1e-3)


def test_steps_to_where_the_gradient_is_not_finite_are_left_out():
    gradient = Gradient(1e-9, 1.0)
    found = differences(lambda x: gradient(x) if x.norm() < 1e-2 else x / 0)
    found.choose(V, 1.0)
    assert found.step < 1e-2
    assert found.noise == pytest.approx(gradient.noise, rel=0.1)


def test_a_constant_gradient_has_no_hessian():
    found = differences(lambda x: torch.ones_like(x))
    found.choose(V, 1e-3)
    assert not found.product(V).any()
    assert not float(found.error.norm())


@pytest.mark.parametrize("sigma", NOISES)
def test_the_search_for_a_step_takes_few_gradients(sigma):
    gradient = Gradient(sigma, 1.0)
    found = differences(gradient)
    found.choose(V, 1e-3)
    assert gradient.calls <= 30
    before = gradient.calls
    found.product(V)
    assert gradient.calls == before + 4
