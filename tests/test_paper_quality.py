"""The scripts of the paper's tables about quality measure what they claim, and run."""

from pathlib import Path

import pytest
import torch
from forks import run
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("transformers")
from language_model import Dots, Size, SmallGPT  # noqa: E402
from table_1 import rescaled_errors, top_spectrum  # noqa: E402
from table_6 import least, projection  # noqa: E402
from table_7 import smallest_dims  # noqa: E402

from lightning_sketch.autodiff.layout import Layout  # noqa: E402


@pytest.mark.slow
def test_the_eigenvalues_of_a_layer_are_those_of_its_block_of_the_hessian():
    """Of the whole, of a layer and of the embedding; relative residuals of 1e-2 are errors of about their squares."""
    torch.manual_seed(0)
    module = SmallGPT(Size(width=4, layers=2, tokens=8, steps=0, batch=0)).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # away from the start, where gradients nearly vanish
    examples = torch.randint(0, 256, (20, 8))  # a batch of 16 and one of 4
    layout = Layout.of(module)
    parameters = layout.parameters(module)
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(module.training_step([examples]), parameters, create_graph=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    rows = torch.autograd.grad(
        gradient, parameters, torch.eye(layout.n, dtype=torch.float64), is_grads_batched=True, materialize_grads=True
    )
    dense = torch.cat([part.flatten(1) for part in rows], dim=1)
    number = dict(zip(layout.names, torch.arange(layout.n).split([s.numel() for s in layout.shapes]), strict=True))
    for pattern in ("*", "*.h.1.*", "*.wte.*"):
        own = torch.cat([number[name] for name in Layout.of(module, pattern).names])
        true = torch.linalg.eigvalsh(dense[own][:, own]).flip(0)[:10]
        found = top_spectrum(module, examples, pattern)
        assert found.converged[:10].all()
        assert torch.allclose(found.eigenvalues[:10], true, rtol=1e-3)


def test_the_error_after_rescaling():
    """By hand: 1 and 1 times 2.5 are off from 4 and 1 by 3/8 and 3/2, times 1 by 3/4 and 0."""
    assert rescaled_errors(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 1.0])) == (0.9375, 0.375, 2.5)
    whole = torch.rand(10, dtype=torch.float64) + 0.1
    assert max(rescaled_errors(0.3 * whole, whole)[:2]) < 1e-12
    part = torch.rand(10, dtype=torch.float64) - 0.1  # some eigenvalues of a part may be negative
    grid = torch.linspace(1e-3, 50, 50000, dtype=torch.float64)[:, None]
    errors, squares = ((grid * part - whole).abs() / whole).mean(1), (grid * part - whole).square().sum(1)
    by_squares, at_best, factor = rescaled_errors(part, whole)
    assert abs(factor - float(grid[squares.argmin()])) < 1e-3  # the step of the grid
    assert at_best <= float(errors.min()) < at_best + 1e-3 * float((part.abs() / whole).mean())
    assert at_best <= by_squares
    with pytest.raises(ValueError, match="positive"):
        rescaled_errors(-whole, whole)


def test_dot_products_of_parts_add_up():
    """To those of the whole vectors, of which a mask of all coordinates keeps everything."""
    rows = torch.randn(128, 50, dtype=torch.float64)
    exact = Dots.of(rows)
    added = Dots.sum(map(Dots.of, rows.split([20, 30], dim=1)))
    assert torch.allclose(added.products, exact.products)
    assert torch.allclose(
        exact.cosines(), torch.nn.functional.normalize(rows)[:64] @ torch.nn.functional.normalize(rows)[64:].T
    )
    kept = projection("random mask", 50, 50, 0, "cpu")(rows)
    assert min(Dots.of(kept).fidelity(exact)) > 1 - 1e-12
    assert max(Dots.of(kept[:, :1]).fidelity(exact)) < 0.5  # about 50^-1/2


def test_the_least_dims():
    """The first with r above a level; and the first from which on no error is above it."""
    assert least([0.9, 0.96, 0.985, 0.97], range(8, 12)) == ["9", "10", "-"]
    assert smallest_dims([0.3, 0.04, 0.15, 0.09], [64, 128, 256, 512]) == " 7  9  -"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["table_1", "table_6", "table_7", "table_10"])
def test_a_script_prints_its_table(script):
    done = run(f"benchmarks/paper/{script}.py", "--small", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout
    assert printed.count("\n|") >= 4
    assert "theirs" in printed
    assert "nan" not in printed
