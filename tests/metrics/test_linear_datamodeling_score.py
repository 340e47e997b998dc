"""The LDS is the mean of torchmetrics' Spearman; batches and processes add up; the interval covers."""

import pickle
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import Started
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.functional import spearman_corrcoef

from lightning_sketch.metrics import LinearDatamodelingScore

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric LinearD:UserWarning")


def problem(queries=12, examples=40, subsets=30, repeats=2, noise=1.0, seed=0):
    """Losses that fall with the sum of the true scores, and predicted scores: the true ones with noise."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(subsets, examples, generator=generator) < 0.5
    true = torch.randn(queries, examples, generator=generator)
    losses = -masks.float() @ true.T + torch.randn(repeats, subsets, queries, generator=generator)
    return masks, true + noise * torch.randn(queries, examples, generator=generator), losses


def lds(masks, scores, losses, **options):
    metric = LinearDatamodelingScore(masks, **options)
    metric.update(scores, losses)
    return metric.compute()


def equal(found, expected):
    """Equal up to the rounding of ranks, which are float32."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


def by_torchmetrics(masks, scores, losses):
    predicted, true = masks.double() @ scores.double().T, -losses.double().mean(0)
    return torch.stack([spearman_corrcoef(p, t) for p, t in zip(predicted.T, true.T, strict=True)])


def test_it_is_the_mean_of_spearman_over_queries():
    """Torchmetrics adds 1e-6 to a product of deviations of ranks, about 70."""
    masks, scores, losses = problem()
    found = lds(masks, scores, losses)
    assert float(found["lds"]) == pytest.approx(float(by_torchmetrics(masks, scores, losses).mean()), abs=1e-6)
    between = torch.stack([spearman_corrcoef(a, b) for a, b in zip(losses[0].T, losses[1].T, strict=True)])
    assert float(found["ceiling"]) == pytest.approx(float(between.mean()), abs=1e-6)
    assert lds(masks, scores, losses[0])["ceiling"].isnan()


def test_ties_have_the_mean_of_their_ranks():
    masks, scores, losses = problem()
    scores, losses = scores.sign(), losses.round()
    found = lds(masks, scores, losses)["lds"]
    assert float(found) == pytest.approx(float(by_torchmetrics(masks, scores, losses).mean()), abs=1e-6)


def test_the_interval_is_that_of_the_jackknife_over_subsets_and_the_spread_over_queries():
    masks, scores, losses = problem()
    found = lds(masks, scores, losses)
    keep = ~torch.eye(30, dtype=torch.bool)
    means = torch.stack([by_torchmetrics(masks[k], scores, losses[:, k]).mean() for k in keep])
    over_subsets = (means - means.mean()).square().sum() * 29 / 30
    over_queries = by_torchmetrics(masks, scores, losses).var() / 12
    half = 1.96 * (over_subsets + over_queries).sqrt()
    assert float(found["high"] - found["lds"]) == pytest.approx(float(half), rel=1e-4)
    assert float(found["lds"] - found["low"]) == pytest.approx(float(half), rel=1e-4)


@pytest.mark.slow
def test_the_interval_covers():
    """The mean over 100 problems is in 95 % of their intervals; the interaction of both, counted twice, adds some."""
    found = [lds(*problem(seed=seed)) for seed in range(100)]
    mean = sum(f["lds"] for f in found) / 100
    inside = sum(bool(f["low"] < mean < f["high"]) for f in found)
    assert inside >= 92
    width = sum(float(f["high"] - f["low"]) for f in found) / 100
    spread = torch.stack([f["lds"] for f in found]).std()
    assert width < 2 * 1.96 * 1.5 * spread


@pytest.mark.parametrize("per_query", [False, True])
def test_batches_of_queries_add_up(per_query):
    """In updates or forward calls, through a clone, a pickle and a saved state; a reset forgets them."""
    masks, scores, losses = problem()
    whole = lds(masks, scores, losses, per_query=per_query)
    metric = LinearDatamodelingScore(masks, per_query=per_query)
    for part in torch.arange(12).split(5):
        own = metric(scores[part], losses[:, :, part])
        equal(own, lds(masks, scores[part], losses[:, :, part], per_query=per_query))
        metric = pickle.loads(pickle.dumps(metric.clone()))
    equal(metric.compute(), whole)
    metric.persistent(True)
    other = LinearDatamodelingScore(masks, per_query=per_query)
    other.load_state_dict(metric.state_dict())
    equal(other.compute(), whole)
    metric.reset()
    metric.update(scores, losses)
    equal(metric.compute(), whole)


