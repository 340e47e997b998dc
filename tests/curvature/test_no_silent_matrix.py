"""What would be a plausible wrong matrix is refused, each time, and a refusal leaves nothing behind."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.curvature import GGN, CrossEntropy, Deflated, EmpiricalFisher, Hessian, SquaredError, spectrum

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def linear(**kwargs):
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=torch.float64, **kwargs)


class OnceTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


@pytest.mark.parametrize("matrix", [GGN, lambda m, b: EmpiricalFisher(cross_entropy, m, b)])
def test_a_function_marked_once_differentiable_is_named(matrix):
    """The Jacobian is taken by differentiating the backward pass, which such a function drops."""

    class Model(nn.Sequential):
        def forward(self, x):
            return self[1](OnceTanh.apply(self[0](x)))

    model = Model(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"cannot differentiate twice: (OnceTanh is marked|.*once_differentiable)"):
        matrix(model, [(X, Y)]).matvec(torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64))


@pytest.mark.parametrize("way", ["forward_over_reverse", "finite_differences"])
@pytest.mark.parametrize("hidden", ["tuple", "dict", "closure"])
def test_a_parameter_that_is_reached_past_its_module(way, hidden):
    """The value of such a copy cannot be changed, so the derivative would be zero."""
    module = linear()
    hidden_in = {"tuple": (module.weight,), "dict": {"w": module.weight}, "closure": [module.weight]}[hidden]
    module.hidden_in = None if hidden == "closure" else hidden_in

    def loss(module, batch):
        weight = hidden_in["w"] if hidden == "dict" else hidden_in[0]
        return (F.linear(batch, weight) ** 3).sum() + module.bias.square().sum()

    v = torch.ones(15, dtype=torch.float64)
    assert Hessian(loss, module, [X]).matvec(v).abs().max() > 0
    with pytest.raises(ValueError, match="uses a parameter without its module"):
        Hessian(loss, module, [X], hvp=way).matvec(v)


def test_two_operators_at_once_on_one_module_in_half_precision():
    """Both use the same float32 copies of the module's parameters."""
    module = linear().bfloat16()
    first, second = (Hessian(cross_entropy, module, [(X.bfloat16(), Y)]) for _ in range(2))
    v = torch.ones(15)
    expected = first.matvec(v)
    with first.hold():
        assert torch.equal(second.matvec(v), expected)
        assert torch.equal(first.matvec(v), expected)
    assert torch.equal(second.matvec(v), expected)


def test_finite_differences_are_refused_each_time():
    module = nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 3).double())
    h = Hessian(cross_entropy, module, [(X, Y)], hvp="finite_differences", step=0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match="differ by"):
            h.matvec(torch.ones(27, dtype=torch.float64))
    assert h.step == 0.5


