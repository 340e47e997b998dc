"""Two questions to the first batch; they leave memory for the training that follows."""

import weakref

import pytest
import torch
from torch import nn

from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.per_example import verify as checks
from lightning_sketch.per_example.reduction import own_scale


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
def test_only_what_hooks_do_not_see_whole_is_found(device):
    module, x = Partly().to(device), torch.randn(4, 5, device=device)
    with preserve_state(module):
        found = checks.hooks_fail(module, x, dict(module.named_parameters()), loss, own_scale(x))
    assert list(found) == ["last.weight"]


def test_scratch_memory_is_that_of_one_parameter(monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Counted(checks.SketchAccumulator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(checks, "SketchAccumulator", Counted)
    module, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), torch.randn(4, 4)
    with preserve_state(module):
        assert not checks.hooks_fail(module, x, dict(module.named_parameters()), loss, own_scale(x))
    assert len(most) == 10
    assert max(most) == 1
