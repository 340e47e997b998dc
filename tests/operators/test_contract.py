"""Every sketch is a linear map with an exact adjoint, can be cut into columns, and depends on its fields alone.

Identities are held in float64 to the tolerance of `assert_close`, 1e-7: far above rounding, far below any mistake.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_sketch.operators.kinds import KINDS

SIZES = [(1, 1), (100, 33), (100, 100), (1000, 48)]  # trivial, uneven, square, many chunks
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}to{size[1]}")
def sketch(make, request):
    n, dim = request.param
    return make(n=n, dim=dim, seed=3)


def test_matvec_is_linear(sketch, vectors):
    x, y = vectors(2, sketch.n)
    torch.testing.assert_close(sketch.matvec(2 * x - y), 2 * sketch.matvec(x) - sketch.matvec(y))


def test_rmatvec_is_the_adjoint(sketch, vectors):
    """⟨S x, y⟩ = ⟨x, Sᵀ y⟩."""
    x, y = vectors(sketch.n), vectors(sketch.dim + 1)[1:]
    torch.testing.assert_close(sketch.matvec(x) @ y, x @ sketch.rmatvec(y))


def test_every_entry_of_the_adjoint_is_the_transposed_one(make):
    sketch = make(n=100, dim=33, seed=3)
    matrix = sketch.as_matrix(dtype=torch.float64)
    assert matrix.shape == sketch.shape
    torch.testing.assert_close(sketch.T.as_matrix(dtype=torch.float64), matrix.T)


def test_batch_axes_are_independent(sketch, vectors):
    x, y = vectors(2, 3, sketch.n), vectors(2, 3, sketch.dim)
    torch.testing.assert_close(sketch.matvec(x)[1, 2], sketch.matvec(x[1, 2]))
    torch.testing.assert_close(sketch.rmatvec(y)[1, 2], sketch.rmatvec(y[1, 2]))


def test_an_empty_batch_gives_an_empty_batch(sketch, vectors):
    assert sketch.matvec(vectors(2, 0, sketch.n)).shape == (2, 0, sketch.dim)
    assert sketch.rmatvec(vectors(0, sketch.dim)).shape == (0, sketch.n)


def test_strides_do_not_matter(sketch, vectors):
    x, y = vectors(sketch.n, 3), vectors(2 * sketch.dim)
    assert torch.equal(sketch.matvec(x.T), sketch.matvec(x.T.contiguous()))
    assert torch.equal(sketch.rmatvec(y[::2]), sketch.rmatvec(y[::2].contiguous()))


def test_the_input_is_left_as_it_was(sketch, vectors):
    x, y = vectors(3, sketch.n), vectors(3, sketch.dim)
    sketch.matvec(x)
    sketch.rmatvec(y)
    assert torch.equal(x, vectors(3, sketch.n))
    assert torch.equal(y, vectors(3, sketch.dim))


@pytest.mark.parametrize("cuts", [(0, 1, 40, 41, 20_000), (0, 8191, 8193, 16_385, 20_000)])
def test_columns_sum_to_the_whole(make, vectors, cuts):
    """Over ranges that tile [0, n): uneven ones, ones of a single coordinate, ones beside a block of random signs."""
    sketch, x = make(n=20_000, dim=24, seed=3), vectors(20_000)
    parts = [sketch.columns(a, b).matvec(x[a:b]) for a, b in pairwise(cuts)]
    torch.testing.assert_close(sum(parts), sketch.matvec(x))


@pytest.mark.parametrize("cuts", [(0, 1), (40, 41), (8191, 8193), (8193, 20_000)])
def test_rmatvec_of_columns_is_a_slice_of_the_whole(make, vectors, cuts):
    sketch, y = make(n=20_000, dim=24, seed=3), vectors(2, 24)
    torch.testing.assert_close(sketch.columns(*cuts).rmatvec(y), sketch.rmatvec(y)[:, slice(*cuts)])


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.streams])
def test_columns_far_beyond_2_to_32_are_other_columns_of_one_map(kind, vectors):
    """Signs lie 32 to a word: at coordinate 2^37 the index of the word passes 2^32."""
    sketch, x, far = kind(n=1 << 40, dim=8, seed=3), vectors(2, 64), 1 << 37
    whole = sketch.columns(far - 32, far + 32)
    parts = sketch.columns(far - 32, far).matvec(x[:, :32]) + sketch.columns(far, far + 32).matvec(x[:, 32:])
    torch.testing.assert_close(whole.matvec(x), parts)
    assert not torch.allclose(whole.as_matrix()[:, 32:], sketch.columns(0, 32).as_matrix())


def test_the_size_of_the_cache_changes_nothing(make, vectors, monkeypatch):
    """Vectors are worked on in pieces; with pieces of 64 numbers, every loop over them turns many times."""
    sketch, x, y = make(n=1000, dim=48, seed=3), vectors(5, 1000), vectors(5, 48)
    whole = sketch.matvec(x), sketch.rmatvec(y)
    for module in ("hadamard", "streaming", "full", "fjl", "gaussian"):
        monkeypatch.setattr(f"lightning_sketch.operators.{module}.CACHED", 64)
    torch.testing.assert_close((sketch.matvec(x), sketch.rmatvec(y)), whole)


def test_no_memory_is_read_before_it_is_written(make, vectors):
    """In this mode PyTorch fills fresh memory with NaN."""
    sketch, x, y = make(n=1000, dim=48, seed=3), vectors(5, 1000), vectors(5, 48)
    plain = sketch.matvec(x), sketch.rmatvec(y)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close((sketch.matvec(x), sketch.rmatvec(y)), plain)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inner_products_are_kept_on_average(make, vectors):
    """E⟨S x, S y⟩ = ⟨x, y⟩ over seeds, within five standard errors.

    x and y overlap, so that a wrong scale stands out of the noise; neither size is a power of two, so that
    scaling by n or dim in place of the padded sizes stands out too.
    """
    x, noise = vectors(2, 100)
    pair = torch.stack((x, x + 0.3 * noise))
    sketched = torch.stack([make(n=100, dim=33, seed=seed).matvec(pair) for seed in range(500)])
    got = (sketched[:, 0] * sketched[:, 1]).sum(-1)
    assert abs(got.mean() - pair[0] @ pair[1]) < 5 * got.std() / math.sqrt(len(got))


def test_the_average_map_is_zero(make):
    """E[S] = 0 over seeds, within five standard errors: every entry has a random sign, and it is from the seed."""
    entries = torch.stack([make(n=10, dim=6, seed=seed).T.as_matrix() for seed in range(400)])
    assert (entries.mean(0).abs() < 5 * entries.std(0) / math.sqrt(400)).all()


def test_another_seed_is_another_map(make, vectors):
    x = vectors(100)
    assert not torch.allclose(make(100, 33, seed=0).matvec(x), make(100, 33, seed=1).matvec(x))


@pytest.mark.parametrize("device", DEVICES)
def test_same_fields_same_map_on_every_device(sketch, vectors, device):
    x, y = vectors(3, sketch.n), vectors(3, sketch.dim)
    again = type(sketch)(n=sketch.n, dim=sketch.dim, seed=sketch.seed)
    torch.testing.assert_close(again.matvec(x.to(device)).cpu(), sketch.matvec(x))
    torch.testing.assert_close(again.rmatvec(y.to(device)).cpu(), sketch.rmatvec(y))


def test_the_global_generators_are_left_alone(sketch, vectors):
    x = vectors(sketch.n)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sketch.rmatvec(sketch.matvec(x))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
