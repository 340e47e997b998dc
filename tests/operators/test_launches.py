"""On a device where each operation is a launch, a sketch takes few of them, whatever the size of the vector."""

import pytest
import torch
from launches import Launches

from lightning_sketch.operators import BlockSRHT, CountSketch


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the CPU work on the groups of a CUDA device, by PyTorch's operations."""
    monkeypatch.setenv("LIGHTNING_SKETCH_KERNEL", "torch")
    monkeypatch.setattr("lightning_sketch.operators._hadamard.CACHED", 1 << 24)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BlockSRHT, CountSketch])
@pytest.mark.parametrize("dim", [1 << 8, 1 << 15, 3000])
def test_a_vector_of_2_to_24_numbers_takes_at_most_60_launches(as_on_a_gpu, kind, dim):
    """Without Triton: at 5 to 20 microseconds a launch, groups of 2^18 numbers would take 64 times as many."""
    sketch, x = kind(n=1 << 24, dim=dim, seed=3), torch.ones(1 << 24)
    kind(n=dim, dim=dim).matvec(x[:dim])  # makes the factors of the Hadamard matrix, once in a process
    with Launches() as there:
        y = sketch.matvec(x)
    with Launches() as back:
        sketch.rmatvec(y)
    assert 10 < len(there.names) <= 60
    assert 10 < len(back.names) <= 60


def test_launches_are_counted():
    x = torch.ones(3)
    with Launches() as counted:
        x.view(1, 3).add_(1)
        x[:0].zero_()
    assert len(counted.names) == 1
