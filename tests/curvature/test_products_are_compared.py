"""A product by autograd is compared with differences of the gradient, which no second derivative enters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.curvature import EmpiricalFisher, Hessian, spectrum

X = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class WrongTwice(torch.autograd.Function):
    """exp(x), whose backward pass uses what the forward pass computed, so that autograd does not differentiate it."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y.detach() + 0)  # neither an input nor the output
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class RightTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def network(activation=torch.tanh, dtype=torch.float64, seed=0):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.last(activation(self.first(x)))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def squares(module, x):
    return (module(x) - 1).square().mean()


def one(h):
    return h.matvec(torch.ones(h.shape[0], dtype=h.dtype))


ASKS = {
    "matvec": one,
    "matrix": lambda h: h.as_matrix(),
    "spectrum": lambda h: spectrum(h, top_k=2, bottom_k=1),
    "batches": lambda h: one(h.per_batch()[1][1]),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize(
    "activation", [WrongTwice.apply, lambda z: WrongTwice.apply(z).relu()], ids=["smooth", "kinks"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_function_that_is_wrong_twice_is_named_wherever_it_is_asked(ask, activation, dtype):
    h = Hessian(squares, network(activation, dtype), [X.to(dtype)[:12], X.to(dtype)[12:]])
    with pytest.raises(
        ValueError, match=r"differs from differences of the gradient by \d+%.*WrongTwice computes a wrong"
    ):
        ask(h)
    torch.testing.assert_close(h.gradient(), Hessian(squares, network(torch.exp, dtype), [X.to(dtype)]).gradient()) if (
        activation is WrongTwice.apply
    ) else None


def test_a_function_that_is_right_twice_passes():
    plain, custom = (Hessian(squares, network(f), [X]) for f in (torch.exp, RightTwice.apply))
    torch.testing.assert_close(custom.as_matrix(), plain.as_matrix())


def test_a_reversed_gradient_is_not_the_derivative_of_a_loss():
    with pytest.raises(ValueError, match=r"Reversed computes a wrong second derivative.* or is not the derivative"):
        one(Hessian(squares, network(lambda z: Reversed.apply(z.tanh())), [X]))


def test_a_hook_that_changes_a_gradient_is_refused_too():
    def damped(z):
        if z.requires_grad:
            z.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return z.tanh()

    with pytest.raises(ValueError, match=r"an operation or a hook on a tensor.* use hvp='finite_differences'"):
        one(Hessian(squares, network(damped), [X]))


def test_each_batch_is_compared_where_a_function_may_be_wrong():
    """The first batch takes the plain path."""

    def loss_fn(module, batch):
        x, custom = batch
        return squares(network_of[bool(custom)], x)

    module = network(torch.exp)
    wrong = network(WrongTwice.apply)
    wrong.first, wrong.last = module.first, module.last
    network_of = {False: module, True: wrong}
    whole = nn.ModuleList([module, wrong])
    batches = [(X[:8], torch.zeros(8)), (X[8:], torch.ones(12))]

    def chosen(_, batch):
        return squares(whole[int(batch[1][0])], batch[0])

    with pytest.raises(ValueError, match="WrongTwice"):
        one(Hessian(chosen, whole, batches))


KINKED = {
    "relu": torch.relu,
    "leaky": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "abs": torch.abs,
    "max": lambda z: z.view(len(z), 7, 1).amax(-1) * z.sign(),
    "gelu": F.gelu,
    "elu": F.elu,
    "softplus": F.softplus,
}


@pytest.mark.parametrize("activation", KINKED.values(), ids=KINKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kinks_alone_are_no_reason_to_refuse(activation, dtype):
    """Ten networks each, with more kinks than numbers; wrong verdicts would show."""
    for seed in range(10):
        one(Hessian(squares, network(activation, dtype, seed), [X.to(dtype).repeat(20, 1)]))


def test_examples_at_a_kink_say_nothing():
    """Padding of zeros and biases of zero put every unit on its kink."""
    module = network(torch.relu)
    nn.init.zeros_(module.first.bias)
    one(Hessian(squares, module, [torch.cat([X, torch.zeros(20, 5).double()])]))


STOPPED = {
    "a twin whose output is detached": lambda m, x: (m(x) - m(x.flip(1)).detach()).square().mean(),
    "targets under no_grad": lambda m, x: (m(x) - target(m, x)).square().mean(),
    "straight through": lambda m, x: (m(x) + (m(x).round() - m(x)).detach()).square().mean(),
    "a codebook": lambda m, x: (m.last(m.first(x) + (nearest(m, x) - m.first(x)).detach())).square().mean(),
    "a scale by item": lambda m, x: m(x).square().mean() / (1 + m(x).abs().mean().item()),
    "a scale by data": lambda m, x: m(x).square().mean() / (1 + m.last.weight.data.norm()),
}


@torch.no_grad()
def target(module, x):
    return module(x + 1) * 2 - 1


def nearest(module, x):
    book = module.first.weight.sum() * torch.linspace(-1, 1, 4, dtype=x.dtype)[:, None].expand(4, 7)
    return book[torch.cdist(module.first(x), book).argmin(1)]


@pytest.mark.parametrize("loss_fn", STOPPED.values(), ids=STOPPED)
@pytest.mark.parametrize("hvp", ["auto", "finite_differences"])
def test_stopped_gradients_are_held_fixed(loss_fn, hvp):
    """The matrix is that of the loss with constants in their place, which are recorded at the parameters."""
    module = network()
    expected = Hessian(loss_fn, module, [X], hvp="double_backward").as_matrix()
    torch.testing.assert_close(Hessian(loss_fn, module, [X], hvp=hvp).as_matrix(), expected, rtol=1e-6, atol=1e-9)
    detached = Hessian(lambda m, x: (m(x) - fixed).square().mean(), module, [X])
    fixed = module(X.flip(1)).detach()
    if loss_fn is STOPPED["a twin whose output is detached"]:
        torch.testing.assert_close(expected, detached.as_matrix())


def test_a_loss_computed_in_float32_does_not_look_wrong_in_float64():
    """Small steps change nothing in float32, so that differences in float64 would miss the loss's own curvature."""

    def loss_fn(module, x):
        return F.cross_entropy(module(x).float(), (x[:, 0] > 0).long())

    h = Hessian(loss_fn, network(dtype=torch.float32), [X.float()])
    wide = Hessian(lambda m, x: F.cross_entropy(m(x), (x[:, 0] > 0).long()), network(), [X])
    torch.testing.assert_close(one(h), one(wide).float(), rtol=1e-4, atol=1e-6)
    one(Hessian(loss_fn, network(), [X]))


def test_a_row_without_gradient_does_not_look_wrong():
    """The row of padding_idx has no gradient, though the loss depends on it."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 2)
            nn.init.normal_(self.table.weight)

        def forward(self, ids):
            return self.out(self.table(ids).mean(1).tanh())

    ids = torch.arange(24).view(8, 3) % 6
    one(Hessian(lambda m, ids: m(ids).square().mean(), Words(), [ids]))


def test_a_measurement_compares_again_after_the_weights_have_changed():
    calls = []
    h = Hessian(lambda m, x: calls.append(len(x)) or squares(m, x), network(), [X])  # type: ignore[func-returns-value]
    spectrum(h, top_k=1, bottom_k=0)
    first = calls.count(8)
    assert first  # few examples are compared
    one(h)
    assert calls.count(8) == first
    with torch.no_grad():
        h.module.first.weight.add_(0.1)
    one(h)
    assert calls.count(8) == first
    spectrum(h, top_k=1, bottom_k=0)
    assert calls.count(8) == 2 * first


@pytest.mark.parametrize("matrix", [Hessian, EmpiricalFisher])
def test_a_loss_that_is_nan_in_one_batch_is_said_with_its_number(matrix):
    def loss_fn(module, x):
        return module(x).mean() * (float("nan") if len(x) == 7 else 1.0)

    with pytest.raises(ValueError, match="the loss of batch 1 is nan at these parameters"):
        one(matrix(loss_fn, network(), [X[:13], X[13:]]))


def test_a_derivative_that_is_nan_is_not_called_a_loss_that_is():
    """The gradient of a norm at zero is taken as zero, and its second derivative is NaN."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    with pytest.raises(
        ValueError, match=r"the loss of batch 0 is finite, but not its derivative with respect to w: .*sqrt"
    ):
        one(Hessian(lambda m, x: m.w.norm() ** 2, Zero(), [X]))


def test_lazy_layers_are_named():
    with pytest.raises(ValueError, match=r"parameter 0\.weight of a lazy layer has no shape .* run one batch"):
        Hessian(squares, nn.Sequential(nn.LazyLinear(3)), [X])


def test_a_module_that_forces_its_own_attention_kernel():
    """Its own choice would have no second derivative."""

    class Attention(nn.Linear):
        def forward(self, x):
            q = super().forward(x).view(4, 5, 5)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    module = Attention(5, 5).double()
    h = Hessian(lambda m, x: m(x).square().mean(), module, [X])
    differences = Hessian(lambda m, x: m(x).square().mean(), module, [X], hvp="finite_differences")
    torch.testing.assert_close(h.as_matrix(), differences.as_matrix(), rtol=1e-5, atol=1e-8)
