"""Parametrizations over kinds of sketches: the default kind takes every value, the others one, or all in a full run."""

import pytest

from lightning_sketch.operators import BlockSRHT
from lightning_sketch.operators.kinds import KINDS


def full(*values):
    """Return a parameter set that runs in `make test-all` only."""
    return pytest.param(*values, marks=pytest.mark.full)


def each_kind_and(name, first, *more, kinds=None):
    """Parametrize the fixture `make` and an argument: each kind with the first value, BlockSRHT with more of them.

    The other kinds take the other values in `make test-all`.
    """
    cases = []
    for kind in kinds or KINDS.values():
        for place, value in enumerate((first, *more)):
            marks = pytest.mark.full if place and kind is not BlockSRHT else ()
            shown = getattr(value, "__name__", value)
            cases.append(pytest.param(kind, value, marks=marks, id=f"{kind.__name__}-{shown}"))
    return pytest.mark.parametrize(("make", name), cases)
