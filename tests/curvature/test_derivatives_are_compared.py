"""Faults of derivatives, of a module's state and of stopped gradients: what they give is right, or is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.curvature import GGN, Hessian

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
Y = torch.arange(16) % 3


class FusedCrossEntropy(torch.autograd.Function):
    """Computes its gradient in the forward pass, as fused kernels do: right once, constant to autograd."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.gradient = (z.softmax(-1) - F.one_hot(y, z.shape[-1])) / len(z)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


class Net(nn.Module):
    def __init__(self, between=torch.tanh):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 6), nn.Linear(6, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def network(between=torch.tanh):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net(between).double()


def one(operator):
    return operator.matvec(torch.ones(operator.shape[0], dtype=torch.float64))


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def test_a_fused_loss_of_the_output_is_not_zero_curvature():
    fused = GGN(network(), [(X, Y)], output_loss_fn=lambda z, b: FusedCrossEntropy.apply(z, b[1]))
    with pytest.raises(ValueError, match=r"Hessian of the output's loss by autograd differs .*FusedCrossEntropy"):
        one(fused)


def test_a_clipped_gradient_inside_the_model_is_no_jacobian():
    clipped = GGN(network(lambda z: Clipped.apply(z.tanh())), [(X, Y)])
    with pytest.raises(ValueError, match=r"the Jacobian by autograd differs .*Clipped"):
        one(clipped)
    one(GGN(network(torch.relu), [(X, Y), (X + 1, Y)]))


def test_state_that_shows_only_later_is_restored_before_each_evaluation():
    """A penalty is computed at every third call only, as lazy regularization does."""

    class Lazy(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (2 if self.calls % 3 == 0 else 1)

    lazy, plain = Lazy().double(), network()
    lazy.load_state_dict(plain.state_dict())
    batches = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    got, expected = (Hessian(cross_entropy, module, batches).as_matrix() for module in (lazy, plain))
    torch.testing.assert_close(got, expected)
    assert lazy.calls == 0


def test_restored_state_leaves_evaluation_mode_on():
    class Counting(Net):
        def forward(self, x):
            self.seen = getattr(self, "seen", 0) + 1
            return F.dropout(super().forward(x), 0.5, self.training)

    module, plain = Counting().double().train(), network()
    module.load_state_dict(plain.state_dict())
    got, expected = (Hessian(cross_entropy, m, [(X, Y)]).as_matrix() for m in (module, plain))
    torch.testing.assert_close(got, expected)
    assert module.training


def adversarial(module, batch):
    """A loss at inputs moved along its gradient, which is computed without a graph."""
    x = batch[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(module, (x, batch[1])), x)
    return cross_entropy(module, (batch[0] + 0.3 * g.sign() * g.norm(), batch[1]))


def frozen_twin(module, batch):
    module.requires_grad_(False)
    target = module(batch[0] * 2)
    module.requires_grad_(True)
    return (module(batch[0]) - target).square().mean()


def inference(module, batch):
    with torch.inference_mode():
        scale = module(batch[0]).norm()
    return cross_entropy(module, batch) * float(scale)


def in_place(module, batch):
    target = module(batch[0] + 1).mul(2).detach_()
    return (module(batch[0]) - target).square().mean()


def out_argument(module, batch):
    target = torch.empty(16, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.mul(module(batch[0]), 3, out=target)
    return (module(batch[0]) - target).square().mean()


@pytest.mark.parametrize("loss_fn", [adversarial, frozen_twin, inference, in_place, out_argument])
def test_gradients_may_be_stopped_in_any_way(loss_fn):
    module = network()
    by_autograd = Hessian(loss_fn, module, [(X, Y)]).as_matrix()
    by_differences = Hessian(loss_fn, module, [(X, Y)], hvp="finite_differences").as_matrix()
    torch.testing.assert_close(by_differences, by_autograd, rtol=1e-5, atol=1e-7)


def test_a_fixed_point_found_without_gradients_moves_with_the_parameters():
    """A deep equilibrium: its gradient is that of the fixed point, by a hook, so that nothing is held fixed."""

    class Equilibrium(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(0.1 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())

        def forward(self, x):
            with torch.no_grad():
                z = torch.zeros_like(x)
                for _ in range(60):
                    z = torch.tanh(z @ self.w + x)
            z = torch.tanh(z @ self.w + x)
            if z.requires_grad:
                at = z.detach().requires_grad_()
                with torch.enable_grad():
                    image = torch.tanh(at @ self.w + x)

                def solve(g):
                    v = g
                    for _ in range(60):
                        v = torch.autograd.grad(image, at, v, retain_graph=True)[0] + g
                    return v

                z.register_hook(solve)
            return z

    class Unrolled(Equilibrium):
        def forward(self, x):
            z = torch.zeros_like(x)
            for _ in range(60):
                z = torch.tanh(z @ self.w + x)
            return z

    def squares(module, x):
        return (module(x) - 1).square().mean()

    module, unrolled = Equilibrium(), Unrolled()
    with pytest.raises(ValueError, match="differs from differences of the gradient"):
        Hessian(squares, module, [X]).matvec(torch.ones(25).double())
    got = Hessian(squares, module, [X], hvp="finite_differences").as_matrix()
    torch.testing.assert_close(got, Hessian(squares, unrolled, [X]).as_matrix(), rtol=1e-4, atol=1e-6)


def test_differences_of_a_gradient_that_is_no_derivative_are_refused():
    reversed_net = network(lambda z: Clipped.apply(z.tanh()))
    with pytest.raises(ValueError, match=r"the gradient is not the derivative of the loss, by \d+%"):
        one(Hessian(cross_entropy, reversed_net, [(X, Y)], hvp="finite_differences"))


def test_differences_do_not_move_weights_that_the_forward_pass_writes():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4, max_norm=0.5)
            nn.init.normal_(self.table.weight)

    ids = torch.arange(12).view(4, 3) % 9
    h = Hessian(lambda m, ids: m.table(ids).square().mean(), Words(), [ids], hvp="finite_differences")
    with pytest.raises(ValueError, match=r"the forward pass writes into them .* use hvp='auto'"):
        h.matvec(torch.ones(36))


def test_a_wrong_function_in_a_weak_branch_is_seen_in_its_own_layer():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.exp() + 0)
            return x.exp()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    class Branches(Net):
        def __init__(self):
            super().__init__()
            self.weak = nn.Linear(5, 3)

        def forward(self, x):
            return super().forward(x) * 30 + 0.01 * Exp.apply(self.weak(x))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"most in weak\..*: Exp computes a wrong second derivative"):
        one(Hessian(lambda m, b: m(b[0]).square().mean(), Branches().double(), [(X, Y)]))


def test_a_sparse_gradient_is_a_gradient():
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 2)

    ids = torch.arange(12).view(4, 3) % 9
    sparse, dense = (
        Hessian(lambda m, ids: m.out(m.table(ids).mean(1).tanh()).square().mean(), Words(s).double(), [ids])
        for s in (True, False)
    )
    torch.testing.assert_close(sparse.as_matrix(), dense.as_matrix())
    torch.testing.assert_close(sparse.gradient(), dense.gradient())


def test_what_cannot_be_compared_is_said():
    """A function that accepts float32 alone, behind kinks in every example."""

    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    module = copy.deepcopy(network(lambda z: (z * 1e4).sin().abs())).float()
    h = Hessian(lambda m, b: Picky.apply(m(b[0].float())).mean(), module, [(X, Y)])
    with pytest.warns(UserWarning, match="could not be compared with differences of the gradient, though Picky may"):
        h.matvec(torch.ones(h.shape[0]))
