"""The trace has no bias, and its standard error is honest, also where outliers or copies make up most of it."""

import pytest
import torch
from marks import pairs

from lightning_sketch.curvature import spectrum

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
