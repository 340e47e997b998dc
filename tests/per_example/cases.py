"""Products of test cases: a part that runs by default, and the rest, marked `full`."""

import pytest


def pairs(first, second):
    """Return all pairs; by default each value runs at least once, paired with one value of the other list."""
    first, second = list(first), list(second)

    def default(i, j):
        return i % len(second) == j if len(first) >= len(second) else j % len(first) == i

    return [
        pytest.param(one, other, marks=[] if default(i, j) else pytest.mark.full)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]


def some(values, default):
    """Return all values; those in `default` run by default."""
    return [pytest.param(value, marks=[] if value in default else pytest.mark.full) for value in values]
