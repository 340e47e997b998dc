"""Sketches in compiled code: the theorems of `compiled.py`, in processes without the checkers of types."""

import subprocess
import sys
from pathlib import Path

import pytest

THEOREMS = Path(__file__).with_name("compiled.py")


@pytest.mark.slow
def test_sketches_compile_without_a_graph_break(kernel):
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", str(THEOREMS)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
