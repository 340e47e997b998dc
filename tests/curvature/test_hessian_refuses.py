"""What has no Hessian, or one that PyTorch cannot compute, is refused with a way out."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lightning_sketch.curvature import Hessian

X = torch.linspace(-1, 1, 12).view(4, 3)


def squares(module, x):
    return module(x).square().mean()


def product(loss_fn, batches=(X,), **kwargs):
    h = Hessian(loss_fn, nn.Linear(3, 3), list(batches), **kwargs)
    return h.matvec(torch.ones(h.shape[1]))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("once", [lambda: iter([X]), lambda: (x for x in [X])], ids=["iterator", "generator"])
def test_batches_that_can_be_read_once(once):
    with pytest.raises(TypeError, match=r"can be read only once; pass list\(batches\)"):
        Hessian(squares, nn.Linear(3, 3), once())


def test_a_tensor_in_place_of_batches():
    with pytest.raises(TypeError, match=r"got one tensor; pass \[batch\]"):
        Hessian(squares, nn.Linear(3, 3), X)


def test_no_batch_at_all():
    with pytest.raises(ValueError, match="batches holds no example"):
        product(squares, batches=[])
    with pytest.raises(ValueError, match="batches holds no example"):
        Hessian(squares, nn.Linear(3, 3), []).loss()


def test_coarser_than_half_precision():
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"parameter weight is torch\.float8_e4m3fn; curvature needs"):
        Hessian(squares, module, [X])


def test_a_parameter_frozen_later():
    module = nn.Linear(3, 3)
    h = Hessian(squares, module, [X])
    module.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="parameter bias was frozen after this Hessian was made; create it again"):
        h.matvec(torch.ones(12))


def test_the_meta_device():
    with pytest.raises(ValueError, match="weight is on the meta device and has no values; materialize"):
        Hessian(squares, nn.Linear(3, 3, device="meta"), [X])


def test_nothing_to_train():
    with pytest.raises(ValueError, match="Linear has no trainable parameter; set requires_grad=True"):
        Hessian(squares, nn.Linear(3, 3).requires_grad_(False), [X])


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda module, x: module(x), r"a tensor of shape \(4, 3\); use \.mean\(\)"),
        (lambda module, x: squares(module, x).item(), r"a float; leave out \.item\(\)"),
        (lambda module, x: None, "None; return the loss"),
    ],
    ids=["vector", "float", "nothing"],
)
def test_a_loss_that_is_no_scalar(untyped, loss_fn, got):
    with pytest.raises(ValueError, match=rf"a scalar tensor; got {got}"):
        product(loss_fn)


def test_a_loss_cut_off_from_the_parameters():
    for cut in (torch.no_grad()(squares), lambda module, x: squares(module, x).detach()):
        with pytest.raises(ValueError, match=r"does not depend on the parameters weight, bias.*no_grad"):
            product(cut)


def test_an_operation_of_torch_without_second_derivative():
    def loss_fn(module, x):
        return torch.segment_reduce(module(x)[:, 0], "prod", lengths=torch.tensor([2, 2])).mean()

    with pytest.raises(ValueError, match=r"cannot differentiate twice: .*_segment_reduce_backward is not implemented"):
        product(loss_fn)


@pytest.mark.parametrize("after", [torch.mean, lambda y: y.pow(3).mean()], ids=["linear", "curved"])
def test_a_function_marked_once_differentiable(after):
    """Behind a mean the incoming gradient is constant, and autograd would return H = 0 without an error."""
    with pytest.raises(ValueError, match="differentiate twice: Square is marked once_differentiable"):
        product(lambda module, x: after(Square.apply(module(x))))


def test_but_not_where_no_gradient_passes():
    """Before the parameters, and beside the path to them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.last(Square.apply(self.first(x)))

    h = Hessian(squares, Net(), [X], parameters="last.*")
    assert h.matvec(torch.ones(4)).norm() > 0


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        product(squares, batches=[torch.ones(4, 2)])
