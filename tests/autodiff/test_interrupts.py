"""Ctrl-C at any moment of a measurement leaves the module, the random state and the handler as they were."""

import os
import random
import signal
import threading
import time

import pytest
import torch
from torch import nn

from lightning_sketch.autodiff.preserve_state import preserve_state, raise_interrupt
from lightning_sketch.curvature import Hessian


@pytest.fixture(autouse=True)
def interrupts():
    """What Python installs, unless it was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Net(nn.Module):
    """A module with all that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(9, 4, max_norm=1.0), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.drop, self.calls, self.seen = nn.Dropout(0.3), 0, []

    def forward(self, ids):
        self.calls += 1
        self.seen.append(self.calls)
        return self.out(self.drop(self.norm(self.table(ids).mean(1)))).square().mean()


def state(module):
    tensors = [t.clone() for t in module.state_dict().values()]
    modes = [part.training for part in module.modules()]
    return tensors, modes, module.calls, list(module.seen), torch.get_rng_state(), random.getstate()


def same(a, b):
    return (
        all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        and torch.equal(a[4], b[4])
        and (a[1:4] + a[5:] == b[1:4] + b[5:])
    )


def interrupted_after(seconds):
    """Press Ctrl-C from another thread."""

    def press():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def lost(times):
    """Return how many of so many interrupted measurements did not restore everything, and how many were interrupted."""
    torch.manual_seed(0)
    module, ids = Net().train(), torch.arange(18).view(6, 3) % 9
    h = Hessian(lambda m, ids: m(ids), module, [ids, ids + 0], mode="train")
    v = torch.ones(h.shape[0])
    h.matvec(v)
    before, failures, hits = state(module), 0, 0
    start = time.perf_counter()
    h.matvec(v)
    span = time.perf_counter() - start
    handler = signal.getsignal(signal.SIGINT)
    delays = random.Random(1)
    for _ in range(times):
        inside = False
        try:
            thread = interrupted_after(delays.random() * span)
            inside = True
            h.matvec(v)
            inside = False
            thread.join()
            time.sleep(1e-3)  # the handler of one that came late runs here
        except KeyboardInterrupt:
            hits += inside
        failures += not same(state(module), before) or signal.getsignal(signal.SIGINT) is not handler
    return failures, hits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that comes in a weakref's callback
def test_no_interrupt_loses_state():
    failures, hits = lost(150)
    assert failures == 0
    assert hits > 75


def test_an_interrupt_is_raised_where_the_next_batch_begins():
    module, seen = nn.Linear(2, 1), []

    def loss_fn(module, x):
        seen.append(len(x))
        if len(seen) == 5:  # after three evaluations that examine the loss, and that of the first batch
            os.kill(os.getpid(), signal.SIGINT)
        return module(x).square().mean()

    with pytest.raises(KeyboardInterrupt):
        Hessian(loss_fn, module, [torch.ones(1, 2)] * 50).loss()
    assert len(seen) == 5


def test_one_that_comes_while_state_is_restored_waits():
    class Slow(nn.Linear):
        """Restoring its list takes a while, in which Ctrl-C is pressed twice."""

    module = Slow(2, 2)
    module.items = [1, 2]

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), preserve_state(module) as state:  # noqa: PT012
        module.items.append(3)
        restore = state._restore
        state._restore = lambda: (press(), restore())[1]
    assert module.items == [1, 2]


def test_a_second_one_does_not_wait_for_a_forward_pass_that_hangs():
    with pytest.raises(KeyboardInterrupt), preserve_state(nn.Linear(2, 2)):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("it waited")


def test_other_threads_measure_without_a_handler():
    before, found = signal.getsignal(signal.SIGINT), []

    def measure():
        with preserve_state(nn.Linear(2, 2)):
            found.append(signal.getsignal(signal.SIGINT))
            raise_interrupt()

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert found == [before]
