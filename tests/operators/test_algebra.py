"""Sums, differences and multiples of operators are those of their matrices, also as SciPy sees them."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import aslinearoperator, cg, eigsh

from lightning_sketch.operators import AFFD, BlockSRHT, CountSketch, Gaussian

A, B = Gaussian(n=12, dim=5, seed=1), CountSketch(n=12, dim=5, seed=2)
DENSE_A, DENSE_B = (s.as_matrix(dtype=torch.float64) for s in (A, B))

EXPRESSIONS = {
    "sum": (A + B, DENSE_A + DENSE_B),
    "difference": (A - B, DENSE_A - DENSE_B),
    "multiple": (2 * A, 2 * DENSE_A),
    "multiple on the right": (A * 0.5, 0.5 * DENSE_A),
    "by a NumPy number": (np.float64(3) * A, 3 * DENSE_A),
    "by a tensor": (torch.tensor(3.0) * A, 3 * DENSE_A),
    "quotient": (A / 4, DENSE_A / 4),
    "negative": (-A, -DENSE_A),
    "of many": (sum([A, B, A]), 2 * DENSE_A + DENSE_B),
    "all together": (A - 2 * (B + A) * 0.25, DENSE_A - 0.5 * (DENSE_B + DENSE_A)),
    "with products": (A @ B.T + 0.1 * (A @ A.T), DENSE_A @ DENSE_B.T + 0.1 * DENSE_A @ DENSE_A.T),
}
expressions = pytest.mark.parametrize(("operator", "dense"), EXPRESSIONS.values(), ids=EXPRESSIONS)


@expressions
def test_an_expression_is_that_of_the_matrices(operator, dense):
    """Columns, the adjoint, and a batch of vectors, to the rounding of float64."""
    assert operator.shape == dense.shape
    torch.testing.assert_close(operator.as_matrix(dtype=torch.float64), dense)
    torch.testing.assert_close(operator.T.as_matrix(dtype=torch.float64), dense.T)
    x = torch.randn(2, 3, dense.shape[1], dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), x @ dense.T)


@pytest.mark.parametrize("other", [AFFD(n=12, dim=4), BlockSRHT(n=16, dim=5), A.T])
def test_unequal_shapes_do_not_add(other):
    with pytest.raises(ValueError, match=r"cannot add operators of shapes \(5, 12\) and \(.*\); build both"):
        _ = A + other


def test_operators_that_do_not_fit_are_not_composed():
    with pytest.raises(ValueError, match=r"vectors of size 12, the right one gives size 5; .*transpose one with \.T"):
        _ = A @ A


@pytest.mark.parametrize("other", [1.0, "a", None, torch.ones(5, 12)])
def test_what_is_no_operator_is_not_added(other):
    with pytest.raises(TypeError):
        _ = A + other
    with pytest.raises(TypeError):
        _ = A - other


@pytest.mark.parametrize("factor", ["a", None, torch.ones(2), 1j, A])
def test_what_is_no_real_number_does_not_multiply(factor):
    with pytest.raises(TypeError):
        _ = A * factor


@expressions
def test_scipy_sees_the_same_matrix(operator, dense):
    """Vectors, columns and the adjoint, in the operator's own precision."""
    seen = operator.to_scipy()
    assert isinstance(seen, ScipyOperator)
    assert (seen.shape, seen.dtype) == (dense.shape, np.float32)
    x, y = np.random.default_rng(0).normal(size=(dense.shape[1], 3)), np.arange(dense.shape[0])
    np.testing.assert_allclose(seen @ x, dense.numpy() @ x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen @ x[:, 0], dense.numpy() @ x[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.T @ y, dense.numpy().T @ y, rtol=1e-4, atol=1e-5)
    assert aslinearoperator(seen) is seen


def test_scipy_solves_with_it():
    """Conjugate gradients on S Sᵀ, and its largest eigenvalue."""
    s = Gaussian(n=400, dim=20)
    dense = s.as_matrix(dtype=torch.float64)
    gram, b = (s @ s.T).to_scipy(), np.ones(20, dtype=np.float32)
    x, failed = cg(gram, b, rtol=1e-6)
    assert not failed
    np.testing.assert_allclose(x, np.linalg.solve((dense @ dense.T).numpy(), b), rtol=1e-3)
    np.testing.assert_allclose(eigsh(gram, k=1)[0], np.linalg.eigvalsh((dense @ dense.T).numpy())[-1:], rtol=1e-5)


@expressions
def test_a_tensor_on_the_right_is_multiplied(operator, dense):
    x = torch.randn(dense.shape[1], 3, dtype=torch.float64)
    torch.testing.assert_close(operator @ x, dense @ x)
    torch.testing.assert_close(operator @ x[:, 0], dense @ x[:, 0])


def test_scipy_keeps_imaginary_parts():
    x = np.arange(12) + 1j * np.arange(12)[::-1]
    np.testing.assert_allclose(A.to_scipy() @ x, DENSE_A.numpy() @ x, rtol=1e-5)
