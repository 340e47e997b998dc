"""The diagonal by random signs: no bias, honest errors for each entry, the same on every device, little memory."""

import pytest
import torch
from symmetric_matrices import normal, symmetric

from lightning_sketch.curvature import Diagonal, diagonal
from lightning_sketch.linalg.diagonal import _CHUNK
from lightning_sketch.operators import Gaussian
from lightning_sketch.operators.random import Key, signs


def test_the_error_of_each_entry_is_honest(dense_operator):
    """Entry by entry over 200 seeds, (estimate - truth) / sem has the second moment of Student's t, 31/29.

    The largest of 60 second moments over 200 draws each is within four standard errors, 4 √(2 / 200), of that.
    """
    matrix = symmetric(torch.linspace(-2, 9, 60))
    found = [diagonal(dense_operator(matrix), seed=seed) for seed in range(200)]
    z = torch.stack([(d.values - matrix.diag()) / d.sem for d in found])
    assert (z.mean(0).abs() < 4 / 200**0.5 * (31 / 29) ** 0.5).all()
    assert (z.square().mean(0) - 31 / 29).abs().max() < 4 * (2 / 200) ** 0.5
    sem = torch.stack([d.sem for d in found]).square().mean(0)
    torch.testing.assert_close(sem, (matrix.square().sum(1) - matrix.diag() ** 2) / 32, rtol=0.1, atol=0)


def test_the_diagonal_of_a_hessian(case):
    """Of a trained or random network: 32 products, three standard errors, as often as for a normal distribution."""
    d, true = diagonal(case.hessian()), case.dense.diag()
    known = d.sem > 1e-12 * true.abs().max()  # rows of zeros are exact
    assert ((d.values - true).abs()[~known] <= 1e-12 * true.abs().max()).all()
    z = ((d.values - true) / d.sem)[known]
    assert 0.7 < float(z.square().mean().sqrt()) < 1.3
    assert float((z.abs() > 3).double().mean()) < 0.02


def test_a_diagonal_matrix_is_exact_after_two_products(dense_operator):
    values = normal(300)
    d = diagonal(dense_operator(values.diag()), num_matvecs=2)
    torch.testing.assert_close(d.values, values, rtol=1e-15, atol=0)
    assert float(d.sem.abs().max()) < 1e-15


def test_it_is_the_mean_and_its_error_over_the_products(dense_operator):
    """Welford's recurrence gives what the two-pass formulas give, also where the mean is far above the spread."""
    matrix = 0.1 * normal(40, 40) + 1e6 * torch.eye(40, dtype=torch.float64)
    rows = torch.stack([(z := signs(Key(7, f"diagonal/{i}"), 0, 40, torch.float64)) * (matrix @ z) for i in (1, 2, 3)])
    d = diagonal(dense_operator(matrix), num_matvecs=3, seed=7)
    torch.testing.assert_close(d.values, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(d.sem, rows.std(0) / 3**0.5, rtol=1e-8, atol=0)


def test_it_works_by_chunks_and_leaves_an_operator_that_returns_its_argument():
    class Identity(Gaussian):
        """The identity, whose product is the vector it was given."""

        shape = (_CHUNK + 5, _CHUNK + 5)

        def matvec(self, x):
            return x

    d = diagonal(Identity(n=8, dim=8), num_matvecs=2)
    assert bool((d.values == 1).all())
    assert bool((d.sem == 0).all())


def test_what_it_refuses_and_how_it_prints(dense_operator):
    with pytest.raises(ValueError, match=r"square operator, got shape \(4, 9\)"):
        diagonal(Gaussian(n=9, dim=4))
    with pytest.raises(ValueError, match="num_matvecs >= 2 to know an error, got 1"):
        diagonal(dense_operator(torch.eye(3)), num_matvecs=1)
    assert repr(Diagonal(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5]))) == (
        "Diagonal of 2 entries, of length 5 ± 0.5"
    )
