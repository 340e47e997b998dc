"""Standard normals are quantiles from one table, the same bits on every machine; integers are uniform.

Statistics are tested within five standard errors; seeds are fixed, so that a result never changes.
"""

import hashlib
import math

import pytest
import torch

from lightning_sketch.operators import random
from lightning_sketch.operators.random import Key, integers, normals, words

KEY = Key(7, "pin")
FAR = 1 << 32  # where the upper half of the index begins to count


def test_normals_are_pinned_forever():
    assert torch.equal(normals(KEY, 0, 4), torch.tensor([0.177851602, -2.4039495, -0.996116161, 0.244547844]))
    assert torch.equal(normals(KEY, 2 * FAR - 1, 2 * FAR + 1), torch.tensor([0.975042522, -0.0999373123]))


def test_integers_are_pinned_forever():
    assert integers(KEY, 0, 6, below=100).tolist() == [0, 90, 59, 27, 28, 11]


def test_a_normal_is_a_quantile_of_half_a_word():
    """Two to a word, the lower half first: the same sign and rank as its 16 bits say."""
    halves = torch.stack((words(KEY, 0, 500) & 0xFFFF, words(KEY, 0, 500) >> 16), 1).view(-1)
    half = halves % (1 << 15)
    exact = torch.special.ndtri((half.double() + 0.5) / (1 << 16)) * (1 - 2 * (halves >> 15))
    torch.testing.assert_close(normals(KEY, 0, 1000, torch.float64), exact, rtol=2e-5, atol=0)  # scaled by 1.00001


def test_the_table_of_normals_has_mean_zero_and_variance_one():
    table = random._quantiles(torch.float64, "cpu")
    assert len(table) == 1 << 16
    assert table.sum() == 0
    assert abs(table.square().mean() - 1) < 1e-7  # entries are rounded to float32
    assert 4.3 < table.max() < 4.4


def test_the_table_of_normals_is_pinned_to_the_bit():
    table = random._quantiles(torch.float32, "cpu").numpy()
    assert hashlib.blake2b(table.tobytes(), digest_size=8).hexdigest() == "1e23091fed4830eb"


def test_the_table_of_normals_is_the_same_on_every_machine():
    """No entry is so near the middle of two float32 numbers that another machine's last bits could decide it."""
    exact = torch.special.ndtri((torch.arange(1 << 15, dtype=torch.float64) + 0.5) / (1 << 16))
    exact /= exact.square().mean().sqrt()
    near = exact.float()
    step = torch.nextafter(near, near * 2).double() - near.double()
    to_middle = (0.5 - ((exact - near.double()) / step).abs()).abs() * step.abs()
    assert (to_middle / exact.abs()).min() > 1000 * torch.finfo(torch.float64).eps


def test_normals_have_the_moments_of_a_normal():
    z, count = normals(KEY, 0, 200_000, torch.float64), 200_000
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / count)


def test_neighboring_normals_are_uncorrelated():
    z = normals(KEY, 0, 200_000, torch.float64)
    for lag in (1, 2, 3, 512):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(len(z) - lag)


@pytest.mark.parametrize("below", [1, 7, 1000, 1 << 31])
def test_integers_are_uniform(below):
    """Their mean is (below - 1) / 2, their range is [0, below)."""
    drawn = integers(KEY, 0, 100_000, below)
    assert 0 <= drawn.min() <= drawn.max() < below
    spread = math.sqrt((below**2 - 1) / 12)
    assert abs(drawn.double().mean() - (below - 1) / 2) <= 5 * spread / math.sqrt(len(drawn))


def test_numbers_do_not_depend_on_the_default_device():
    """Models are built under `torch.device("meta")`; a table of quantiles made there would hold nothing."""
    expected = normals(KEY, 0, 100, device="cpu")
    random._quantiles.cache_clear()
    with torch.device("meta"):
        assert torch.equal(normals(KEY, 0, 100, device="cpu"), expected)
