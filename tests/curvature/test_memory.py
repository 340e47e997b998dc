"""No Krylov vector is kept: the memory of a run does not grow with the number of products."""

import subprocess
import sys

import pytest

SCRIPT = r"""
import re, sys, torch
from pathlib import Path
from torch import nn
from lightning_sketch.curvature import Hessian, spectrum

def peak():  # of this process; ru_maxrss is inherited from the one that started it, which may be larger
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 1408), nn.GELU(), nn.Linear(1408, 10))
batches = [torch.randn(32, 512) for _ in range(int(sys.argv[1]))]
h = Hessian(lambda module, x: module(x).logsumexp(-1).mean(), module, batches)
n = h.shape[0]
for _ in range(2):
    h.matvec(torch.ones(n))
before = peak()
spectrum(h, num_matvecs=32, dim=256, tol=0.0)
print(n, (peak() - before) / (4 * n))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read in the unit of Linux")
@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_takes_a_few_vectors_above_a_product(batches):
    """Measured 2.4 vectors of size n, for one batch, whose graph is kept, and for two.

    v, its predecessor and A v, less what the two products before have shown already. The bar of 5 leaves room
    for the allocator; 32 Krylov vectors, or float64 copies for a dot product (8.8), break it.
    """
    command = [sys.executable, "-c", SCRIPT, str(batches)]
    n, vectors = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(n) > 3_900_000
    assert float(vectors) <= 5
