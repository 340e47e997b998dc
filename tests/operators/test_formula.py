"""Each kind is its formula: built here a second time, from dense matrices and the same random numbers.

H is Sylvester's matrix, orthonormal; R keeps the first dim rows; pad fills with zeros. All in float64; kinds that have
kernels in float32 as well, which kernels take.
"""

import math

import pytest
import torch
from marks import slow

from lightning_sketch.operators import AFFD, AFJL, FFD, FJL, QK, BlockSRHT, CountSketch, Gaussian
from lightning_sketch.operators.random import integers, normals, signs, words

SIZES = [(300, 24), (1, 1), (128, 32), (100, 33)]  # many chunks and padding; trivial; powers of two; neither
every_size = pytest.mark.parametrize("size", SIZES)
one_size = pytest.mark.parametrize("size", [SIZES[0], *map(slow, SIZES[1:])])  # and the others in `make test-all`


def power_of_two(size):
    return 2 ** math.ceil(math.log2(size))


def orthonormal(m):
    """Return H_m, whose entry (i, j) is (-1)^(number of ones that i and j share in binary) / √m."""
    shared = torch.arange(m)[:, None] & torch.arange(m)
    return torch.tensor([[(-1.0) ** row.bit_count() for row in rows] for rows in shared.tolist()]).double() / m**0.5


def keep(rows, size):
    """Return R, the first rows of the identity."""
    return torch.eye(size, dtype=torch.float64)[:rows]


def diagonal(draw, sketch, stream, start, stop):
    return torch.diag(draw(sketch.key(stream), start, stop, torch.float64))


