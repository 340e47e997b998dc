"""Curvature matrices add up and go to SciPy, like any operator."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import slow
from scipy.sparse.linalg import eigsh
from torch import nn

from lightning_sketch import GGN, EmpiricalFisher, Hessian, spectrum


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def problem(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        batches = [(torch.randn(9, 4).to(dtype), torch.randint(0, 3, (9,))) for _ in range(2)]
    return module, batches


def dense_hessian(module, batches):
    """Return the dense matrix by torch.func, over all parameters in one vector."""
    named = {k: p.detach() for k, p in module.named_parameters()}

    def mean(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {k: part.view(p.shape) for (k, p), part in zip(named.items(), parts, strict=True)}
        outputs = [torch.func.functional_call(module, values, (x,)) for x, _ in batches]
        return sum(F.cross_entropy(z, y) for z, (_, y) in zip(outputs, batches, strict=True)) / len(batches)

    return torch.func.hessian(mean)(torch.cat([p.flatten() for p in named.values()]))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_scipy_finds_the_extreme_eigenvalues_of_a_hessian(which):
    module, batches = problem()
    truth = torch.linalg.eigvalsh(dense_hessian(module, batches)).numpy()
    operator = Hessian(loss, module, batches).to_scipy()
    assert operator.dtype == np.float64
    found = np.sort(eigsh(operator, k=3, which=which, return_eigenvectors=False))
    np.testing.assert_allclose(found, truth[-3:] if which == "LA" else truth[:3], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.bfloat16)])
def test_the_spectrum_of_a_sum_is_that_of_the_sum(dtype):
    """H + G / 10 - 2 F; half precision is computed in float32 by each of the three, on the same copies of weights."""
    module, batches = problem(dtype)
    wide = [(x.float(), y) if dtype == torch.bfloat16 else (x, y) for x, y in batches]
    true_module = copy.deepcopy(module).float() if dtype == torch.bfloat16 else module

    def each(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    def combined(module, batches):
        h, g = Hessian(loss, module, batches), GGN(module, batches)
        return h + 0.1 * g - 2 * EmpiricalFisher(each, module, batches)

    dense = combined(true_module, wide).as_matrix().double()
    truth = torch.linalg.eigvalsh(dense).flip(0)
    found = spectrum(combined(module, batches), top_k=3, bottom_k=3)
    torch.testing.assert_close(found.top(3), truth[:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.bottom(3), truth.flip(0)[:3], rtol=1e-4, atol=1e-6)
    assert all(p.dtype == dtype for p in module.parameters())
