"""Differences of gradients are taken on request only, right to three digits, and refused where there are kinks."""

import pytest
import torch
from torch import nn

from lightning_sketch.curvature import Hessian, spectrum

X = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3
DTYPES = [torch.float32, torch.float64]
STEPS = [1e-1, 1e-2, 1e-3]


class Classifier(nn.Module):
    def __init__(self, activation):
        super().__init__()
        options = {"activation": activation, "batch_first": True, "norm_first": True}
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, **options), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


def cross_entropy(module, batch):
    x, y = batch
    return nn.functional.cross_entropy(module(x.to(next(module.parameters()).dtype)), y)


def transformer(activation, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(activation).to(dtype)


def differences(module, step=1e-3):
    return Hessian(cross_entropy, module, [(X, Y)], hvp="finite_differences", step=step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_they_are_refused_on_every_network_with_kinks(case, dtype, step):
    """Each kink that a step crosses adds its jump over the step, so that a smaller step is no better."""
    h = case.hessian(dtype)
    h.hvp, h.step = "finite_differences", step
    with pytest.raises(ValueError, match=rf"steps of {step:g} and {step / 2:g} differ by \d+%: the loss has kinks"):
        h.matvec(torch.ones(h.shape[0], dtype=dtype))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 3e-3), (torch.float64, 1e-5)])
@pytest.mark.parametrize("step", [1e-2, 1e-3])
def test_finite_differences_are_accurate_on_a_smooth_transformer(dtype, step, bar):
    """Measured 1e-4 and 1e-3 in float32, where rounding is divided by the step; 1e-6 and 1e-8 in float64."""
    module = transformer("gelu", dtype)
    v = torch.randn(sum(p.numel() for p in module.parameters()), generator=torch.Generator().manual_seed(1)).to(dtype)
    got, expected = (h.matvec(v) for h in (differences(module, step), Hessian(cross_entropy, module, [(X, Y)])))
    assert (got - expected).norm() < bar * expected.norm()


def test_their_spectrum_is_that_of_the_exact_products():
    module = transformer("gelu", torch.float64)
    got, expected = (
        spectrum(h, top_k=5, bottom_k=1) for h in (differences(module), Hessian(cross_entropy, module, [(X, Y)]))
    )
    torch.testing.assert_close(got.top(5), expected.top(5), rtol=1e-3, atol=0)


def test_a_step_too_long_for_a_smooth_loss_is_refused():
    h = differences(transformer("gelu", torch.float64), step=3.0)
    with pytest.raises(ValueError, match=r"steps of 3 and 1\.5 differ by .* or the step does not fit it"):
        h.matvec(torch.ones(h.shape[0], dtype=torch.float64))


def test_comparing_two_steps_leaves_the_step_as_it_was():
    h = differences(transformer("gelu", torch.float64), step=1e-2)
    h.matvec(torch.ones(h.shape[0], dtype=torch.float64))
    assert h.step == 1e-2


def test_the_length_of_the_vector_does_not_change_the_step():
    """The step is along a unit vector."""
    h = differences(transformer("gelu", torch.float64))
    v = torch.linspace(-1, 1, h.shape[0], dtype=torch.float64)
    torch.testing.assert_close(h.matvec(1e6 * v), 1e6 * h.matvec(v), rtol=1e-9, atol=1e-6)


def test_they_see_what_a_function_hides_from_autograd():
    """A backward pass that cannot be differentiated is enough for them."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    module, x = nn.Linear(16, 2).double(), X[:, 0]
    custom = Hessian(lambda m, x: Cube.apply(m(x)).mean(), module, [x], hvp="finite_differences")
    plain = Hessian(lambda m, x: (m(x) ** 3).mean(), module, [x])
    v = torch.linspace(-1, 1, 34, dtype=torch.float64)
    torch.testing.assert_close(custom.matvec(v), plain.matvec(v), rtol=1e-5, atol=1e-7)