@pytest.mark.parametrize("batches", [1, 2])
def test_losses_of_another_number_than_that_of_the_examples(batches):
    f = EmpiricalFisher(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")[:, None], linear(), [(X, Y)] * 2)
    f.batches.batches = [(X, Y)] * batches
    with pytest.raises(ValueError, match=r"losses of 6 examples, or their mean; got a tensor of shape \(6, 1\)"):
        f.matvec(torch.ones(15, dtype=torch.float64))


@pytest.mark.parametrize("labels", [Y, torch.zeros(6, 3)])
def test_next_tokens_need_integer_labels_of_tokens(labels):
    found = f"got {labels.dtype} of shape {tuple(labels.shape)}; pass shift=False"
    with pytest.raises(ValueError, match=re.escape(found)):
        CrossEntropy(shift=True)(torch.zeros(6, 3), (None, labels))


def test_labels_that_may_mean_two_things():
    module = linear()
    soft = F.one_hot(Y, 3).double()
    with pytest.raises(ValueError, match="labels are probabilities; say what the loss is"):
        GGN(module, [(X, soft)]).matvec(torch.ones(15, dtype=torch.float64))
    GGN(module, [(X, soft)], output_loss_fn=SquaredError()).matvec(torch.ones(15, dtype=torch.float64))
    with pytest.raises(ValueError, match="one class, whose cross-entropy is zero"):
        GGN(nn.Linear(4, 1).double(), [(X, Y)]).matvec(torch.ones(5, dtype=torch.float64))


def test_a_mapping_that_the_module_cannot_be_called_with():
    with pytest.raises(ValueError, match=r"Linear cannot be called with x, labels: .*Pass model_fn"):
        GGN(linear(), [{"x": X, "labels": Y}]).matvec(torch.ones(15, dtype=torch.float64))


def test_every_batch_is_checked_before_it_is_cut():
    """The first may be cut, the second has ignored labels and a mean over the others."""
    ignored = torch.tensor([0, 1, -100, -100, -100, 2])
    h = Hessian(cross_entropy, linear(), [(X, Y), (X, ignored)], micro_batch_size=3)
    with pytest.raises(ValueError, match="is not the weighted mean"):
        h.matvec(torch.ones(15, dtype=torch.float64))


def test_a_part_without_labels_weighs_nothing():
    labels = torch.tensor([0, 1, 2, -100, -100, -100])
    whole, parts = (
        Hessian(cross_entropy, linear(), [(X, labels)], weight_fn=num_labels, micro_batch_size=size)
        for size in (None, 3)
    )
    v = torch.ones(15, dtype=torch.float64)
    torch.testing.assert_close(parts.matvec(v), whole.matvec(v))
    assert math.isclose(parts.loss(), whole.loss())


def test_a_projected_spectrum_knows_that_it_is_one():
    h = Hessian(cross_entropy, linear(), [(X, Y)])
    one, other = (spectrum(h, method="projected", dim=8, num_matvecs=4, top_k=1, bottom_k=0, seed=s) for s in (0, 1))
    with pytest.raises(ValueError, match="has no eigenvectors of the operator itself"):
        one.eigenvectors(h, 1)
    with pytest.raises(ValueError, match="cannot compare eigenvectors"):
        one.overlap(other, 1)
    gradient = h.gradient()
    assert 0 <= one.alignment(one.sketch.matvec(gradient), 1) <= 1
    with pytest.raises(ValueError, match=r"gradient is a vector of size 15, got shape \(8,\)"):
        spectrum(h, gradient=gradient[:8])


def test_copies_of_an_eigenvalue_have_orthonormal_eigenvectors(dense_operator):
    """They can then be deflated, although each start vector finds another direction in their space."""
    values = torch.linspace(-1, 1, 300, dtype=torch.float64)
    values[:3] = 5
    q, _ = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    a = dense_operator(q @ torch.diag(values) @ q.T)
    sp = spectrum(a, num_matvecs=64, dim=1024, top_k=3, bottom_k=0)
    pairs = sp.eigenvectors(a, 3)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(pairs.values, torch.full((3,), 5.0, dtype=torch.float64))
    assert spectrum(Deflated(a, pairs.vectors), top_k=1, bottom_k=0).lambda_max == pytest.approx(1, abs=1e-2)
    with pytest.raises(ValueError, match=r"this run found \d+ eigenvalues, asked for the vectors of 500 \+ 0"):
        sp.eigenvectors(a, 500)


def test_the_trace_is_exact_where_all_eigenvalues_are_known(dense_operator):
    a = dense_operator(torch.diag(torch.tensor([3.0, 2.0, 1e-3, -1e-2], dtype=torch.float64)))
    sp = spectrum(a, num_matvecs=16, top_k=1, bottom_k=0)
    assert sp.trace == pytest.approx(4.991, abs=1e-12)
    assert sp.trace_sem < 1e-12


def test_the_trace_of_copies_is_not_that_of_those_that_were_seen(dense_operator):
    """There are twenty copies of the eigenvalue 2, of which the run finds a few."""
    sp = spectrum(dense_operator(2 * torch.eye(50, dtype=torch.float64)), top_k=1, bottom_k=0)
    assert sp.trace == pytest.approx(100)
