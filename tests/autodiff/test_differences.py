"""Differences of noisy gradients have the error that they state, at a step near the best one, or are refused."""

import math
from functools import partial

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
    """Return differences of this gradient, at zero."""

    def difference(v, h):
        return (gradient(h * v) - gradient(-h * v)) / (2 * h)

    found = CentralDifferences(SPACE, step)
    found.choose, found.product = partial(found.choose, difference), partial(found.product, difference)
    return found


def stated(found):
    return 0.0 if found.error is None else float(found.error.norm())


def error_at(gradient, step):
    """Return the error of a product at a step, and the bound that is stated."""
    found = differences(gradient, step)
    found.choose(V, 1e-3)
    return float((found.product(V) - VALUES * V).norm()), stated(found)


CASES = [(sigma, bend) for sigma in NOISES for bend in BENDS if (sigma, bend) != (1e-3, 100.0)]


@pytest.mark.parametrize(("sigma", "bend"), [case for case in CASES if case != (1e-3, 0.1)])
def test_the_stated_error_is_the_error(sigma, bend):
    """It is half of what is stated, or less where truncation is removed to a higher order."""
    found = differences(Gradient(sigma, bend))
    found.choose(V, 1e-3)
    for seed in range(5):
        v = torch.nn.functional.normalize(torch.randn(N, generator=torch.Generator().manual_seed(seed)).double(), dim=0)
        off = float((found.product(v) - VALUES * v).norm())
        assert off <= 0.75 * stated(found) + 1e-14  # rounding, if there is no noise
        assert stated(found) <= 4 * off


def test_what_changes_on_a_scale_below_the_step_is_not_seen():
    """With this noise differences agree only at steps beyond all bends, where the loss is quadratic once more."""
    found = differences(Gradient(1e-3, 0.1))
    found.choose(V, 1e-3)
    product = found.product(V)
    assert float((product - (VALUES - 0.1) * V).norm()) <= stated(found)
    assert found.step > 0.1


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
    assert off <= 1.1 * stated(found)


def test_a_product_is_linear_in_the_length_of_its_vector():
    found = differences(lambda x: VALUES * x + x**3 + x**2, step=0.1)
    product, error = found.product(V), found.error
    assert torch.allclose(found.product(-1e6 * V), -1e6 * product, rtol=1e-9, atol=0)
    assert stated(found) == pytest.approx(1e6 * float(error.norm()), rel=1e-2)
    assert not found.product(torch.zeros_like(V)).any()
    assert found.error is None


def test_noise_as_large_as_the_smallest_truncation_is_refused():
    with pytest.raises(ValueError, match="too coarse"):
        differences(Gradient(1e-3, 100.0)).choose(V, 1e-3)


@pytest.mark.parametrize("at", [1e-3, 1e3])
def test_gradients_that_are_noise_alone_are_refused(at):
    noise = torch.Generator().manual_seed(2)
    found = differences(lambda x: torch.randn(N, generator=noise, dtype=torch.float64))
    with pytest.raises(ValueError, match="differences of gradients do not agree"):
        found.choose(V, at)


def test_kinks_are_refused():
    """A gradient that jumps where |x| has kinks; between the jumps it says nothing of them."""
    found = differences(lambda x: 100 * (x - 1e-3 * KINKS * V).sign())
    with pytest.raises(ValueError, match="kinks"):
        found.choose(V, 1e-3)


def test_gradients_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="do not agree"):
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
    assert not stated(found)


@pytest.mark.parametrize("sigma", NOISES)
def test_the_search_for_a_step_takes_few_gradients(sigma):
    gradient = Gradient(sigma, 1.0)
    found = differences(gradient)
    found.choose(V, 1e-3)
    assert gradient.calls <= 30
    before = gradient.calls
    found.product(V)
    assert gradient.calls == before + 4


@pytest.mark.parametrize("where", [0.02, 0.04, 0.08, 0.15, 0.3, 0.6])
def test_a_jump_of_the_gradient_is_in_the_stated_error(where):
    """At steps beyond a kink no difference is right, and extrapolation would be off by seven times its own estimate."""
    jump = torch.nn.functional.normalize(KINKS, dim=0)
    found = differences(lambda x: VALUES * x + jump * (float(x @ V) > where), step=0.25)
    off = float((found.product(V) - VALUES * V).norm())
    assert off <= stated(found) + 1e-12
    if where < 0.25:
        assert off > 0.1
