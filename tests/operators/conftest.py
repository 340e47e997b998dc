"""Fixtures of the tests of sketches: every kind in turn, each kernel in turn, and vectors to try them on."""

import pytest
import torch

from lightning_sketch.operators import BlockSRHT, CountSketch
from lightning_sketch.operators.kinds import KINDS

pytest.register_assert_rewrite("kernel_theorems")


def pytest_collection_modifyitems(items):
    """Run kinds that have no kernels once."""
    items[:] = [item for item in items if not _runs_again(getattr(item, "callspec", None))]


def _runs_again(case):
    one_of_all_kinds = case and "make" in case.params and case.params.get("kernel") == "numba"
    return one_of_all_kinds and case.params["make"] not in (BlockSRHT, CountSketch)


@pytest.fixture(params=KINDS.values(), ids=lambda cls: cls.__name__)
def make(request):
    """Return each kind in turn; a new one is added by its entry in KINDS."""
    return request.param


@pytest.fixture(params=["torch", "numba"])
def kernel(request, monkeypatch):
    """Force each of the ways to compute a sketch on a CPU in turn."""
    if request.param != "torch":
        pytest.importorskip(request.param)
    monkeypatch.setenv("LIGHTNING_SKETCH_KERNEL", request.param)
    return request.param


@pytest.fixture
def vectors():
    """Return a function that draws standard normal vectors, the same in every test, by default in float64."""

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)

    return draw
