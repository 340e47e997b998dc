"""Properties of a spectrum: which eigenvalues have converged, both ends, counts that may be lower bounds, and plots."""

import math

import pytest
import torch

from lightning_sketch.curvature import Count, Spectrum


def result(eigenvalues, residuals=None, tol=1e-2, defect=1e-7, known=None):
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    residuals = torch.zeros_like(values) if residuals is None else torch.tensor(residuals, dtype=torch.float64)
    return Spectrum(values, residuals, tol=tol, linearity_defect=defect, num_products=10, known=known)


def test_converged_walks_inwards_from_each_end():
    """A good residual behind a bad one may belong to an eigenvalue of another rank."""
    sp = result([9, 8, 7, 6, 1, -2, -3, -4], [0.08, 0.08, 0.2, 0, 0, 0, 0.2, 0.04])
    assert sp.converged.tolist() == [True, True, False, False, False, False, False, True]


def test_converged_is_relative_to_each_value():
    assert result([10, -0.5], [0.09, 0.006]).converged.tolist() == [True, False]
    assert result([10, -0.5], [0.11, 0.004]).converged.tolist() == [False, True]


def test_converged_goes_as_far_as_ranks_are_known():
    """A residual says that there is an eigenvalue, but not how many."""
    sp = result([9, 8, 7, 6, -2, -3], known=(2, 1))
    assert sp.accepted.all()
    assert sp.converged.tolist() == [True, True, False, False, False, True]
    assert str(sp.num_outliers()) == ">=2"
    assert result([9, 8, 7], known=(3, 3)).converged.all()
    assert not result([9, 8, 7], known=(0, 0)).converged.any()


def test_ends_are_read_outermost_first():
    sp = result([5, 3, 1, -2, -4])
    assert sp.top(2).tolist() == [5, 3]
    assert sp.bottom(2).tolist() == [-4, -2]
    assert sp.top(9).tolist() == [5, 3, 1, -2, -4]
    assert (sp.lambda_max, sp.lambda_min) == (5, -4)


def test_rneg_is_the_most_negative_over_the_largest():
    sp = result([5, 1, -2], [0.1, 0, 0.05])
    assert sp.rneg == 0.4
    assert sp.rneg_error == pytest.approx((0.05 + 0.4 * 0.1) / 5)


def test_rneg_is_zero_where_nothing_stands_out_of_the_rounding():
    assert result([5, 1, 0.5]).rneg == 0
    assert result([5, 1, -4e-6], defect=1e-7).rneg == 0
    assert result([5, 1, -6e-6], defect=1e-7).rneg > 0


@pytest.mark.parametrize("eigenvalues", [[-1, -2], [0, 0]])
def test_rneg_needs_a_positive_eigenvalue(eigenvalues):
    sp = result(eigenvalues)
    assert math.isnan(sp.rneg)
    assert math.isnan(sp.rneg_error)


@pytest.mark.parametrize(
    ("residuals", "text"),
    [
        ([0, 0, 0, 0], "2"),
        ([0, 0, 0, 9], "2"),
        ([0, 0, 9, 0], ">=2"),  # the next below might be a third in disguise
        ([0, 9, 0, 0], ">=1"),
        ([9, 0, 0, 0], ">=0"),
    ],
)
def test_outliers_are_counted_as_far_as_they_are_known(residuals, text):
    count = result([10, 3, 1, 0.5], residuals).num_outliers(0.2)
    assert str(count) == repr(count) == text
    assert count == int(text.removeprefix(">="))
    assert count.at_least == text.startswith(">=")


def test_a_count_without_a_next_one_below_is_a_lower_bound():
    """The run may have ended before it found the bulk."""
    assert str(result([3, 3, 3]).num_outliers()) == ">=3"


def test_a_count_is_a_number():
    count = Count(7, at_least=True)
    assert count > 6
    assert count + 1 == 8
    assert f"{count}" == f"{count!s}" == ">=7"
    assert f"{count:>5}" == "  >=7"
    assert str(Count(7)) == "7"


def test_plot_marks_what_has_not_converged():
    """Markers are filled or white, at the heights of the eigenvalues."""
    values = torch.tensor([5.0, 2.0, 0.1, -1.0], dtype=torch.float64)
    residuals = torch.tensor([1e-3, 1e-3, 0.5, 1e-3], dtype=torch.float64)
    axes = Spectrum(values, residuals, tol=1e-2, linearity_defect=0.0, num_products=9).plot().axes[0]
    filled, white = (container.lines[0].get_ydata().tolist() for container in axes.containers)
    assert (filled, white) == ([5.0, 2.0, -1.0], [0.1])
