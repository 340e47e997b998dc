"""The damped inverse is exact, primal or dual; automatic damping follows its formula; zero damping is refused."""

import logging

import pytest
import torch
from marks import some
from rows import random_rows

from lightning_sketch.attribution import Influence, scores
from lightning_sketch.attribution.curvature import CurvatureSum, automatic
from lightning_sketch.operators import BlockSRHT


def curvature(examples, dim=20, kind="ggn", rows=2):
    generator = torch.Generator().manual_seed(0)
    total = CurvatureSum(dim)
    given = torch.randn(examples, rows, dim, generator=generator, dtype=torch.float64)
    total.add(given)
    return total.curvature(kind)


def truth(found, damping, vectors):
    matrix = found.dense() + damping * torch.eye(found.dim, dtype=torch.float64)
    return torch.linalg.solve(matrix, vectors.T).T


VECTORS = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dim", some([20, 1100], [20]))
@pytest.mark.parametrize("examples", [4, 1200])
@pytest.mark.parametrize("damping", [1e-4, 1.0, 100])
def test_it_solves_the_system(examples, damping, dim):
    """As a matrix and by its root; by eigenvectors, and above dim 1024 by a Cholesky factor."""
    found = curvature(examples, dim)
    assert (found.root is not None) == (examples == 4)
    vectors = torch.randn(3, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solved, true = Influence(found, damping)(vectors), truth(found, damping, vectors)
    torch.testing.assert_close(solved, true, rtol=1e-9, atol=1e-10 * float(true.abs().max()))


def test_the_dual_of_a_store_equals_its_primal():
    """The same 12 rows of dim 16, stored as rows, and as the matrix that rows of zeros bring about."""
    few = random_rows(12, seed=3)
    total = CurvatureSum(16)
    total.add(few.sketches[:, None])
    dual = total.curvature("fisher")
    total.add(torch.zeros(8, 1, 16))
    primal = total.curvature("fisher")
    assert dual.matrix is None
    assert primal.root is None
    query = random_rows(2, seed=4)
    a = scores(query, few, method="influence", curvature=dual, damping=0.3)
    b = (
        scores(query, few, method="influence", curvature=primal, damping=0.3 * 12 / 20) * 12 / 20
    )  # A is a mean: over 20 examples then
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_sweep_shares_its_eigenvectors(monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    found = curvature(60)
    sweep = Influence(found, [0.1, 1.0, 10.0])
    assert sweep.damping == (0.1, 1.0, 10.0)
    solved = sweep(VECTORS)
    assert solved.shape == (3, 3, 20)
    assert len(calls) == 1
    for own, damping in zip(solved, sweep.damping, strict=True):
        torch.testing.assert_close(own, truth(found, damping, VECTORS))


@pytest.mark.parametrize("kind", ["ggn", "margin", "trak", "fisher"])
@pytest.mark.parametrize(("examples", "dim"), [(8, 4), (8, 400), (4000, 4)])
def test_automatic_damping_is_its_formula(kind, examples, dim):
    """With 8 examples the noise counts, more where they fill the sketch, with 4000 the floor: v falls as 1 / n."""
    found = curvature(examples, kind=kind, dim=dim)
    dense, n = found.dense(), examples
    e, p = dense.square().sum() / dense.trace(), dense.trace() ** 2 / dense.square().sum()
    noise = (found.mean_square - dense.square().sum()) / n / dense.trace()
    kappa = 0.1 if kind == "fisher" else 0.3
    assert found.effective_dim == pytest.approx(float(p))
    assert (p / dim > 1 / 15) == (dim == 4)
    assert automatic(found) == pytest.approx(float(max(0.01 * e, kappa * noise * max(1, 15 * p / dim))))
    assert (automatic(found) > 0.0101 * e) == (examples == 8)


def test_the_noise_of_the_sketch_has_damping_of_its_own():
    """A sketch of dim d adds (tr A)² / d to tr A²: the effective dimension falls from p to 1 / (1 / p + 1 / d)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 300, generator=generator) @ torch.randn(300, 3000, generator=generator)
    whole = 1 / (1 / 300 + 1 / 2000 + 1 / 3000)  # of 2000 normal rows of 300 dimensions, which are not quite orthogonal
    ratios = []
    for dim in (64, 512):
        total = CurvatureSum(dim)
        total.add(BlockSRHT(3000, dim).matvec(rows)[:, None])
        found = total.curvature("ggn")
        assert found.effective_dim == pytest.approx(1 / (1 / whole + 1 / dim), rel=0.05)
        ratios.append(Influence(found, "auto").relative_damping / (0.3 * found.half_noise / found.trace_of_square))
    assert ratios[0] > ratios[1] > 3


def test_the_damping_in_use_is_an_attribute_and_is_logged_once(caplog):
    found = curvature(400)
    inverse = Influence(found, "auto")
    assert inverse.damping == automatic(found)
    assert inverse.relative_damping == pytest.approx(inverse.damping * found.trace / found.trace_of_square)
    assert inverse.noise == pytest.approx(found.half_noise / found.trace_of_square)
    assert inverse.effective_samples == found.effective_samples
    assert f"damping {inverse.damping:.3g} (c = {inverse.relative_damping:.3g}, v = " in str(inverse)
    assert f"damping 0.5 to 2 (c = {Influence(found, 0.5).relative_damping:.3g} to " in str(
        Influence(found, [2.0, 0.5])
    )
    query, train = random_rows(2, dim=20), random_rows(9, dim=20)
    with caplog.at_level(logging.INFO, "lightning_sketch"):
        for _ in range(2):
            scores(query, train, method="influence", curvature=found)
    assert [record.message for record in caplog.records] == [str(inverse)]


def test_an_automatic_damping_that_is_a_guess_warns(recwarn):
    """Where few examples carry A, and where all of them do but have nothing in common."""
    total = CurvatureSum(4)
    total.add(
        torch.randn(3000, 1, 4, generator=torch.Generator().manual_seed(0)) * (torch.arange(3000) < 100)[:, None, None]
    )
    uneven = total.curvature("ggn")
    assert Influence(uneven, 0.1).noise < 0.1  # 100 nonzero examples: little noise, but few of 3000
    with pytest.warns(UserWarning, match=r"few examples carry the curvature: v = .*effective of 3000.*calibrate"):
        Influence(uneven, "auto")
    noisy = curvature(12, dim=500, rows=1)
    assert Influence(noisy, "auto").effective_samples > 11
    with pytest.warns(UserWarning, match="the curvature is noisy, as all examples differ: v = "):
        Influence(noisy, "auto")
    recwarn.clear()
    Influence(noisy, 0.1)  # a damping that was passed does not warn
    many = curvature(60)
    assert 0.1 < Influence(many, "auto").noise < 0.5  # they differ, but the rule knows how much
    assert not recwarn.list


@pytest.mark.parametrize("damping", [0, 0.0, -1.0, float("nan"), float("inf"), [0.1, 0.0], []])
def test_an_undamped_inverse_is_refused(damping):
    with pytest.raises(ValueError, match="damping is a positive number"):
        Influence(curvature(60), damping)


def test_an_unknown_rule_is_refused_and_a_damping_that_is_lost_in_rounding(untyped):
    with pytest.raises(ValueError, match="damping='best' is not known"):
        Influence(curvature(60), "best")
    total = CurvatureSum(1025)
    total.add(torch.ones(1, 1025, 1025) * 1e3)  # of rank one, its other eigenvalues zero up to rounding
    with pytest.raises(ValueError, match="lost in rounding"):
        Influence(total.curvature("ggn"), 1e-300)(torch.ones(1, 1025))
