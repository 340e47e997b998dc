"""Spectra known in closed form: multiple, few, none, degenerate."""

import pytest
import torch
from symmetric_matrices import normal, symmetric
from torch import nn

from lightning_sketch.curvature import Hessian, spectrum
from lightning_sketch.operators import LinearOperator

DTYPES = [torch.float64, torch.float32]


class Identity(LinearOperator):
    """The identity; it returns its argument, not a copy."""

    def __init__(self, n):
        self.n = n

    @property
    def shape(self):
        return self.n, self.n

    def matvec(self, x):
        return x

    rmatvec = matvec


class LowRank(LinearOperator):
    """The operator B Bᵀ."""

    def __init__(self, b):
        self.b, self.dtype = b, b.dtype

    @property
    def shape(self):
        return len(self.b), len(self.b)

    def matvec(self, x):
        return (x @ self.b) @ self.b.T

    rmatvec = matvec


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_double_eigenvalue_is_found_twice(dense_operator, dtype):
    """The start vector has one direction of each pair; rounding or a restart adds the other."""
    wanted = [10, 10, 7, 5, 5, 3]
    matrix = symmetric([*wanted, *torch.linspace(0, 1, 1200)], dtype)
    found = spectrum(dense_operator(matrix), num_matvecs=96, tol=0.0).top(6)
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=5e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_equal_outputs_double_every_eigenvalue(dtype):
    """Least squares on k outputs: H = I_k ⊗ 2 XᵀX / (k · examples)."""
    x = (normal(50, 10) * torch.logspace(1, 0, 10)).to(dtype)
    module = nn.Linear(10, 2, bias=False).to(dtype)
    h = Hessian(lambda module, x: module(x).square().mean(), module, [x])
    once = torch.linalg.eigvalsh(x.double().T @ x.double() / 50).flip(0)
    found = spectrum(h, num_matvecs=96, tol=0.0)
    torch.testing.assert_close(found.top(6), once[:3].repeat_interleave(2), rtol=5e-6, atol=0.0)


@pytest.mark.parametrize("n", [1, 30, 3000])
def test_a_zero_operator_has_zeros(n):
    sp = spectrum(LowRank(torch.zeros(n, 1)), top_k=1, bottom_k=0)
    assert not sp.eigenvalues.any()
    assert sp.converged.all()
    assert str(sp.num_outliers()) == "0"


@pytest.mark.parametrize("n", [1, 30, 3000])
def test_the_identity_has_ones_though_it_returns_its_argument(n):
    """Every start vector finds one more copy; the run continues until it has as many as were asked for."""
    sp = spectrum(Identity(n), top_k=30, bottom_k=3)
    torch.testing.assert_close(sp.eigenvalues, torch.ones_like(sp.eigenvalues), rtol=1e-6, atol=0.0)
    assert len(sp.eigenvalues) >= min(n, 33)
    assert sp.converged.all()
    assert sp.num_outliers().at_least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 12])
def test_more_products_than_dimensions_give_all_eigenvalues(dense_operator, dtype, n):
    expected = torch.linspace(2, -1, 12)[:n].double()
    sp = spectrum(dense_operator(symmetric(expected, dtype)), tol=0.0)
    torch.testing.assert_close(sp.eigenvalues, expected, rtol=1e-5, atol=1e-6)


def test_fewer_eigenvalues_than_asked_for_are_all_given(dense_operator):
    sp = spectrum(dense_operator(symmetric([4.0, 2.0, -1.0])), top_k=10, bottom_k=3)
    torch.testing.assert_close(sp.top(10), torch.tensor([4.0, 2.0, -1.0]).double())
    torch.testing.assert_close(sp.bottom(3), torch.tensor([-1.0, 2.0, 4.0]).double())