def test_per_query_is_spearman_of_each_query_nan_for_those_that_never_change():
    masks, scores, losses = problem()
    losses[:, :, [3, 7]] = 0.0
    rho = by_torchmetrics(masks, scores, losses).double()
    rho[[3, 7]] = torch.nan
    found = lds(masks, scores, losses, per_query=True)
    torch.testing.assert_close(found["per_query"], rho, rtol=0, atol=1e-6, equal_nan=True)
    assert float(found["lds"]) == pytest.approx(float(found["per_query"].nanmean()))
    assert LinearDatamodelingScore(masks, per_query=True).compute()["per_query"].shape == (0,)
    assert all(value.ndim == 0 for value in lds(masks, scores, losses).values())


@pytest.mark.slow
@pytest.mark.parametrize("cut", [5, 0])
def test_two_processes_give_what_one_gives(tmp_path, cut):
    """With uneven parts of the queries, and with none at all in one of them."""
    both = [Started(__file__, tmp_path, rank, cut) for rank in (0, 1)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    equal(torch.load(tmp_path / "found.pt"), lds(*problem(), per_query=True))


def test_subsets_are_masks_or_indices():
    """As dattri gives them, lists of one size or of several, in any order."""
    masks, scores, losses = problem()
    expected = lds(masks, scores, losses)
    indices = [mask.nonzero()[:, 0].flip(0) for mask in masks]
    for subsets in (indices, [i.tolist() for i in indices], [i.numpy().astype(np.uint8) for i in indices]):
        equal(lds(subsets, scores, losses, num_examples=40), expected)
    for same in (masks.numpy(), masks.tolist(), list(masks)):
        equal(lds(same, scores, losses), expected)
    halves = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:20] for i in range(30)])
    of_halves = torch.zeros(30, 40, dtype=torch.bool).scatter_(1, halves, True)
    equal(lds(halves, scores, losses, num_examples=40), lds(of_halves, scores, losses))


def test_integers_are_never_guessed_to_be_masks_or_indices():
    masks = problem()[0]
    with pytest.raises(TypeError, match=r"masks as booleans, masks.bool\(\), or indices with num_examples"):
        LinearDatamodelingScore(masks.long())
    with pytest.raises(ValueError, match="subset 0 has an index twice or outside 0 to 39"):
        LinearDatamodelingScore(masks.long(), 40)
    with pytest.raises(ValueError, match="subset 2 has an index twice or outside 0 to 39"):
        LinearDatamodelingScore([[0], [1], [40]], 40)
    with pytest.raises(TypeError, match=r"integer indices, got torch.float32"):
        LinearDatamodelingScore(masks.float())
    with pytest.raises(TypeError, match=r"got torch.bool, torch.int64"):
        LinearDatamodelingScore([[True, False], [0, 1], [1]], 2)
    with pytest.raises(ValueError, match=r"one entry for each example; got lengths \[39, 40\]"):
        LinearDatamodelingScore(masks, 39)
    with pytest.raises(ValueError, match="other shapes"):
        LinearDatamodelingScore(masks[0])


def test_arrays_are_accepted_in_any_precision():
    masks, scores, losses = problem()
    scores = scores.round(decimals=1)
    equal(lds(masks.numpy(), scores.double().numpy(), losses.numpy()), lds(masks, scores.double(), losses))
    equal(lds(masks, scores.mul(10).round().int(), losses), lds(masks, scores.mul(10).round(), losses))


