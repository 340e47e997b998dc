"""The recurrence holds to rounding whatever happens to the vectors, and the defect tells a linear map from others."""

import itertools
import math

import pytest
import torch
from symmetric_matrices import normal, symmetric

from lightning_sketch.linalg.lanczos import dot, lanczos, start_vector
from lightning_sketch.linalg.linearity import defect
from lightning_sketch.operators import LinearOperator

CHUNK = 1 << 18
PINNED = [0.14649476, 0.82006681, 0.52863103, -0.16303033]


class Map(LinearOperator):
    """An operator by any function of vectors of size n, linear or not."""

    dtype = torch.float64

    def __init__(self, function, n=100):
        self.function, self.n = function, n

    @property
    def shape(self):
        return self.n, self.n

    def matvec(self, x):
        return self.function(x)

    rmatvec = matvec


@pytest.mark.parametrize("n", [1, CHUNK, 2 * CHUNK + 7])
def test_dot_products_are_summed_up_in_float64(n):
    """Return the exactly rounded sum of products of float32 numbers, each exact in float64."""
    x, y = normal(2, n).float()
    exact = math.fsum((x.double() * y.double()).tolist())
    assert dot(x, y) == pytest.approx(exact, rel=1e-10)


def test_the_start_is_a_unit_vector_pinned_forever(dense_operator):
    """With another start vector the same measurement would have other results."""
    start = start_vector(dense_operator(torch.eye(4)), seed=3, name="0")
    expected = torch.tensor(PINNED, dtype=start.dtype)
    torch.testing.assert_close(start, expected, rtol=1e-6, atol=0)
    assert start.norm() == pytest.approx(1)


def test_chunks_of_the_start_do_not_repeat_each_other():
    """A longer vector begins in the direction of a shorter one."""
    big, small = (start_vector(Map(None, n), seed=1, name="2") for n in (CHUNK + 10_000, 10_000))
    assert torch.equal(big[:10_000].sign(), small.sign())
    agreement = (big[:10_000] * big[CHUNK:]).sign().mean()
    assert abs(agreement) < 5 / math.sqrt(10_000)  # five standard errors
    assert dot(big, big) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_recurrence_outlives_orthogonality(dense_operator, dtype):
    """||A V - V T|| stays at rounding, 60 steps after the outliers have converged and V has lost its rank."""
    matrix = symmetric([100.0, 80.0, 50.0, *torch.linspace(-1, 1, 197).tolist()], dtype)
    operator = dense_operator(matrix)
    v = [start_vector(operator, seed=1, name="0")]
    alpha, beta = [], []
    for w, a, b in itertools.islice(lanczos(operator, seed=1), 80):
        v.append(w)
        alpha.append(a)
        beta.append(b)
    v = torch.stack(v, dim=1).double()
    t = torch.zeros(81, 80, dtype=torch.float64)
    t[range(80), range(80)] = torch.tensor(alpha, dtype=torch.float64)
    t[range(1, 81), range(80)] = torch.tensor(beta, dtype=torch.float64)
    t[range(79), range(1, 80)] = torch.tensor(beta[:-1], dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert (matrix.double() @ v[:, :80] - v @ t).norm(dim=0).max() < 10 * eps * 100  # a few roundings of ||A|| = 100
    assert (v.T @ v - torch.eye(81)).abs().max() > 0.5  # the test has teeth: orthogonality is gone


def test_the_recurrence_goes_on_where_the_krylov_space_ends(dense_operator):
    """With two distinct eigenvalues every Krylov space ends after two steps, and a new start finds the next copies."""
    matrix = symmetric([2.0] * 10 + [1.0] * 10)
    operator = dense_operator(matrix)
    v, steps = [start_vector(operator, seed=0, name="0")], list(itertools.islice(lanczos(operator, seed=0), 8))
    v += [w for w, _, _ in steps]
    assert [b == 0 for _, _, b in steps] == [False, True] * 4
    for j, (_, a, b) in enumerate(steps):
        before = steps[j - 1][2] * v[j - 1] if j else 0
        torch.testing.assert_close(matrix @ v[j], a * v[j] + b * v[j + 1] + before)
    assert torch.linalg.matrix_rank(torch.stack(v[:8])) == 8


@pytest.mark.parametrize("function", [lambda x: x, lambda x: x * torch.linspace(-1, 1, 100)], ids=["identity", "other"])
def test_a_vector_stays_as_it_was_handed_out(function):
    """This must be so even if an operator returns its argument, which is then the vector itself."""
    vectors = [v for v, _, _ in itertools.islice(lanczos(Map(function), seed=0), 10)]
    torch.testing.assert_close(torch.stack(vectors).norm(dim=1), torch.ones(10).double())


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_the_defect_of_a_linear_map_is_rounding(dense_operator, dtype, bar):
    operator = dense_operator(symmetric(torch.linspace(-1, 1, 100).tolist(), dtype))
    u, v = normal(2, 100).to(dtype)
    assert defect(operator, u, v).linearity < bar


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_defect_of_a_hessian_is_rounding(case, dtype):
    """Measured 4e-16 and 1e-7 to 2e-7."""
    u, v = normal(2, len(case.dense)).to(dtype)
    assert defect(case.hessian(dtype), u, v).linearity < {torch.float64: 5e-15, torch.float32: 5e-6}[dtype]


@pytest.mark.parametrize("function", [torch.abs, torch.square, lambda x: x + 1], ids=["abs", "square", "affine"])
def test_the_defect_of_another_map_is_large(function):
    u, v = normal(2, 100)
    assert defect(Map(function), u, v).linearity > 0.3


def test_the_defect_is_not_blown_up_where_an_image_cancels():
    """A (u + v) = 0 up to rounding of A u = -A v."""
    q = normal(100) / 10
    u = normal(100, seed=1)
    v = -u + normal(100, seed=2) * 1e-3
    v -= q * (q @ (u + v)) / (q @ q)
    assert defect(Map(lambda x: q * (q @ x)), u, v).linearity < 1e-13
