"""The LDS is the mean of torchmetrics' Spearman; batches and processes add up; the interval covers."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torchmetrics.functional import spearman_corrcoef

from lightning_sketch.metrics import LinearDatamodelingScore


def problem(queries=12, examples=40, subsets=30, repeats=2, noise=1.0, seed=0):
    """Losses that fall with the sum of the true scores, and predicted scores: the true ones with noise."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(subsets, examples, generator=generator) < 0.5
    true = torch.randn(queries, examples, generator=generator)
    losses = -masks.float() @ true.T + torch.randn(repeats, subsets, queries, generator=generator)
    return masks, true + noise * torch.randn(queries, examples, generator=generator), losses


def lds(masks, scores, losses):
    metric = LinearDatamodelingScore(masks)
    metric.update(scores, losses)
    return metric.compute()


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


def test_batches_of_queries_add_up():
    """Equal up to the rounding of ranks, which are float32."""
    masks, scores, losses = problem()
    whole = lds(masks, scores, losses)
    metric = LinearDatamodelingScore(masks)
    for part in torch.arange(12).split(5):
        metric.update(scores[part], losses[:, :, part])
    torch.testing.assert_close(metric.compute(), whole, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    both = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=3600) for process in both] == [0, 0]
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), lds(*problem()), rtol=1e-6, atol=0)


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


def half_of_it(folder, rank):
    """One of two processes, with its part of the queries; rank 0 writes the result of both."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    masks, scores, losses = problem()
    own = slice(0, 5) if rank == 0 else slice(5, None)
    metric = LinearDatamodelingScore(masks)
    metric.update(scores[own], losses[:, :, own])
    found = metric.compute()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    half_of_it(sys.argv[1], int(sys.argv[2]))