def test_the_state_of_other_subsets_is_refused():
    """Also in a module, and also if their number is the same; the metric stays as it was."""
    masks, scores, losses = problem()
    metric = LinearDatamodelingScore(masks)
    metric.update(scores, losses)
    metric.persistent(True)
    module = torch.nn.ModuleList([metric])
    for others in (~masks, masks[1:]):
        other = LinearDatamodelingScore(others)
        other.persistent(True)
        with pytest.raises(RuntimeError, match="the state is that of other subsets"):
            torch.nn.ModuleList([other]).load_state_dict(module.state_dict())
        assert int(other.queries) == 0
    again = LinearDatamodelingScore(module.state_dict()["0.masks"])
    torch.nn.ModuleList([again]).load_state_dict(module.state_dict())
    equal(again.compute(), metric.compute())
    assert not LinearDatamodelingScore(masks).state_dict()


def test_a_tracker_finds_the_best_of_several():
    masks, scores, losses = problem(noise=0.3)
    tracker = MetricTracker(MetricCollection([LinearDatamodelingScore(masks)]), maximize=True)
    for sign in (-1, 1, 0):
        tracker.increment()
        tracker.update(sign * scores, losses)
    best, step = tracker.best_metric(return_step=True)
    assert (best["lds"], step["lds"]) == (pytest.approx(float(lds(masks, scores, losses)["lds"])), 1)


def test_plot_draws_the_score_its_ceiling_and_single_queries():
    masks, scores, losses = problem()
    metric = LinearDatamodelingScore(masks, per_query=True)
    metric.update(scores, losses)
    found = metric.compute()
    figure, axes = metric.plot()
    assert figure is not None
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "single queries",
        "ceiling",
        "LDS, 95 % interval",
    ]
    (points,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert points.get_ydata().tolist() == pytest.approx([float(found["lds"])])
    one_model = lds(masks, scores, losses[0])
    none, again = metric.plot([found, one_model], ax=figure.add_subplot())
    assert none is None
    (points,) = [line for line in again.get_lines() if line.get_marker() == "o"]
    assert points.get_ydata().tolist() == pytest.approx([float(found["lds"]), float(one_model["lds"])])


def test_queries_whose_losses_never_change_are_excluded_and_counted():
    masks, scores, losses = problem()
    rest = lds(masks, scores[2:], losses[:, :, 2:])
    losses[:, :, :2] = 0.0  # underflow
    found = lds(masks, scores, losses)
    assert (int(found["constant"]), int(found["queries"])) == (2, 10)
    for name in ("lds", "low", "high", "ceiling"):
        torch.testing.assert_close(found[name], rest[name])


def test_constant_scores_have_a_correlation_of_zero():
    """Excluding them would favor a method that has no scores for hard queries."""
    masks, scores, losses = problem()
    rho = by_torchmetrics(masks, scores, losses)
    scores[0] = 0.0
    assert float(lds(masks, scores, losses)["lds"]) == pytest.approx(float(rho[1:].sum() / 12), abs=1e-6)


def test_scores_of_the_opposite_sign_have_the_opposite_lds():
    masks, scores, losses = problem()
    assert float(lds(masks, -scores, losses)["lds"]) == pytest.approx(-float(lds(masks, scores, losses)["lds"]))


def test_wrong_shapes_and_numbers_are_refused():
    masks, scores, losses = problem()
    with pytest.raises(ValueError, match=r"30 subsets of 40 examples take .* got \(12, 39\) and \(2, 30, 12\)"):
        lds(masks, scores[:, 1:], losses)
    with pytest.raises(ValueError, match=r"got \(12, 40\) and \(2, 29, 12\)"):
        lds(masks, scores, losses[:, 1:])
    with pytest.raises(ValueError, match="1 of the losses are not finite"):
        lds(
            masks,
            scores,
            losses.index_fill(1, torch.tensor([0]), 0).index_put((torch.tensor([0]),) * 3, torch.tensor(float("nan"))),
        )
    with pytest.raises(ValueError, match="three subsets at least, got 2"):
        LinearDatamodelingScore(masks[:2])


def half_of_it(folder, rank, cut):
    """One of two processes, with its part of the queries; rank 0 writes the result of both."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    masks, scores, losses = problem()
    own = slice(0, cut) if rank == 0 else slice(cut, None)
    metric = LinearDatamodelingScore(masks, per_query=True)
    if cut or rank:
        metric.update(scores[own], losses[:, :, own])
    found = metric.compute()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    half_of_it(sys.argv[1], *map(int, sys.argv[2:]))
