"""Tests marked `gpu` run where there is a CUDA device, and are skipped elsewhere; all run on one thread.

In `make test` one test of four, chosen by its name, checks types and shapes at each call, which takes longer than the
call itself; all others run as users do.

Small operations on two threads of a busy machine wait for each other, up to a hundred times as long as they work.
"""

import gc
import os
import zlib

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests run
os.environ.setdefault("WANDB_MODE", "offline")  # which W&B reads once in a process, at its first run


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in ("test_acceptance.py", "test_examples.py"))  # the longest first
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # else each collection goes through all modules and tests, half a second after each training run


@pytest.fixture(autouse=True)
def one_of_four_is_typed(request):
    jaxtyping.config.update("jaxtyping_disable", zlib.crc32(request.node.nodeid.encode()) % 4 > 0)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def untyped():
    """What a user meets, who runs without the checks of types: our own errors."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