@pytest.mark.parametrize("seed", range(3))
def test_low_rank_gives_neither_ghosts_nor_nan(seed):
    """Rank 27 over two orders of magnitude, in float32, with 64 products; measured 5e-7."""
    b = normal(2000, 27, seed=seed) * torch.logspace(0, -1, 27) / 45
    expected = torch.linalg.eigvalsh(b.T @ b).flip(0)
    sp = spectrum(LowRank(b.float()), num_matvecs=64, tol=0.0, seed=seed)
    assert sp.eigenvalues.isfinite().all()
    torch.testing.assert_close(sp.top(10), expected[:10], rtol=1e-5, atol=0.0)
    assert (sp.eigenvalues > 1e-3 * expected[0]).sum() == 27
    assert sp.eigenvalues[27:].abs().max() < 1e-3 * expected[0]


def test_a_maximum_has_no_rneg(dense_operator):
    sp = spectrum(dense_operator(symmetric([*torch.linspace(-2, -1, 50)])))
    torch.testing.assert_close([sp.lambda_max, sp.lambda_min], [-1.0, -2.0], rtol=1e-6, atol=0.0)
    assert str(sp.rneg) == "nan"


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_the_vectors_agrees_with_sketching_them(dense_operator, dtype):
    """With dim >= n nothing is estimated."""
    expected = torch.tensor([9.0, 8, 6, 5, 4, -3, -4, -5]).double()
    matrix = symmetric([*expected[:5], *torch.linspace(-1, 1, 292), *expected[5:]], dtype)
    for dim in (300, 200):
        sp = spectrum(dense_operator(matrix), dim=dim, tol=0.0)
        torch.testing.assert_close(torch.cat([sp.top(5), sp.bottom(3).flip(0)]), expected, rtol=5e-6, atol=0.0)


@pytest.mark.slow
def test_residuals_bound_the_distance_where_the_rank_is_used_up(dense_operator):
    """Small, low rank, float32, more products than dimensions: what is left over is rounding, blown up.

    Over 150 matrices; measured 99.9 % of 2422 values, against 95 % without the rounding in the residual.
    """
    inside = values = 0
    for seed in range(150):
        n, rank = 2 + seed % 30, 1 + seed % 7
        b = normal(n, min(rank, n), seed=seed)
        matrix = (b @ b.T).float()
        sp = spectrum(dense_operator(matrix), num_matvecs=48, dim=96, tol=0.0, top_k=1, bottom_k=0, seed=seed)
        distance = (sp.eigenvalues[:, None] - torch.linalg.eigvalsh(matrix.double())).abs().amin(1)
        inside += int((distance <= sp.residuals).sum())
        values += len(distance)
    assert inside > 0.99 * values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copies", [2, 10])
def test_copies_are_found_or_the_ranks_below_them_do_not_count_as_converged(dense_operator, copies, dtype):
    """At the default tol, which stops early: one start vector finds one copy, and residuals do not count copies."""
    outliers = torch.tensor([10.0, 7, 5, 4]).repeat_interleave(copies)
    bulk = torch.linspace(-0.5, 0.5, 400)
    sp = spectrum(dense_operator(torch.cat([outliers, bulk]).to(dtype).diag()), bottom_k=0, top_k=8)
    converged = int(sp.converged[:8].cumprod(0).sum())
    assert converged >= 2
    torch.testing.assert_close(sp.top(converged), outliers[:converged].double(), rtol=1e-2, atol=0)
    count = sp.num_outliers()
    assert count <= len(outliers) if count.at_least else count == len(outliers)
    assert sp.converged[:8].all() or copies == 10


def test_several_copies_take_several_starts(dense_operator):
    """The first run stops early at 10, 8, 6, 5, 4; each further start vector finds one more copy, the last one none."""
    outliers = torch.tensor([10.0, 10, 10, 10, 8, 6, 5, 4])
    sp = spectrum(
        dense_operator(torch.cat([outliers, torch.linspace(-1, 1, 1200)]).double().diag()), top_k=5, bottom_k=0
    )
    torch.testing.assert_close(sp.top(5), outliers[:5].double(), rtol=1e-5, atol=0)
    assert sp.converged[:5].all()
    assert sp.num_products < 96
