"""The kernels in Triton: the theorems of `triton_theorems.py`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

THEOREMS = Path(__file__).with_name("triton_theorems.py")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_in_triton_are_the_reference(device):
    """On a CPU in Triton's interpreter."""
    pytest.importorskip("triton", minversion="3.6")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "default",
        "-o",
        "addopts=--import-mode=importlib",
        str(THEOREMS),
    ]
    environment = os.environ | {"LIGHTNING_SKETCH_KERNEL": "triton", "KERNELS_ON": device}
    environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout
