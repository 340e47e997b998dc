"""The kernels in Triton, in its interpreter on the CPU: the theorems of `interpreted.py`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

THEOREMS = Path(__file__).with_name("interpreted.py")


@pytest.mark.slow
def test_the_kernels_in_triton_are_the_reference():
    pytest.importorskip("triton", minversion="3.6")
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", str(THEOREMS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LIGHTNING_SKETCH_KERNEL": "triton"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout
