"""Fixtures of the tests of sketches: every kind in turn, and vectors to try it on."""

import pytest
import torch

from lightning_sketch.operators.kinds import KINDS


@pytest.fixture(params=KINDS.values(), ids=lambda cls: cls.__name__)
def make(request):
    """Return each kind in turn; a new one is added by its entry in KINDS."""
    return request.param


@pytest.fixture
def vectors():
    """Return a function that draws standard normal vectors, the same in every test, by default in float64."""

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)

    return draw
