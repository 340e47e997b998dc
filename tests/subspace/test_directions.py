"""Directions are unbiased for every dim, nested, and adjoint; no vector of two entries is mapped to zero."""

import pytest
import torch
from marks import pairs

from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.subspace.directions import Directions, Identity

N = 300


def vector(seed=0, n=N):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "dims"), pairs(KINDS, [(32, None), (16, 128), (128, 128), (N, None), (8, N)]))
def test_adjoint(kind, dims):
    """<D x, w> = <x, Dᵀ w>, to the rounding of a sketch's own float32 tables."""
    dim, max_dim = dims
    directions = Directions.of(kind, N, dim, 3, max_dim)
    x, w = vector(1), vector(2, dim)
    assert torch.allclose(directions.matvec(x) @ w, x @ directions.rmatvec(w), rtol=1e-6, atol=1e-9)
    assert directions.as_matrix(dtype=torch.float64).shape == (dim, N) == directions.shape


@pytest.mark.parametrize("dim", [8, 32, 64, 128])
def test_unbiased_whatever_is_used(dim):
    """E‖D x‖² = ‖x‖²; the mean of 200 draws of relative variance at most about 2 / dim is within four errors."""
    x = vector() / vector().norm()
    squares = torch.stack(
        [Directions.of("block_srht", N, dim, seed, 128).matvec(x).square().sum() for seed in range(200)]
    )
    assert abs(squares.mean() - 1) < 4 * (2 / dim / 200) ** 0.5


def test_the_former_directions_are_among_the_doubled():
    few = Directions.of("block_srht", N, 16, 0, 50)
    more = few.doubled()
    assert (more.dim, more.doubled().dim, more.doubled().doubled().dim) == (32, 50, 50)
    both = few.as_matrix(dtype=torch.float64), more.as_matrix(dtype=torch.float64)
    assert torch.allclose(both[0] / both[0].norm(), both[1][:16] / both[1][:16].norm())
    assert few.spec() == more.spec()


@pytest.mark.slow
def test_no_vector_of_two_entries_vanishes():
    """Without the permutation half of the draws map e_0 + e_64 to zero: rows of a Hadamard matrix are periodic."""
    n, dim, max_dim = 512, 64, 256
    x = torch.zeros(n, dtype=torch.float64)
    x[0], x[dim] = 1, 1
    zero = {True: 0, False: 0}
    for seed in range(400):
        directions = Directions.of("block_srht", n, dim, seed, max_dim)
        zero[True] += int(directions.matvec(x).norm() < 1e-9)
        zero[False] += int(directions.sketch.matvec(x)[:dim].norm() < 1e-9)
    assert zero[True] == 0
    assert zero[False] > 100


def test_all_of_them_are_the_weights_themselves():
    directions = Directions.of("qk", N, N, 0)
    assert directions.sketch == Identity(N, N)
    assert torch.equal(directions.matvec(vector()), vector())
    assert torch.equal(directions.rmatvec(vector()), vector())
    assert torch.equal(directions.sketch.columns(3, 7).matvec(vector()[3:7])[3:7], vector()[3:7])
    with pytest.raises(ValueError, match="dim = n"):
        Identity(4, 3)


def test_nested_directions_are_random_up_to_the_last():
    """Coordinate axes are right for dim = n alone: all n entries of each of the first eight rows are nonzero."""
    few = Directions.of("block_srht", 64, 8, 0, 64)
    assert few.as_matrix().count_nonzero() == 8 * 64
    assert few.doubled().doubled().doubled().shape == (64, 64)


def test_nested_directions_are_random_where_all_are_in_use_from_the_start():
    assert Directions.of("block_srht", 64, 64, 0, 64).as_matrix().count_nonzero() == 64 * 64


@pytest.mark.parametrize("kind", ["block_srht", "gaussian"])
def test_condition(kind):
    """The estimate is exact with as many products as directions, and a lower bound with fewer."""
    directions = Directions.of(kind, 60, 40, 1)
    singular = torch.linalg.svdvals(directions.as_matrix(dtype=torch.float64))
    exact = float(singular[0] / singular[-1])
    assert directions.condition(40) == pytest.approx(exact, rel=1e-3)
    assert 1 <= directions.condition(5) <= exact * 1.001


@pytest.mark.parametrize(("n", "dim"), [(60, 40), (300, 160)])
def test_condition_is_close_by_default(n, dim):
    """If D Dᵀ has few distinct eigenvalues, the Krylov space is small, and rounding errors must not enlarge it."""
    directions = Directions.of("block_srht", n, dim, 1)
    singular = torch.linalg.svdvals(directions.as_matrix(dtype=torch.float64))
    assert directions.condition() == pytest.approx(float(singular[0] / singular[-1]), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_condition_of_nearly_dependent_directions(seed):
    """AFJL at dim 20 of 64 has condition numbers up to 6629; Lanczos without reorthogonalization gave 157."""
    directions = Directions.of("afjl", 64, 20, seed)
    singular = torch.linalg.svdvals(directions.as_matrix(dtype=torch.float64))
    assert directions.condition() == pytest.approx(float(singular[0] / singular[-1]), rel=1e-6)


@pytest.mark.parametrize(
    ("dim", "max_dim", "said"),
    [(0, None, "dim=0"), (301, None, "dim=301"), (8, 4, "max_dim=4"), (8, 301, "max_dim=301")],
)
def test_dims_that_cannot_be(dim, max_dim, said):
    with pytest.raises(ValueError, match=f"n=300.*{said}"):
        Directions.of("block_srht", N, dim, 0, max_dim)


def test_the_order_is_pinned():
    """Checkpoints rely on the row of D to which each output of S is mapped."""
    directions = Directions.of("block_srht", 8, 8, 0, 8)
    assert directions.expand(torch.arange(8.0)).argsort().tolist() == [7, 5, 0, 6, 2, 1, 3, 4]


def test_the_order_depends_on_the_seed():
    orders = {
        tuple(Directions.of("block_srht", 64, 8, seed, 32)._order(torch.device("cpu")).tolist()) for seed in (0, 1)
    }
    assert len(orders) == 2
