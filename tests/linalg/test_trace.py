"""tr A and tr A² have no bias, and their standard errors are honest, also where outliers or copies make up most."""

import pytest
import torch
from marks import pairs

from lightning_sketch.curvature import spectrum
from lightning_sketch.linalg.krylov import SketchedRun
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.linalg.quadrature import trace

SEEDS = range(24)
SPECTRA = {
    "outliers": torch.cat([torch.tensor([10.0, 8, 7, 6, 5, 4, 3.5, 3, 2.5]), torch.logspace(0, -4, 491)]),
    "copies": torch.cat([torch.tensor([10.0] * 6 + [5.0] * 6), torch.linspace(-0.1, 0.1, 488)]),
    "one": torch.cat([torch.tensor([20.0]), torch.linspace(-0.1, 0.1, 499)]),
    "both signs": torch.linspace(-3, 5, 500),
}


OPTIONS = [{}, {"num_matvecs": 16, "top_k": 1}, {"density_probes": 2}]


@pytest.mark.parametrize(("name", "options"), pairs(SPECTRA, OPTIONS))
def test_the_trace_is_unbiased_and_its_error_honest(dense_operator, name, options):
    """Over 24 seeds: the mean within four of its own standard errors; each value rarely beyond three of its own.

    The standard error comes from a few draws itself, so that the root mean square of the ratios is not one
    but, measured, up to 1.4.
    """
    values = SPECTRA[name]
    a, true = dense_operator(torch.diag(values.double())), float(values.sum())
    found = [spectrum(a, seed=seed, bottom_k=0, dim=512, **options) for seed in SEEDS]
    errors = torch.tensor([sp.trace - true for sp in found])
    ratios = errors / torch.tensor([sp.trace_sem for sp in found])
    assert errors.mean().abs() < 4 * errors.std() / len(SEEDS) ** 0.5
    assert ratios.square().mean().sqrt() < 2
    assert (ratios.abs() > 3).sum() <= 2


def test_what_is_known_makes_the_trace_sharper(dense_operator):
    """Nine outliers make up nearly all of ||A||_F: with them taken out, the error falls to that of the bulk."""
    values = SPECTRA["outliers"].double()
    found = [spectrum(dense_operator(torch.diag(values)), dim=512, bottom_k=0, seed=seed) for seed in range(8)]
    plain = (2 * float(values.square().sum()) / len(found[0].krylov.runs)) ** 0.5
    assert sum(sp.trace_sem for sp in found) / len(found) < plain / 2


@pytest.mark.parametrize(("name", "options"), pairs(SPECTRA, OPTIONS))
def test_the_sum_of_squares_is_unbiased_and_its_error_honest(dense_operator, name, options):
    """The same theorem for tr A² = ||A||_F²; the root mean square of the ratios is, measured, up to 1.3."""
    values = SPECTRA[name]
    a, true = dense_operator(torch.diag(values.double())), float(values.double().square().sum())
    found = [spectrum(a, seed=seed, bottom_k=0, dim=512, **options) for seed in SEEDS]
    errors = torch.tensor([sp.trace_of_square - true for sp in found])
    ratios = errors / torch.tensor([sp.trace_of_square_sem for sp in found])
    assert errors.mean().abs() < 4 * errors.std() / len(SEEDS) ** 0.5
    assert ratios.square().mean().sqrt() < 2
    assert (ratios.abs() > 3).sum() <= 2


def test_a_single_product_gives_the_length_of_the_image(dense_operator):
    """One product A v has ||A v||² in it, whose mean is ||A||_F² / n, though one node cannot represent it."""
    values = SPECTRA["both signs"].double()
    v = start_vector(dense_operator(values.diag()), 0, name="0")
    alpha = float(v @ (values * v))
    beta = float((values * v - alpha * v).norm())
    found = trace([SketchedRun([], [alpha], [beta])], 500, power=2)
    assert found.value == pytest.approx(500 * float((values * v).square().sum()))
    assert 0.01 < found.sem / found.value < 1


@pytest.mark.parametrize(("power", "least"), [(1, 0.5), (2, 10.0)])
def test_the_error_of_a_known_eigenvalue_is_added(dense_operator, power, least):
    """10 ± 0.5 is all there is, so that its square is 100 ± 10."""
    values = torch.zeros(300, dtype=torch.float64)
    values[0] = 10.0
    krylov = spectrum(dense_operator(values.diag()), top_k=1, bottom_k=0, num_matvecs=4).krylov
    known = torch.tensor([10.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64), torch.tensor([True])
    found = trace(krylov.runs[:1], 300, *known, power=power)
    assert found.value == pytest.approx(10.0**power)
    assert found.sem == pytest.approx(least)


def test_all_eigenvalues_known_give_both_sums_exactly(dense_operator):
    values = torch.tensor([5.0, 3, 1, -2], dtype=torch.float64)
    sp = spectrum(dense_operator(values.diag()), num_matvecs=4, top_k=3, bottom_k=1)
    assert sp.trace == pytest.approx(7, abs=1e-9)
    assert sp.trace_of_square == pytest.approx(39, abs=1e-9)
    assert sp.frobenius_norm == pytest.approx(39**0.5, abs=1e-9)
    assert sp.trace_of_square_sem < 1e-6
