"""Scratch memory: a few buffers whatever n is for streaming sketches, and one vector of size N for the others.

Measured is the peak memory of a process, less its memory before the product. The products run in a process of
their own, and the kernel's mark is set back before each one (a child of a large process inherits
`ru_maxrss`, which therefore sees nothing).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sketch.operators.kinds import KINDS

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory from Linux")

SIZES = {kind: 1 << 24 if cls.streams else 1 << 22 for kind, cls in KINDS.items()}
SIZES |= {"gaussian": 1 << 20, "ffd": 1 << 22}  # slower ones

MEASURE = """
import json, sys, torch
from lightning_sketch.operators.kinds import KINDS

def mb(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

def extra(product, v):
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM, the peak memory, to the present memory
    before = mb("VmHWM")
    out = product(v)
    return mb("VmHWM") - before - 4 * out.numel() / 2**20

torch.set_num_threads(1)
used = {}
for kind, n in json.loads(sys.argv[1]).items():
    for size in (1 << 12, n):  # the first one loads code and small tables
        sketch = KINDS[kind](size, 64, seed=3)
        used[kind] = extra(sketch.matvec, torch.ones(size)), extra(sketch.rmatvec, torch.ones(64))
print(json.dumps(used))
"""


@pytest.fixture(scope="module", params=["torch", "numba"])
def used(request):
    """Return MB of scratch for (matvec, rmatvec) of each kind; freed memory goes back to the kernel at once."""
    if request.param != "torch":
        pytest.importorskip(request.param)
    command = [sys.executable, "-c", MEASURE, json.dumps(SIZES)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment["LIGHTNING_SKETCH_KERNEL"] = request.param
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scratch_memory_is_bounded(used, kind):
    """16 MB for streaming sketches, of vectors of 64 MB; another N numbers for the others."""
    vector = 0 if KINDS[kind].streams else 4 * SIZES[kind] / 2**20
    assert max(used[kind]) < 16 + vector


@pytest.mark.slow
def test_the_measurement_sees_a_copy_of_the_input(used):
    """AFFD, with its one vector of size N, must use at least that: otherwise the bounds above mean nothing."""
    assert min(used["affd"]) > 0.9 * 4 * SIZES["affd"] / 2**20
