"""The script for a CUDA device runs on a CPU, with tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    """But for the tests and the spectrum of a Llama, which have tests of their own."""
    command = [sys.executable, "benchmarks/gpu.py", "--cpu", "--out", str(tmp_path / "out"), "--only"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "products", "tables", "steps", "peers"], check=True, cwd=ROOT, env=environment)
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert [row["part"] for row in rows if "seconds" in row] == ["products", "tables", "steps", "peers"]
