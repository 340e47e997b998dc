"""The paper's formulas in `benchmarks/paper/published.py` are what they claim, and both ways of sketching agree."""

from pathlib import Path

import pytest
import torch
from costs import OURS, PUBLISHED, Problem
from forks import run
from published import Published

ROOT = Path(__file__).resolve().parents[1]
EVERY = [pytest.param(sketched, id=str(sketched).replace(", ", "_")) for sketched in PUBLISHED + OURS]


@pytest.mark.parametrize("transform", ["hadamard", "haar", "fft"])
@pytest.mark.parametrize("n", [2, 8, 2048])
def test_a_preconditioner_is_an_orthogonal_matrix(transform, n):
    sketch = Published("affd", transform, n, 1)
    x = torch.eye(n)[:: max(1, n // 8)]
    for of in sketch.transforms:
        there = torch.stack([of.forward(row) for row in x])
        assert torch.allclose(there @ there.T, torch.eye(len(x)), atol=1e-5)  # eleven additions in float32
        assert torch.allclose(torch.stack([of.adjoint(row) for row in there]), x, atol=1e-5)


@pytest.mark.parametrize("sketched", [each for each in EVERY if each.values[0].transform])
def test_lengths_are_kept_in_the_mean(sketched, monkeypatch):
    """Of 200 draws, whose squared lengths vary by (8 / dim)^0.5 at most: the mean is within 5 standard errors."""
    dim, draws = 64, iter(range(200))
    monkeypatch.setattr(torch, "manual_seed", lambda _: torch.default_generator.manual_seed(next(draws)))
    x = torch.randn(100)
    squares = torch.stack([sketched.made(100, dim, "cpu").matvec(x).square().sum() for _ in range(200)])
    assert abs(float(squares.mean() / x.square().sum()) - 1) < 5 * (8 / dim / 200) ** 0.5


@pytest.mark.parametrize("sketched", EVERY)
def test_implicit_is_explicit(sketched):
    """By the chain rule: of the gradient, and of the Hessian, from both sides."""
    problem = Problem("tiny", dtype=torch.float64)
    calls, stored = problem.calls(sketched, 64)
    assert (stored > 0) == bool(sketched.transform)
    implicit, _ = calls["implicit gradient"]()
    assert torch.allclose(implicit.double(), calls["gradient"]().double(), atol=1e-5)
    explicit = calls["product"]()
    assert torch.allclose(
        calls["implicit product"]().double(), explicit.double(), atol=1e-5 * float(explicit.abs().max())
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["table_3", "table_8", "table_9", "table_11", "figures_3_4"])
def test_a_script_prints_its_table(script):
    done = run(f"benchmarks/paper/{script}.py", "--small", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout
    assert printed.count("\n|") >= 4
    assert "nan" not in printed
