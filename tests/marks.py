"""Cases of a parametrization that run in `make test-all` only; `make test` has the theorem on the other cases."""

import pytest


def slow(*values, **options):
    """Return a slow case."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def some(values, default):
    """Return all values as cases; those that are not in `default` are slow."""
    return [value if value in default else slow(value) for value in values]


def pairs(first, second):
    """Return all pairs as cases; each value is in one that is not slow."""
    first, second = list(first), list(second)

    def default(i, j):
        return i % len(second) == j if len(first) >= len(second) else j % len(first) == i

    places = [(i, j) for i in range(len(first)) for j in range(len(second))]
    return [(first[i], second[j]) if default(i, j) else slow(first[i], second[j]) for i, j in places]
