"""What is not symmetric is refused; what is shows a defect of rounding only."""

import pytest
import torch
from torch import nn

from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian, spectrum
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.linalg.linearity import defect
from lightning_sketch.operators import BlockSRHT

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3


class FusedGelu(torch.autograd.Function):
    """A function like a fused kernel: its backward pass leaves no graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return nn.functional.gelu(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().numpy()
        density = torch.from_numpy(x).square().mul(-0.5).exp() / (2 * torch.pi) ** 0.5
        share = 0.5 * (1 + torch.erf(torch.from_numpy(x) / 2**0.5))
        return (share + torch.from_numpy(x) * density) * gradient.detach()


class Fused(nn.Module):
    def forward(self, x):
        return FusedGelu.apply(x)


def network(activation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3))


def cross_entropy(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def losses(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def operators(module, batch, copies=1):
    yield Hessian(cross_entropy, module, [batch] * copies)
    yield GGN(module, [batch] * copies)
    yield EmpiricalFisher(losses, module, [batch] * copies)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_fused_backward_pass_is_refused(batches):
    """The second derivative takes it for a constant: H loses the terms behind it, on one side only."""
    for operator in operators(network(Fused()), (X, Y), batches):
        with pytest.raises(ValueError, match=r"backward pass of FusedGelu leaves no graph|not symmetric"):
            spectrum(operator, top_k=2, bottom_k=0)


def test_with_plain_operations_it_is_not():
    for operator in operators(network(nn.GELU()), (X, Y)):
        assert spectrum(operator, top_k=2, bottom_k=0).lambda_max > 0


@pytest.mark.parametrize("size", [0.1, 0.3, 1.0])
def test_an_asymmetric_matrix_is_refused(dense_operator, size):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(400, 400, dtype=torch.float64, generator=generator)
    with pytest.raises(ValueError, match="not symmetric"):
        spectrum(dense_operator(matrix + matrix.T + 2 * size * (matrix - matrix.T)), top_k=2, bottom_k=0)


def test_so_is_a_small_asymmetric_part_that_only_later_vectors_show(dense_operator):
    """The asymmetric part couples an outlier to one direction, and is nearly zero for a random vector."""
    matrix = torch.diag(torch.cat([torch.tensor([100.0]), torch.linspace(-1, 1, 2999)])).double()
    matrix[0, 1:] += 3
    with pytest.raises(ValueError, match="not symmetric"):
        spectrum(dense_operator(matrix), top_k=2, bottom_k=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Tanh()], ids=str)
def test_what_is_symmetric_shows_rounding_only(activation, dtype):
    """All three matrices, and the Hessian projected into a sketch; measured below 2e-7 and 3e-16."""
    batch = X.to(dtype), Y
    found = list(operators(network(activation).to(dtype), batch))
    sketch = BlockSRHT(found[0].shape[0], 64, seed=0)
    for operator in (*found, sketch @ found[0] @ sketch.T):
        u, v = (start_vector(operator, 0, name=name) for name in ("0", "defect"))
        linearity, symmetry, _ = defect(operator, u, v)
        assert max(linearity, symmetry) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_so_does_a_large_diagonal(outliers, dtype):
    """The bound is stricter by √n for random vectors, and correct operators must still pass."""
    operator = outliers()
    operator.values, operator.dtype = operator.values.to(dtype), dtype
    operator.noise = torch.finfo(dtype).eps
    sp = spectrum(operator, top_k=4, bottom_k=1)
    assert sp.linearity_defect < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["rows", "few rows", "rank one", "skew"])
def test_a_run_sees_asymmetry_as_well_as_random_vectors_do(kind, dense_operator):
    """Lanczos vectors of a nearly symmetric matrix hide it; the first vector is compared with another random one."""
    generator = torch.Generator().manual_seed(0)
    n = 600
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    a = (a + a.T) / n**0.5 + torch.linspace(10, 0, n, dtype=torch.float64).diag()
    if kind in ("rows", "few rows"):
        a[:: 2 if kind == "rows" else 100] *= 1.1
    elif kind == "rank one":
        u, v = torch.randn(2, n, generator=generator, dtype=torch.float64) / n**0.5
        a += torch.outer(u, v)
    else:
        k = torch.randn(n, n, generator=generator, dtype=torch.float64)
        a += 0.1 * (k - k.T) / n**0.5
    with pytest.raises(ValueError, match="not symmetric"):
        spectrum(dense_operator(a), top_k=2, bottom_k=0)
