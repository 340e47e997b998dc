"""A second pass over the recurrence gives the eigenvectors themselves, restarts included."""

import pytest
import torch
from symmetric_matrices import normal, symmetric

from lightning_sketch.curvature import Deflated, Spectrum, spectrum

DTYPES = [torch.float64, torch.float32]


def outside(vectors, space):
    """Return the largest sine of an angle between a vector and a space, both given by orthonormal rows."""
    vectors, space = vectors.double(), space.double()
    return float((vectors - (vectors @ space.T) @ space).norm(dim=1).max())


def true_pairs(matrix):
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0), vectors.T.flip(0)


SPECTRA = {
    "outliers": [9.0, 7, 5, 4, -3, -6, *torch.linspace(-1, 1, 394).tolist()],
    "few distinct": [5.0] * 3 + [2.0] * 4 + [1.0] + [-4.0] * 2 + [0.0] * 390,
    "small": [5.0, 3, 2, -1],
}
FEW = {"outliers": (4, 2), "few distinct": (8, 2), "small": (3, 1)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dim", [1024, 256], ids=["kept", "sketched"])
def test_they_span_the_true_eigenspaces(dense_operator, name, dtype, dim):
    """Few distinct eigenvalues end a Krylov space early: the run continues from new vectors, as does the pass."""
    matrix, (top, bottom) = symmetric(SPECTRA[name], dtype), FEW[name]
    values, vectors = true_pairs(matrix)
    operator = dense_operator(matrix)
    sp = spectrum(operator, num_matvecs=64, dim=dim, top_k=top, bottom_k=bottom, tol=0.0)
    found = sp.eigenvectors(operator, top, bottom_k=bottom)
    exact = 1e-5 if dtype == torch.float64 else 2e-3
    wanted = torch.cat([values[:top], values.flip(0)[:bottom]])
    torch.testing.assert_close(found.values, wanted, rtol=1e-10 if dtype == torch.float64 else 1e-5, atol=0)
    space = torch.cat([vectors[:top], vectors.flip(0)[:bottom]])
    assert outside(found.vectors, space) < exact
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(top + bottom, dtype=dtype))
    assert found.vectors.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_equal_eigenvalues_have_as_many_vectors(dense_operator, dtype, seed):
    """Rounding turns equal Ritz values into complex pairs, whose real parts alone would be one vector twice."""
    matrix = symmetric(SPECTRA["few distinct"], dtype)
    sp = spectrum(dense_operator(matrix), num_matvecs=64, top_k=8, bottom_k=2, tol=0.0, seed=seed)
    found = sp.eigenvectors(dense_operator(matrix), 8, bottom_k=2).vectors
    torch.testing.assert_close(found @ found.T, torch.eye(10, dtype=dtype), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlp trained"], indirect=True)
def test_of_a_network_they_are_those_of_the_dense_hessian(case):
    """They are computed in float32 and checked in float64: measured residuals of at most 2e-5 of the eigenvalue."""
    x = case.spectrum(torch.float32).eigenvectors(case.hessian(torch.float32), 5).vectors.double()
    values = ((x @ case.dense) * x).sum(1)
    torch.testing.assert_close(values, case.eigenvalues[:5], rtol=5e-6, atol=0)
    assert ((x @ case.dense - values[:, None] * x).norm(dim=1) < 1e-3 * values).all()
    torch.testing.assert_close(x @ x.T, torch.eye(5).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_matvecs", [10, 16, 24])
def test_values_and_residuals_are_what_a_product_says(dense_operator, num_matvecs):
    """Rayleigh quotients and true residuals are exact, also of values that have not converged."""
    matrix = symmetric(SPECTRA["outliers"])
    operator = dense_operator(matrix)
    sp = spectrum(operator, num_matvecs=num_matvecs, dim=256, top_k=6, bottom_k=2, tol=0.0)
    values, x, residuals = sp.eigenvectors(operator, 6, bottom_k=2)
    torch.testing.assert_close(values, ((x @ matrix) * x).sum(1))
    torch.testing.assert_close(residuals, (x @ matrix - values[:, None] * x).norm(dim=1), rtol=1e-6, atol=1e-12)


def test_their_quotients_are_better_than_ritz_values(dense_operator):
    """The error of a sketched value is of first order in the error of the vector, that of a quotient of second."""
    operator = dense_operator(symmetric(SPECTRA["outliers"]))
    true, ratios = torch.tensor([9.0, 7, 5, 4]).double(), []
    for seed in range(10):
        sp = spectrum(operator, num_matvecs=16, dim=256, seed=seed, top_k=4, bottom_k=0, tol=0.0)
        found = sp.eigenvectors(operator, 4).values
        ratios.append((found - true).abs() / (sp.top(4) - true).abs().clamp(min=1e-13))
    assert torch.cat(ratios).median() < 0.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_top_the_bottom_is_had_sooner(dense_operator, dtype):
    """A tight cluster of small negatives behind large outliers, at the same number of products."""
    values = [*torch.linspace(100, 40, 12).tolist(), *torch.linspace(-0.5, 1, 980).tolist(), *[-0.9, -0.95, -1.0]]
    operator = dense_operator(symmetric(values, dtype))
    top = spectrum(operator, num_matvecs=48, dim=512, top_k=12, bottom_k=0).eigenvectors(operator, 12)
    before, after = (
        spectrum(of, num_matvecs=32, dim=512, top_k=0, bottom_k=3, tol=1e-3)
        for of in (operator, Deflated(operator, top.vectors))
    )
    true = torch.tensor([-1.0, -0.95, -0.9]).double()
    torch.testing.assert_close(after.bottom(3), true, rtol=1e-3, atol=0)
    assert (after.bottom(3) - true).abs().max() < 0.1 * (before.bottom(3) - true).abs().max()
    assert after.lambda_max == pytest.approx(1, rel=0.05)


def test_a_deflated_operator_is_the_matrix_without_them(dense_operator):
    matrix = symmetric(SPECTRA["outliers"])
    _, x = true_pairs(matrix)
    deflated = Deflated(dense_operator(matrix), x[:3])
    v = normal(2, len(matrix))
    rest = torch.eye(len(matrix)).double() - x[:3].T @ x[:3]
    torch.testing.assert_close(deflated.matvec(v), v @ (rest @ matrix @ rest))
    torch.testing.assert_close(deflated.rmatvec(v), deflated.matvec(v))
    assert (deflated.shape, deflated.dtype) == (matrix.shape, matrix.dtype)
    assert deflated.matvec(x[:3]).abs().max() < 1e-12


def test_what_is_taken_out_need_not_be_eigenvectors(dense_operator):
    """They are taken out on both sides, so that the rest is symmetric."""
    matrix, x = symmetric(SPECTRA["small"]), torch.linalg.qr(normal(4, 2))[0].T
    rest = torch.eye(4).double() - x.T @ x
    torch.testing.assert_close(Deflated(dense_operator(matrix), x).matvec(normal(4)), rest @ matrix @ rest @ normal(4))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(2, 4), "not orthonormal, off by .*; take only converged ones, or"),
        (2 * torch.eye(4)[:2], "not orthonormal, off by 3"),
        (torch.full((1, 4), float("nan")), "not orthonormal, off by nan"),
        (torch.eye(5)[:2], r"cannot take \(2, 5\) vectors out of a \(4, 4\) operator"),
    ],
    ids=["parallel", "too long", "nan", "another size"],
)
def test_what_cannot_be_deflated(dense_operator, vectors, message):
    with pytest.raises(ValueError, match=message):
        Deflated(dense_operator(torch.eye(4)), vectors)


def test_a_spectrum_without_its_runs_has_no_vectors(dense_operator):
    bare = Spectrum(torch.ones(1).double(), torch.zeros(1).double(), tol=0.1, linearity_defect=0.0, num_products=1)
    with pytest.raises(ValueError, match="kept no Krylov vectors; call it on what spectrum"):
        bare.eigenvectors(dense_operator(torch.eye(4)))


def test_another_operator_shows_in_the_residuals(dense_operator):
    """The largest of four vectors that the same recurrence would give of a matrix with a diagonal added."""
    matrix = symmetric(SPECTRA["outliers"])
    sp = spectrum(dense_operator(matrix), num_matvecs=48, dim=256, top_k=4, bottom_k=0)
    same, other = (sp.eigenvectors(dense_operator(m), 4) for m in (matrix, matrix + torch.linspace(0, 1, 400).diag()))
    assert other.residuals.max() > 10 * same.residuals.max()