def side_by_side(sketch, chunk, block):
    """Return [M_0 M_1 ...], one block for each chunk of coordinates, without the columns of the padding."""
    return torch.cat([block(c, c * chunk, (c + 1) * chunk) for c in range(-(-sketch.n // chunk))], 1)[:, : sketch.n]


def gram_schmidt(columns):
    """Orthonormalize columns, each against those before it; twice, against rounding."""
    done = columns[:, :0]
    for column in columns.T:
        for _ in range(2):
            column = column - done @ (done.T @ column)
        done = torch.cat((done, column[:, None] / column.norm()), dim=1)
    return done


def agrees(sketch, dense, *more):
    for dtype in (torch.float64, *more):
        torch.testing.assert_close(sketch.as_matrix(dtype=dtype), dense.to(dtype))


@one_size
def test_affd(size):
    """S = √(N / dim) R H G H B pad."""
    sketch = AFFD(*size, seed=3)
    padded = power_of_two(sketch.n)
    h = orthonormal(padded)
    b = diagonal(signs, sketch, "signs", 0, padded)
    g = diagonal(normals, sketch, "normals", 0, padded)
    agrees(sketch, math.sqrt(padded / sketch.dim) * (keep(sketch.dim, padded) @ h @ g @ h @ b)[:, : sketch.n])


@one_size
def test_afjl(size):
    """S = √(N / dim) R G H B pad."""
    sketch = AFJL(*size, seed=3)
    padded = power_of_two(sketch.n)
    b = diagonal(signs, sketch, "signs", 0, padded)
    g = diagonal(normals, sketch, "normals", 0, sketch.dim)
    agrees(
        sketch,
        math.sqrt(padded / sketch.dim) * (g @ keep(sketch.dim, padded) @ orthonormal(padded) @ b)[:, : sketch.n],
    )


@every_size
def test_block_srht(size, kernel):
    """S = [M_0 M_1 ...], M_c = fold diag(t_c) H diag(s_c); row r of the fold goes to r mod dim."""
    sketch = BlockSRHT(*size, seed=3)
    b = power_of_two(sketch.dim)
    fold = torch.cat((keep(sketch.dim, sketch.dim), keep(sketch.dim, sketch.dim)), dim=1)[:, :b]

    def block(c, start, stop):
        after, before = diagonal(signs, sketch, "out", start, stop), diagonal(signs, sketch, "in", start, stop)
        return fold @ after @ orthonormal(b) @ before

    agrees(sketch, side_by_side(sketch, b, block), torch.float32)


@one_size
def test_count_sketch(size, kernel):
    """S = [M_0 M_1 ...], M_c = roll by r_c, times diag(s_c)."""
    sketch = CountSketch(*size, seed=3)

    def block(c, start, stop):
        (shift,) = integers(sketch.key("shifts"), c, c + 1, below=sketch.dim).tolist()
        return torch.roll(diagonal(signs, sketch, "signs", start, stop), shift, dims=0)

    agrees(sketch, side_by_side(sketch, sketch.dim, block), torch.float32)


@one_size
def test_ffd(size):
    """S = √(D / dim) R [M_0 M_1 ...], M_c = B_c H Π_cᵀ G_c H; Π_cᵀ sorts by random words."""
    sketch = FFD(*size, seed=3)
    d = power_of_two(sketch.dim)
    h = orthonormal(d)

    def block(c, start, stop):
        order = words(sketch.key("permutations"), start, stop).argsort()
        permutation = torch.eye(d, dtype=torch.float64)[order]
        b, g = diagonal(signs, sketch, "signs", start, stop), diagonal(normals, sketch, "normals", start, stop)
        return b @ h @ permutation @ g @ h

    agrees(sketch, math.sqrt(d / sketch.dim) * side_by_side(sketch, d, block)[: sketch.dim])


@one_size
def test_fjl(size):
    """S = √(N / (64 dim)) P H B pad; the 64 columns of each row of P come from the low bits of two words each."""
    sketch = FJL(*size, seed=3)
    padded = power_of_two(sketch.n)
    weights = normals(sketch.key("normals"), 0, 64 * sketch.dim, torch.float64).view(-1, 64)
    columns = words(sketch.key("columns"), 0, 128 * sketch.dim)[::2].view(-1, 64) % padded
    p = torch.zeros(sketch.dim, padded, dtype=torch.float64).scatter_add_(1, columns, weights)
    mixed = orthonormal(padded) @ diagonal(signs, sketch, "signs", 0, padded)
    agrees(sketch, math.sqrt(padded / (64 * sketch.dim)) * (p @ mixed)[:, : sketch.n])


@one_size
def test_gaussian(size):
    """S_ij = g_ij / √dim, column by column."""
    sketch = Gaussian(*size, seed=3)
    entries = normals(sketch.key("normals"), 0, sketch.n * sketch.dim, torch.float64).view(sketch.n, sketch.dim)
    agrees(sketch, entries.T / math.sqrt(sketch.dim))


@pytest.mark.parametrize("size", [(100, 33), (3000, 48), slow((1, 1)), slow((4096, 100))])  # one factor, two factors
def test_qk(size):
    """S = √(N / dim) R (Q_1 ⊗ ... ⊗ Q_K) pad; Q_iᵀ is a Gaussian matrix after Gram-Schmidt, hence Haar."""
    sketch = QK(*size, seed=3)
    kronecker = torch.ones(1, 1, dtype=torch.float64)
    for i, (d, b) in enumerate(sketch.factors):
        gaussian = normals(sketch.key(f"factor {i}"), 0, d * b, torch.float64).view(b, d)
        kronecker = torch.kron(kronecker, gram_schmidt(gaussian).T)
    assert kronecker.shape == (power_of_two(sketch.dim), power_of_two(sketch.n))
    agrees(sketch, math.sqrt(kronecker.shape[1] / sketch.dim) * kronecker[: sketch.dim, : sketch.n])


@pytest.mark.parametrize(
    ("n", "dim", "factors"),
    [
        (1 << 10, 64, [(64, 1 << 10)]),
        ((1 << 10) + 1, 64, [(8, 1 << 5), (8, 1 << 6)]),
        (1 << 24, 4096, [(16, 256)] * 3),
        (1 << 25, 1 << 13, [(16, 256), (16, 256), (32, 512)]),
    ],
)
def test_the_factors_of_qk_are_balanced_and_few(n, dim, factors):
    """This rule is part of the map: as few factors as possible with each B_i at most 2^10."""
    assert QK(n, dim).factors == factors
