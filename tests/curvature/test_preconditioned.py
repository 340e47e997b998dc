"""D A D is what its dense matrix is, with the D that a real optimizer's steps have."""

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from torch import nn

from lightning_sketch.curvature import GGN, Hessian, Preconditioned, spectrum
from lightning_sketch.operators import Gaussian

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, betas=(0.8, 0.9)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.99), amsgrad=True, weight_decay=0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-3, lr_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=3e-3),
}


def loss_fn(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def trained(name, steps=3, dtype=torch.float64, own_rate=1e-3):
    """Return a network after some steps, whose last layer has another rate, its optimizer, data, and the last step."""
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    optimizer = OPTIMIZERS[name](
        [{"params": module[0].parameters()}, {"params": module[2].parameters(), "lr": own_rate}]
    )
    batch = torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,))
    before = []
    for _ in range(steps):
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        loss_fn(module, batch).backward()
        optimizer.step()
    step = [p.detach() - old for p, old in zip(module.parameters(), before, strict=True)]
    return module, optimizer, batch, step


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["adam", slow("adamw"), slow("adamax"), "rmsprop", slow("adagrad"), "sgd"])
def test_a_step_is_the_largest_rate_times_d_squared_times_the_mean_gradient(name, steps):
    module, optimizer, batch, step = trained(name, steps)
    matrix = Preconditioned.from_optimizer(Hessian(loss_fn, module, [batch]), optimizer)
    means = [optimizer.state[p].get("exp_avg", p.grad) for p in module.parameters()]
    flat, moved = (torch.cat([t.flatten() for t in tensors]) for tensors in (means, step))
    torch.testing.assert_close(-3e-3 * matrix.scale**2 * flat, moved, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("kind", [Hessian, slow(GGN)])
def test_products_and_spectrum_are_those_of_the_dense_matrix(kind):
    module, optimizer, batch, _ = trained("adam")
    operator = Hessian(loss_fn, module, [batch]) if kind is Hessian else GGN(module, [batch])
    matrix = Preconditioned.from_optimizer(operator, [optimizer])
    dense = matrix.scale[:, None] * operator.as_matrix() * matrix.scale
    torch.testing.assert_close(matrix.as_matrix(), dense)
    torch.testing.assert_close(matrix.T.as_matrix(), dense)
    assert (matrix.dtype, matrix.device) == (operator.dtype, operator.device)
    found = spectrum(matrix, top_k=2, bottom_k=0)
    torch.testing.assert_close(found.top(2), torch.linalg.eigvalsh(dense).flip(0)[:2], rtol=1e-6, atol=0)


def test_half_precision_and_selected_parameters():
    module, optimizer, batch, _ = trained("adam", dtype=torch.bfloat16)
    whole = Preconditioned.from_optimizer(Hessian(loss_fn, module, [batch]), optimizer)
    part = Preconditioned.from_optimizer(Hessian(loss_fn, module, [batch], parameters="2.*"), optimizer)
    assert part.scale.dtype == torch.float32
    torch.testing.assert_close(part.scale, whole.scale[-18:])
    torch.testing.assert_close(part.as_matrix(), whole.as_matrix()[-18:, -18:], rtol=1e-4, atol=1e-4)


def test_parameters_that_do_not_move_are_left_out():
    """One was never used, one is in no optimizer, and one group has a rate of zero."""
    module, optimizer, batch, _ = trained("adam", own_rate=0.0)
    module.unused, module.alone = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [module.unused]})
    h = Hessian(lambda m, b: loss_fn(m, b) + 0 * (m.unused.sum() + m.alone), module, [batch])
    with pytest.warns(UserWarning, match="has never moved unused, alone, left out"):
        matrix = Preconditioned.from_optimizer(h, optimizer)
    scales = dict(zip(h.layout.names, h.layout.unflatten(matrix.scale), strict=True))
    assert [name for name, scale in scales.items() if scale.any()] == ["0.weight", "0.bias"]
    assert bool((scales["0.weight"] > 0).all())


@pytest.mark.usefixtures("untyped")
def test_what_has_no_diagonal_is_refused():
    module, _, batch, _ = trained("adam")
    h = Hessian(loss_fn, module, [batch])
    with pytest.raises(ValueError, match=r"has no state of 0.weight, 0.bias, 2.weight, 2.bias; train for a step"):
        Preconditioned.from_optimizer(h, torch.optim.Adam(module.parameters()))
    with pytest.raises(ValueError, match="LBFGS multiplies the gradient by an inverse Hessian that is not diagonal"):
        Preconditioned.from_optimizer(h, torch.optim.LBFGS(module.parameters()))
    with pytest.raises(ValueError, match="no param group has a positive learning rate"):
        Preconditioned.from_optimizer(h, torch.optim.SGD(module.parameters(), lr=0.0))
    with pytest.raises(ValueError, match=r"cannot scale a \(4, 6\) operator by 6 numbers"):
        Preconditioned(Gaussian(n=6, dim=4), torch.ones(6))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a negative or infinite number, or NaN"):
            Preconditioned(h, torch.full((h.shape[0],), wrong))


def test_a_bias_in_front_of_batch_norm_is_named_in_evaluation_mode():
    """In training mode it has no gradient, and the preconditioned matrix is as without it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    batch = torch.randn(32, 4), torch.randint(3, (32,))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(module, batch).backward()
        optimizer.step()

    def largest(mode):
        matrix = Preconditioned.from_optimizer(Hessian(loss_fn, module, [batch], mode=mode), optimizer)
        return torch.linalg.eigvalsh(matrix.as_matrix().double())[-1]

    with pytest.warns(UserWarning, match=r"^0.bias had next to no gradient .* use mode='train', or bias=False"):
        evaluated = largest("eval")
    trained = largest("train")
    assert evaluated > 30 * trained
