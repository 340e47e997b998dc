"""Removal and leave-one-out are what retraining says, in closed form on a ridge regression and on a linear model."""

import pytest
import torch

from lightning_sketch.metrics import leave_one_out, removal_curve


class Ridge:
    """A ridge regression of 40 examples and the squared errors of 6 queries, in float64."""

    def __init__(self, decay=0.5):
        generator = torch.Generator().manual_seed(0)
        self.x, self.z = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (40, 6))
        self.y, self.t = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (40, 6))
        self.decay, self.seen = decay, []

    def weights(self, ids):
        x = self.x[ids]
        return torch.linalg.solve(x.T @ x + self.decay * torch.eye(5, dtype=torch.float64), x.T @ self.y[ids])

    def losses(self, weights):
        return (self.z @ weights - self.t).square()

    def train(self, ids):
        self.seen.append(ids)
        return self.losses(self.weights(ids))


def test_leave_one_out_is_the_closed_form_of_a_ridge_regression():
    """By Sherman and Morrison: theta - theta_without_i = H⁻¹ x_i r_i / (1 - x_iᵀ H⁻¹ x_i), without any retraining."""
    ridge, everything = Ridge(), torch.arange(40)
    theta = ridge.weights(everything)
    inverse = torch.linalg.inv(ridge.x.T @ ridge.x + 0.5 * torch.eye(5, dtype=torch.float64))
    residuals = ridge.y - ridge.x @ theta
    leverage = (ridge.x @ inverse * ridge.x).sum(1)
    moved = theta[:, None] - inverse @ ridge.x.T * (residuals / (1 - leverage))
    closed = (ridge.z @ moved - ridge.t[:, None]).square() - ridge.losses(theta)[:, None]
    removed = torch.tensor([31, 0, 17])
    found = leave_one_out(ridge.train, everything, removed)
    torch.testing.assert_close(found, closed[:, removed].float(), rtol=1e-5, atol=1e-6)
    assert [len(ids) for ids in ridge.seen] == [40, 39, 39, 39]


def test_of_all_pairs_a_curve_removes_the_best_by_scores():
    """With scores that are the true leave-one-out effects, removal of one is the largest of these for each query."""
    ridge, everything = Ridge(), torch.arange(40)
    effects = leave_one_out(ridge.train, everything, everything)
    curve = removal_curve(ridge.train, effects, [1, 3], random=2)
    torch.testing.assert_close(curve.rises["scores"][:, 0], effects.max(1).values)
    for q in range(6):
        kept = torch.tensor([i not in effects[q].topk(3).indices for i in range(40)]).nonzero()[:, 0]
        rise = ridge.train(kept)[q] - ridge.train(everything)[q]
        assert float(curve.rises["scores"][q, 1]) == pytest.approx(float(rise), abs=1e-6)


WORTH = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def linear(ids):
    return 2 - WORTH[:, ids - 50].sum(1)


def test_a_linear_model_loses_what_its_best_examples_are_worth_and_by_random_ones_what_they_are_worth():
    """Ids are not positions, and scores may be arrays; random sets of one seed grow with k, and serve all queries."""
    ids = torch.arange(12) + 50
    curve = removal_curve(
        linear, {"own": WORTH.numpy(), "opposite": -WORTH}, [1, 4, 11], example_ids=ids, random=400, seed=3
    )
    ordered = WORTH.sort(1, descending=True).values.cumsum(1)
    torch.testing.assert_close(curve.rises["own"], ordered[:, [0, 3, 10]], rtol=1e-5, atol=1e-5)
    lowest = WORTH.sort(1).values.cumsum(1)
    torch.testing.assert_close(curve.rises["opposite"], lowest[:, [0, 3, 10]], rtol=1e-5, atol=1e-5)
    by_chance = WORTH.mean(1, keepdim=True) * torch.tensor([1.0, 4.0, 11.0])  # a mean of 400, sd up to 2.4 each
    torch.testing.assert_close(curve.rises["random"], by_chance, rtol=0, atol=4 * 2.4 / 20)
    again = removal_curve(linear, WORTH, [1], example_ids=ids, random=2, seed=3).rises["random"]
    assert not torch.equal(again, removal_curve(linear, WORTH, [1], example_ids=ids, random=2).rises["random"])
    assert torch.equal(again, removal_curve(linear, WORTH, [1], example_ids=ids, random=2, seed=3).rises["random"])
    torch.testing.assert_close(curve.losses, 2 - WORTH.sum(1))


def test_equal_sets_are_trained_once():
    ridge = Ridge()
    same_for_all = torch.arange(40.0).expand(6, 40)
    removal_curve(ridge.train, {"a": same_for_all, "b": 2 * same_for_all}, [2, 5], random=0)
    assert [len(ids) for ids in ridge.seen] == [40, 38, 35]


def test_a_summary_has_means_over_queries_and_their_standard_errors():
    curve = removal_curve(lambda ids: -WORTH[:, ids].sum(1), WORTH, [1, 4], random=0)
    rises = curve.rises["scores"]
    means, errors = curve.summary()["scores"]
    assert means == pytest.approx(rises.mean(0).tolist())
    assert errors == pytest.approx((rises.var(0) / 3).sqrt().tolist())
    assert f"{means[1]:.3g} ± {errors[1]:.2g} without 4" in repr(curve)


def test_what_cannot_be_removed_is_refused():
    for ks in ([0], [12], [], [3, -1]):
        with pytest.raises(ValueError, match="each k must be from 1 to 11"):
            removal_curve(linear, WORTH, ks)
    with pytest.raises(ValueError, match=r"one column for each of 12 examples; got a \(3, 12\), b \(3, 11\)"):
        removal_curve(linear, {"a": WORTH, "b": WORTH[:, 1:]}, [1])
    with pytest.raises(ValueError, match="scores must be finite"):
        removal_curve(linear, WORTH / 0, [1])
    with pytest.raises(ValueError, match="must return the losses of the queries, finite numbers"):
        removal_curve(lambda ids: torch.zeros(2), WORTH, [1])
    with pytest.raises(ValueError, match="must return the losses of the queries, finite numbers"):
        leave_one_out(lambda ids: torch.full((3,), torch.nan), torch.arange(4), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"\[7\] are not among the 4 ids"):
        leave_one_out(linear, torch.arange(4), torch.tensor([1, 7]))
