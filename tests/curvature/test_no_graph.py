"""A function whose backward pass leaves no graph, as fused kernels do, is refused by name; a linear one passes."""

import pytest
import torch
from torch import nn

from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
BATCH = X, torch.tensor([0, 1, 2, 0])
V = torch.ones(12, dtype=torch.float64)


class Detached(torch.autograd.Function):
    """x², whose backward pass computes what autograd cannot see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0].detach() * grad.detach()


class Doubled(torch.autograd.Function):
    """Twice its input, with the right derivative: linear, so nothing is lost."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


MATRICES = {
    "Hessian": lambda f, m: Hessian(lambda m, b: f(m(b[0])).mean(), m, [BATCH]),
    "GGN, in the loss": lambda f, m: GGN(m, [BATCH], output_loss_fn=lambda z, b: f(z).mean()),
    "GGN, in the model": lambda f, m: GGN(m, [BATCH], model_fn=lambda m, b: f(m(b[0]))),
    "Fisher": lambda f, m: EmpiricalFisher(lambda m, b: f(m(b[0])).mean(1), m, [BATCH]),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_no_graph_is_refused(matrix):
    with pytest.raises(ValueError, match="cannot differentiate twice: the backward pass of Detached leaves no graph"):
        matrix(Detached.apply, nn.Linear(3, 3).double()).matvec(V)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("function", [lambda z: Doubled.apply(z).square(), lambda z: Doubled.apply(z.square())])
def test_linear_functions_pass(matrix, function):
    assert matrix(function, nn.Linear(3, 3).double()).matvec(V).isfinite().all()


@pytest.mark.parametrize("loss", [lambda z, b: z.square().sum(-1), lambda z, b: 1.0, lambda z, b: z.detach().mean()])
def test_an_output_loss_that_is_no_loss(untyped, loss):
    g = GGN(nn.Linear(3, 3).double(), [BATCH] * 2, output_loss_fn=loss)
    with pytest.raises(ValueError, match=r"scalar tensor; got|does not depend on the output"):
        g.matvec(V)
