"""A measurement of a module changes nothing: modes, buffers, random state."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_sketch.autodiff.preserve_state import preserve_state


def network():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    module[1].eval()  # frozen, as in finetuning
    return module


def modes(module):
    return [part.training for part in module.modules()]


def random_state():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_inside_every_part_is_in_evaluation_mode():
    module = network()
    with preserve_state(module):
        assert not any(modes(module))
    assert modes(module) == [True, True, False, True, True]


def test_train_leaves_every_part_in_the_mode_it_is_in():
    module = network()
    with preserve_state(module, mode="train"):
        assert modes(module) == [True, True, False, True, True]
        module.eval()
    assert modes(module) == [True, True, False, True, True]


def test_another_mode_is_refused(untyped):
    with (
        pytest.raises(ValueError, match="mode is 'eval' or 'train', got 'test'"),
        preserve_state(network(), mode="test"),
    ):
        pass


@pytest.mark.parametrize("error", [None, KeyboardInterrupt], ids=["normal", "error"])
def test_running_statistics_are_put_back(error):
    """Batch norm changes them without counting a version of the tensor."""
    module = nn.BatchNorm1d(3)
    module(torch.randn(5, 3))
    before = [b.clone() for b in module.buffers()]
    with contextlib.suppress(KeyboardInterrupt), preserve_state(module, mode="train"):
        module(torch.randn(5, 3))
        assert not any(torch.equal(a, b) for a, b in zip(module.buffers(), before, strict=True))
        if error:
            raise error
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before, strict=True))


def test_buffers_are_put_back_whether_changed_replaced_removed_or_new():
    module = nn.Module()
    for name in ("changed", "replaced", "removed", "broadcast", "sparse"):
        module.register_buffer(name, torch.arange(3.0))
    module.broadcast = torch.ones(1).expand(3)
    module.sparse = torch.eye(3).to_sparse()
    module.register_buffer("none", None)
    before = dict(module._buffers)
    with preserve_state(module):
        module.changed[0] = float("nan")
        module.replaced = torch.zeros(5)
        del module.removed
        module.none = torch.ones(2)
        module.register_buffer("new", torch.ones(1))
        module.sparse.mul_(2)
    assert list(module._buffers) == list(before)
    assert all(module._buffers[name] is tensor for name, tensor in before.items())
    assert module.changed.tolist() == [0, 1, 2]
    assert torch.equal(module.sparse.to_dense(), torch.eye(3))


def test_a_buffer_with_nan_is_put_back():
    module = nn.Module()
    module.register_buffer("best", torch.tensor([float("nan"), 1.0]))
    with preserve_state(module):
        module.best.fill_(2)
    assert module.best.isnan().tolist() == [True, False]


def test_a_graph_that_saved_a_buffer_before_can_run_backward_after():
    module = nn.BatchNorm1d(3)
    x = torch.randn(5, 3, requires_grad=True)
    loss = module(x).pow(3).sum()
    with preserve_state(module, mode="train"):
        module(x + 1)
    loss.backward()
    assert x.grad.isfinite().all()


def test_random_state_is_put_back(untyped):
    module, before = network(), random_state()
    with preserve_state(module):
        random.random()
        np.random.rand()
        torch.rand(1)
    assert random_state() == before
    with contextlib.suppress(KeyboardInterrupt), preserve_state(module):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyboardInterrupt
    assert random_state() == before


def test_inside_gradients_are_on_and_autocast_is_off():
    module, x = network(), torch.randn(5, 3)
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with around, preserve_state(module):
            y = module(x)
            assert y.requires_grad
            assert y.dtype == torch.float32
            torch.autograd.grad(y.sum(), list(module.parameters()))


def test_a_buffer_made_in_inference_mode_does_no_harm():
    """As a metric's state after `trainer.validate`."""
    module = nn.Module()
    with torch.inference_mode():
        module.register_buffer("state", torch.ones(2))
    with preserve_state(module):
        module.state = module.state + 1
    assert module.state.tolist() == [1, 1]


def test_random_generators_of_a_module_are_put_back():
    """They are its own: torch's, NumPy's and Python's, in attributes and in lists of it."""
    module = nn.Linear(2, 2)
    module.own, module.several = torch.Generator().manual_seed(3), [np.random.default_rng(3), random.Random(3)]

    def draw():
        return float(torch.rand(1, generator=module.own)), float(module.several[0].random()), module.several[1].random()

    with preserve_state(module):
        first = draw()
    assert draw() == first
