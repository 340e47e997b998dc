"""Inputs on which a sketch fails, as the module of each sketch documents them.

Variances in units of 2 / dim, the value of a dense Gaussian map; statistics within five standard errors.
"""

import math

import pytest
import torch
from marks import slow

from lightning_sketch.operators import AFFD, AFJL, FFD, QK, BlockSRHT

SEEDS = 1000


def squared_norms(kind, x, dim, seeds=SEEDS):
    x = torch.nn.functional.normalize(x.double(), dim=0)
    return torch.stack([kind(len(x), dim, seed=seed).matvec(x).square().sum() for seed in range(seeds)])


def variance(kind, x, dim, seeds=SEEDS):
    """Return Var ||S x||² · dim / 2 of the unit vector along x, and its standard error."""
    norms = squared_norms(kind, x, dim, seeds)
    off = norms - norms.mean()
    spread = ((off**4).mean() - off.square().mean() ** 2).sqrt() / math.sqrt(seeds)
    return off.square().mean() * dim / 2, spread * dim / 2


def normal(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def in_one_block(values, n):
    """Return a vector that is zero outside the eighth aligned block."""
    size = len(values)
    return values.new_zeros(n).index_put((torch.arange(7 * size, 8 * size),), values)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [256, 16])
def test_ffd_sends_a_constant_chunk_to_one_chi_square_whatever_dim_is(dim):
    """Theorem 3.1: H x = e_1, so that ||S x||² is one squared normal: mean 1, variance 2, median 0.455."""
    norms = squared_norms(FFD, in_one_block(torch.ones(dim), 10 * dim), dim)
    assert abs(norms.mean() - 1) < 5 * math.sqrt(2 / SEEDS)
    assert abs(norms.var() - 2) < 5 * math.sqrt(56 / SEEDS)  # Var (g² - 1)² = 56
    below = torch.special.erf(torch.tensor(0.5).sqrt())  # P(g² < 1) = 0.683
    assert abs((norms < 1).double().mean() - below) < 5 * 0.5 / math.sqrt(SEEDS)


def test_ffd_keeps_only_one_number_of_a_constant_chunk():
    """The same, without statistics: all squared outputs are equal to g² / dim."""
    y = FFD(10 * 64, 64, seed=3).matvec(in_one_block(torch.ones(64, dtype=torch.float64), 10 * 64))
    torch.testing.assert_close(y.square(), y.square()[:1].expand(64))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1 << 10, 1 << 14])
def test_afjl_sends_two_equal_numbers_at_distance_dim_to_zero_half_of_the_time(n):
    """Two such coordinates share a column of H_D up to sign: what is lost does not depend on n."""
    x = torch.zeros(n, dtype=torch.float64)
    x[5] = x[5 + 64] = 1
    norms = squared_norms(AFJL, x, dim=64)
    assert abs((norms == 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(SEEDS)
    assert norms[norms > 0].min() > 0.5  # and the other half is doubled


@pytest.mark.parametrize("dim", [64, slow(256)])
def test_qk_spreads_on_a_rank_one_matrix_along_its_factors(dim):
    """||S x||² is a product of squared norms of √dim numbers each: variance about 2 · 2 / √dim, not 2 / dim.

    Each is Beta-distributed: the squared norm of D of the B numbers of a random unit vector, times B / D.
    """
    n = 1 << 14
    (d, b), _ = QK(n, dim).factors
    one_factor = 1 + 2 * (1 - d / b) / (d * (1 + 2 / b))  # E of the square
    predicted = (one_factor**2 - 1) * dim / 2
    assert predicted > 6
    ratio, error = variance(QK, torch.outer(normal(256)[:128], normal(256)[128:]).flatten(), dim)
    assert abs(ratio - predicted) < 5 * error


@pytest.mark.slow
def test_affd_repeats_one_profile_in_every_block_when_one_block_holds_the_energy():
    """H B x is then one vector p in every block of length dim, up to sign: p = H (s ∘ x), at any n.

    ||S x||² = sum p_i² g_i² with one normal g_i for each i; its variance 2 sum p_i⁴ has the mean
    (3 - 2 sum x_i⁴) 2 / dim, three times a dense Gaussian map's.
    """
    dim, x = 256, torch.nn.functional.normalize(normal(256), dim=0)
    predicted = 3 - 2 * (x**4).sum()
    assert 2.9 < predicted < 3
    ratio, error = variance(AFFD, in_one_block(x, 1 << 14), dim, seeds=2000)
    assert abs(ratio - predicted) < 5 * error
    assert error < 0.15  # measured 2.97 ± 0.07 over 4000 seeds


@pytest.mark.slow
@pytest.mark.parametrize(
    "x",
    [
        in_one_block(torch.ones(64), 1 << 14),
        torch.zeros(1 << 14).index_put((torch.tensor([5, 5 + 64]),), torch.ones(2)),
        torch.outer(normal(256)[:128], normal(256)[128:]).flatten(),
        in_one_block(normal(64), 1 << 14),
    ],
    ids=["FFD's", "AFJL's", "QK's", "AFFD's"],
)
def test_block_srht_is_not_fooled_by_the_input_of_another(x):
    ratio, _ = variance(BlockSRHT, x, dim=64, seeds=500)
    assert ratio < 1.3
