"""The fast Walsh-Hadamard transform is the product with Sylvester's matrix, however it is cut into factors."""

import pytest
import torch

from lightning_sketch.operators import _hadamard as module
from lightning_sketch.operators._hadamard import CACHED, hadamard


def sylvester(m):
    """Return H_m by H_1 = [1], H_2m = [[H_m, H_m], [H_m, -H_m]]."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < m:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h


def butterflies(x):
    """Return H x by the textbook recursion: additions and subtractions of halves."""
    if len(x) == 1:
        return x
    top, bottom = x.view(2, -1)
    return torch.cat((butterflies(top + bottom), butterflies(top - bottom))) if len(x) > 512 else sylvester(len(x)) @ x


@pytest.mark.parametrize("bits", range(11))
def test_it_is_sylvesters_matrix(bits):
    m = 1 << bits
    assert torch.equal(hadamard(torch.eye(m, dtype=torch.float64)), sylvester(m))  # small integers: no rounding


def test_twice_is_m_times_the_identity(vectors):
    x = vectors(3, 1024)
    torch.testing.assert_close(hadamard(hadamard(x)), 1024 * x)


@pytest.mark.parametrize("bits", [17, 18, 19, 20])
def test_sizes_beyond_the_cache_follow_the_recursion(vectors, bits):
    assert 1 << 20 > CACHED
    x = vectors(1 << bits)
    torch.testing.assert_close(hadamard(x), butterflies(x))


def test_a_batch_beyond_the_cache_is_transformed_row_by_row(vectors):
    x = vectors(2, 1 << 19)
    torch.testing.assert_close(hadamard(x), torch.stack((butterflies(x[0]), butterflies(x[1]))))


@pytest.mark.parametrize("factor", [2, 4, 64])
def test_the_choice_of_factors_changes_nothing(vectors, monkeypatch, factor):
    """The factors change only the speed; the largest comes last here, and first."""
    x = vectors(2, 4096)
    expected = hadamard(x)
    count = {2: 12, 4: 6, 64: 2}[factor]
    monkeypatch.setattr(module, "_factors", lambda m: [factor] * count)
    torch.testing.assert_close(hadamard(x), expected)
    monkeypatch.setattr(module, "_factors", lambda m: [128, 32])
    torch.testing.assert_close(hadamard(x), expected)


def test_factors_multiply_to_the_size():
    for bits in range(40):
        assert torch.tensor(module._factors(1 << bits) or [1]).prod() == 1 << bits
        assert max(module._factors(1 << bits), default=1) <= 128


def test_the_input_is_left_as_it_was(vectors):
    x = vectors(8, 4).T
    hadamard(x)
    assert torch.equal(x, vectors(8, 4).T)


@pytest.mark.parametrize(("size", "padded"), [(0, 1), (3, 4), (100, 128), (3 << 18, 1 << 20), ((1 << 18) + 1, 1 << 19)])
def test_a_size_that_is_no_power_of_two_is_refused(size, padded):
    with pytest.raises(ValueError, match=rf"needs a last axis of size 2\^k, got {size}; zero-pad it to {padded}\."):
        hadamard(torch.ones(size))
