"""The checks on the first batch find what hooks miss, and leave memory for the training that follows."""

import pytest
import torch
from storages import LargeStorages
from torch import nn

from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.per_example.verify import hooks_fail


class Partly(nn.Module):
    """One layer is never used, one is used past its module, and the others are plain."""

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(5, 7), nn.Linear(5, 5), nn.Linear(7, 3)

    def forward(self, x):
        x = self.first(x).tanh()
        return self.last(x) + x @ self.last.weight.T


def loss(module, x):
    return module(x).square().mean()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_only_parameters_that_hooks_see_in_part_are_found(device):
    module, x = Partly().to(device), torch.randn(4, 5, device=device)
    with preserve_state(module):
        found = hooks_fail(module, x, dict(module.named_parameters()), loss)
    assert list(found) == ["last.weight"]


def most_storages(layers):
    module, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), torch.randn(4, 4)
    with preserve_state(module), LargeStorages() as storages:
        assert not hooks_fail(module, x, dict(module.named_parameters()), loss)
    return storages.most


def test_scratch_memory_is_that_of_one_parameter():
    one = most_storages(1)
    assert 0 < most_storages(8) == one
