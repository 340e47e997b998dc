"""Where the gradient cannot be differentiated backward, it is forward; where neither, the operation is named.

No operation of torch 2.13 has a second derivative only that way, of all in its own test data base. Functions that
people write may.
"""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lightning_sketch.curvature import Hessian, spectrum

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


class Square(torch.autograd.Function):
    """A function that autograd can differentiate once, in either direction."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


class Slope(torch.autograd.Function):
    """The derivative of x² times a factor, which has a derivative forward, and none backward."""

    @staticmethod
    def forward(x, factor):
        return 2 * x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("the derivative for 'Slope' is not implemented.")

    @staticmethod
    def jvp(ctx, x_tangent, factor_tangent):
        x, factor = ctx.saved_tensors
        return 2 * (x_tangent * factor + x * factor_tangent)


class LateSquare(Square):
    """The same as `Square`, but its error is raised by the second backward pass only."""

    @staticmethod
    def backward(ctx, gradient):
        return Slope.apply(*ctx.saved_tensors, gradient)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def by(square):
    return lambda module, x: square(module(x)).pow(2).mean()


@pytest.mark.parametrize("function", [Square, LateSquare])
@pytest.mark.parametrize("batches", [[X], [X, X]], ids=["one batch", "two batches"])
def test_auto_goes_forward_where_it_cannot_go_backward(function, batches):
    module = network()
    plain, custom = (Hessian(by(square), module, batches) for square in (torch.square, function.apply))
    v = torch.linspace(-1, 1, plain.shape[0], dtype=torch.float64)
    torch.testing.assert_close(custom.matvec(v), plain.matvec(v))
    assert (plain.hvp, custom.hvp) == ("auto", "forward_over_reverse")
    with pytest.raises(ValueError, match=r"cannot differentiate twice: .*(Square|Slope)"):
        Hessian(by(function.apply), module, batches, hvp="double_backward").matvec(v)


@pytest.mark.parametrize("function", [Square, LateSquare])
def test_so_it_does_within_a_run(function):
    """Here the graph of a single batch is kept from product to product."""
    plain, custom = (Hessian(by(square), network(), [X]) for square in (torch.square, function.apply))
    torch.testing.assert_close(spectrum(custom).eigenvalues, spectrum(plain).eigenvalues, rtol=1e-6, atol=1e-9)


def test_what_fails_both_ways_is_named_with_the_ways_out():
    def products(module, x):
        out = module(x).flatten()
        return torch.segment_reduce(out, "prod", lengths=torch.tensor([2, len(out) - 2])).mean()

    h = Hessian(products, network(), [X])
    for _ in range(2):
        ways = r"_segment_reduce_backward.*Replace it.*leave out the parameters .*finite differences \(hvp="
        with pytest.raises(ValueError, match=ways):
            h.matvec(torch.ones(h.shape[0], dtype=torch.float64))
    assert h.hvp == "auto"


def test_forward_alone_names_what_has_no_forward_derivative():
    """An LSTM in float32 on a CPU that has a kernel for it supports double backward."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this build of PyTorch, whose LSTM kernel is what is refused")
    module, x = nn.LSTM(3, 2), torch.linspace(-1, 1, 12).view(2, 2, 3)
    loss = lambda module, x: module(x)[0].square().mean()  # noqa: E731
    forward, auto = (Hessian(loss, module, [x], hvp=hvp) for hvp in ("forward_over_reverse", "auto"))
    v = torch.linspace(-1, 1, auto.shape[0])
    with pytest.raises(ValueError, match="forward AD with mkldnn_rnn_layer"):
        forward.matvec(v)
    wide = Hessian(loss, nn.LSTM(3, 2).double(), [x.double()])
    wide.module.load_state_dict(module.state_dict())
    torch.testing.assert_close(auto.matvec(v), wide.matvec(v.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"hvp": "reverse"}, {"step": 0.0}, {"step": float("nan")}])
def test_other_ways_and_steps_are_refused(untyped, options):
    with pytest.raises(ValueError, match=r"hvp is one of auto, .* got 'reverse'|need step > 0, got"):
        Hessian(by(torch.square), network(), [X], **options)
