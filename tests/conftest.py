"""Tests marked `gpu` run where there is a CUDA device, and are skipped elsewhere; all run on one thread.

Small operations on two threads of a busy machine wait for each other, up to a hundred times as long as they work.
"""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
