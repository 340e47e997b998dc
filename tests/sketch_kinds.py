"""Parametrizations over kinds of sketches: the default kind takes every value, the others take one."""

import pytest

from lightning_sketch.operators import BlockSRHT
from lightning_sketch.operators.kinds import KINDS


def each_kind_and(name, first, *more, kinds=None):
    """Parametrize the fixture `make` and an argument: each kind with the first value, BlockSRHT with more of them.

    The other kinds take the other values in `make test-all`.
    """
    cases = []
    for kind in kinds or KINDS.values():
        for place, value in enumerate((first, *more)):
            marks = pytest.mark.slow if place and kind is not BlockSRHT else ()
            shown = getattr(value, "__name__", value)
            cases.append(pytest.param(kind, value, marks=marks, id=f"{kind.__name__}-{shown}"))
    return pytest.mark.parametrize(("make", name), cases)
