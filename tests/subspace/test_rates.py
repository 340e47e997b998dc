"""Each dimension is asked at its best rate, by few runs; the order in which dimensions are asked."""

import math
import random

import pytest

from lightning_sketch.subspace._rates import BUDGET, Rates
from lightning_sketch.subspace.tuner import _bisect, _grid

DIMS = [1 << k for k in range(3, 14)]
LADDER = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


def asked(metric, seeds=1, rates=None, dims=DIMS, order=_grid):
    """Search for the first dimension with a metric of 1 or more, given dim, seed and rate; return the questions."""
    found = Rates(lambda asked: [{"value": metric(*one)} for one in asked], lambda value: value, seeds, rates)
    order(dims, found.reaches)
    return found


def peaked(optimum, needed=500):
    """Return a metric that is best at the rate 10^optimum(dim), and falls by 1 at a factor of ten beside it."""

    def metric(dim, seed, rate):
        return (dim / needed) ** 0.3 - abs(math.log10(rate) - optimum(dim)) ** 2

    return metric


OPTIMA = {
    "1": lambda dim: 0,
    "30": lambda dim: 1.5,
    "0.03": lambda dim: -1.5,
    "falling": lambda dim: 1.5 - math.log10(dim) / 2,
    "rising": lambda dim: math.log10(dim) / 2 - 1.5,
}


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("optimum", OPTIMA.values(), ids=OPTIMA)
@pytest.mark.parametrize("order", [_grid, _bisect])
def test_the_answer_is_that_of_the_best_rate(optimum, seeds, order):
    """The first dimension that reaches 1 at any rate of the ladder is found, though its rate is not known before.

    The rate of a rung is off by at most a quarter of a factor of ten, so that the metric loses less than 0.07.
    """
    metric = peaked(optimum)
    truth = next(dim for dim in DIMS if max(metric(dim, 0, rate) for rate in LADDER) >= 1)
    found = asked(metric, seeds, order=order)
    assert next(dim for dim in sorted(found.answers) if found.answers[dim]) in (truth, 2 * truth)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_all_runs_are_within_the_budget_whatever_the_metric(seeds):
    """The budget is 2.5 times a run for each dimension and seed, and full training."""
    for draw in range(50):
        rng = random.Random(draw)
        noise = {}
        metric = lambda *key: noise.setdefault(key, rng.choice([rng.random(), 1.2, math.nan]))  # noqa: E731, B023
        found = asked(metric, seeds, order=rng.choice([_grid, _bisect]))
        assert 1 + len(found.runs) <= BUDGET * (1 + seeds * len(found.answers))


def test_a_metric_that_rises_for_ever_with_the_rate_does_not_climb_for_ever():
    found = asked(lambda dim, seed, rate: -1 / rate)
    assert 1 + len(found.runs) <= BUDGET * (1 + len(DIMS))


def test_a_dimension_that_is_enough_is_not_asked_at_other_rates():
    found = asked(lambda dim, seed, rate: 1.0, seeds=3)
    assert list(found.runs) == [(dim, seed, 1.0) for dim in DIMS[:2] for seed in range(3)]


def test_one_seed_chooses_the_rate_of_all():
    """At a dimension that is not enough, other seeds are run at the best rate alone."""
    found = asked(lambda dim, seed, rate: {0.3: 0.8, 0.1: 0.7}.get(rate, 0.6), seeds=3, dims=[8])
    assert list(found.runs) == [(8, 0, 1.0), (8, 0, 0.3), (8, 0, 0.1), (8, 1, 0.3), (8, 2, 0.3)]


def test_the_mean_over_seeds_decides_and_not_the_first():
    """The mean of 1.1, 0.5 and 0.5 is not 1, that of three times 1.2 at another rate is."""
    first_alone = (1.1, 0.5, 0.5)
    assert asked(lambda dim, seed, rate: first_alone[seed], seeds=3, dims=[8]).answers == {8: False}
    found = asked(lambda dim, seed, rate: 1.2 if rate == 0.3 else first_alone[seed], seeds=3, dims=[8])
    assert found.answers == {8: True}
    assert (8, 2, 0.3) in found.runs


def test_runs_that_diverge_lead_to_smaller_rates():
    found = asked(lambda dim, seed, rate: math.nan if rate > 0.1 else dim / 64)
    assert next(dim for dim, enough in found.answers.items() if enough) == 64
    assert all(rate >= 0.01 for _, _, rate in found.runs)


def test_from_a_rate_that_diverges_it_goes_down_though_the_last_step_was_up():
    """At 8 directions 3 is better than 1, at 16 both diverge and 0.3 is enough."""

    def metric(dim, seed, rate):
        return rate / 100 if dim == 8 else (1.2 if rate < 1 else math.nan)

    found = asked(metric, seeds=3, dims=[8, 16])
    assert found.answers == {8: False, 16: True}


GIVEN = [([0.3, 1.0, 3.0], 1.0), ([2.0, 5.0], 2.0), ([7.0], 7.0), ([0.01, 0.2], 0.2)]


@pytest.mark.parametrize(("rates", "first"), GIVEN)
def test_rates_that_are_given_are_the_only_ones(rates, first):
    """The first is the nearest to 1."""
    found = asked(peaked(lambda dim: 2), rates=rates)
    assert {rate for _, _, rate in found.runs} == set(rates)
    assert next(iter(found.runs))[2] == found.first == first
    if len(rates) == 1:
        assert len(found.runs) == len(found.answers)


@pytest.mark.parametrize("length", range(1, 26))
def test_a_bisection_asks_no_more_dimensions_than_a_grid(length):
    """Whichever place is the first that is enough, and if none is; both find it, and one more confirms it.

    A bisection takes as many questions to get beyond place k as to come back to it: about the logarithm of k.
    """
    for enough in range(length + 1):
        questions = []
        for order in (_grid, _bisect):
            metric = lambda place, *_: place - enough + 1  # noqa: E731, B023
            places = asked(metric, rates=[1.0], dims=range(1, length + 1), order=order).answers
            assert min((place for place, yes in places.items() if yes), default=length + 1) == max(1, enough)
            assert max(1, enough) >= length or max(1, enough) + 1 <= max(places)
            questions.append(len(places))
        assert questions[1] <= min(questions[0], 2 * math.log2(enough + 2) + 2)


@pytest.mark.parametrize("order", [_grid, _bisect])
def test_one_lucky_dimension_does_not_end_a_search(order):
    found = asked(lambda dim, *_: dim in (16, 128, 256, 512, 1024, 2048, 4096, 8192), rates=[1.0], order=order)
    assert (found.answers[128], found.answers.get(256, True)) == (True, True)
