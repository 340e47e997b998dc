"""What the proofs share: every kind of sketch, and vectors to try it on."""

import jaxtyping
import pytest
import torch

from lightning_sketch.operators.kinds import KINDS


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The vectors here are small: more threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked():
    """Run as users do, without the type checks of the test run, which would answer first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=KINDS.values(), ids=lambda cls: cls.__name__)
def make(request):
    """Each kind in turn; a new one joins by its entry in KINDS."""
    return request.param


@pytest.fixture
def vectors():
    """Standard normal vectors, the same in every test; float64, where identities hold to 1e-7 and better."""

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)

    return draw
