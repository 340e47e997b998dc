"""A product with the Gauss-Newton matrix is a product with Jᵀ H J, both factors dense and by torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.curvature import GGN, CrossEntropy, Hessian, SquaredError

LABELS = torch.tensor([0, 2, 1, -100, 2, 0])
TOKENS = torch.tensor([[0, 1, 2, -100], [2, 2, -100, -100], [1, 0, 0, 2]])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(inputs=3, outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


class Heatmap(nn.Module):
    """Classes along the second axis, as in segmentation."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


def truth(module, batch, loss_fn):
    """Return Jᵀ H J of one batch, computed densely."""
    named = {k: p.detach() for k, p in module.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])

    def output(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {k: part.view(p.shape) for (k, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(module, values, (batch[0],)).flatten()

    shape = module(batch[0]).shape
    jacobian = jacrev(output)(flat)
    return jacobian.T @ hessian(lambda z: loss_fn(z.view(shape), batch[1]))(output(flat)) @ jacobian


def dense(operator):
    with operator.hold():
        return operator.as_matrix(dtype=torch.float64)


def entropy(**options):
    return lambda z, y: functional.cross_entropy(z, y, **options)


def by_token(z, y):
    """Compute the mean loss over the tokens that are not ignored; classes are on the last axis."""
    return functional.cross_entropy(z.flatten(0, -2), y.flatten())


PROBLEMS = {
    "ignored labels": (network(), (normal(6, 3), LABELS), entropy(), None),
    "smoothed labels": (
        network(),
        (normal(6, 3), LABELS),
        entropy(label_smoothing=0.3),
        CrossEntropy(label_smoothing=0.3),
    ),
    "another index ignored": (network(), (normal(6, 3), LABELS.abs() % 98), entropy(ignore_index=2), CrossEntropy(2)),
    "tokens, classes last": (network(), (normal(3, 4, 3), TOKENS), by_token, None),
    "pixels, classes second": (Heatmap(), (normal(3, 4, 3), TOKENS), entropy(), None),
    "images, classes second": (Heatmap(), (normal(2, 4, 2, 3), TOKENS[:2, :, None].expand(2, 4, 2)), entropy(), None),
    "squared error": (network(), (normal(6, 3), normal(6, 3, seed=1)), functional.mse_loss, None),
}
problems = pytest.mark.parametrize(("module", "batch", "loss", "output_loss"), PROBLEMS.values(), ids=PROBLEMS)


@problems
def test_a_product_is_that_of_the_dense_matrix(module, batch, loss, output_loss):
    """With one batch, whose graph is kept over the products, and with two, where it is not."""
    expected = truth(module, batch, loss)
    torch.testing.assert_close(dense(GGN(module, [batch], output_loss_fn=output_loss)), expected)
    two, v = GGN(module, [batch, batch], output_loss_fn=output_loss), normal(len(expected))
    torch.testing.assert_close(two.matvec(v), expected @ v)


@problems
def test_the_closed_form_is_that_of_autograd(module, batch, loss, output_loss):
    """The same loss as a plain function is differentiated by autograd."""
    closed = GGN(module, [batch], output_loss_fn=output_loss)
    differentiated = GGN(module, [batch], output_loss_fn=lambda z, batch: loss(z, batch[1]))
    v = normal(*closed.shape[:1])
    torch.testing.assert_close(closed.matvec(v), differentiated.matvec(v))
    assert closed.loss() == pytest.approx(loss(module(batch[0]), batch[1]).item(), rel=1e-12)
    torch.testing.assert_close(closed.gradient(), differentiated.gradient())


@pytest.mark.parametrize(
    "loss", [functional.huber_loss, lambda z, y: (z - y).pow(4).mean(), lambda z, y: z.logsumexp(-1).mean()]
)
def test_any_convex_loss_of_the_output_is_supported(loss):
    module, batch = network(), (normal(6, 3), normal(6, 3, seed=1))
    got = GGN(module, [batch], output_loss_fn=lambda z, batch: loss(z, batch[1]))
    torch.testing.assert_close(dense(got), truth(module, batch, loss))


def test_a_loss_linear_in_the_output_has_no_curvature():
    module, x = network(), normal(6, 3)
    assert not dense(GGN(module, [x], output_loss_fn=lambda z, x: z.mean())).any()


def test_for_a_linear_model_it_is_the_hessian():
    module, batch = nn.Linear(3, 3).double(), (normal(6, 3), LABELS)
    h = Hessian(lambda m, batch: entropy()(m(batch[0]), batch[1]), module, [batch])
    torch.testing.assert_close(dense(GGN(module, [batch])), dense(h))


def test_batches_are_weighted_by_examples_or_by_labels():
    """The loss is a mean over the labels that are not ignored, so their number is the weight of a batch."""
    module, x = network(), normal(3, 4, 3)
    batches = [(x[:1], TOKENS[:1]), (x[1:], TOKENS[1:])]
    one, two = (truth(module, batch, by_token) for batch in batches)
    v = normal(len(one))
    torch.testing.assert_close(GGN(module, batches).matvec(v), (one + 2 * two) @ v / 3)
    by_labels = GGN(module, batches, weight_fn=num_labels).matvec(v)
    torch.testing.assert_close(by_labels, truth(module, (x, TOKENS), by_token) @ v)


@problems
def test_it_has_no_negative_eigenvalue(module, batch, loss, output_loss):
    eigenvalues = torch.linalg.eigvalsh(dense(GGN(module, [batch], output_loss_fn=output_loss)))
    assert eigenvalues[0] > -1e-14 * eigenvalues[-1]


def test_the_model_may_be_called_otherwise():
    module, (x, y) = network(), (normal(6, 3), LABELS)
    g = GGN(module, [{"x": x, "labels": y}], model_fn=lambda module, batch: module(2 * batch["x"]))
    torch.testing.assert_close(dense(g), truth(module, (2 * x, y), entropy()))


def test_a_batch_may_be_a_tensor_and_parameters_unused():
    module, x = network(), normal(6, 3)
    g = GGN(module, [x], output_loss_fn=lambda z, x: z.square().mean())
    expected = truth(module, (x, None), lambda z, _: z.square().mean())
    torch.testing.assert_close(dense(g), expected)
    module.spare = nn.Linear(2, 2).double()
    g = GGN(module, [x], model_fn=lambda m, x: m[:3](x), output_loss_fn=lambda z, x: z.square().mean())
    torch.testing.assert_close(dense(g), functional.pad(expected, (0, 6, 0, 6)))


def test_parameters_may_be_chosen():
    module, batch = network(), (normal(6, 3), LABELS)
    g = GGN(module, [batch], parameters="2.*")
    torch.testing.assert_close(dense(g), truth(module, batch, entropy())[16:, 16:])


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["cross-entropy", "squared error"])
def test_half_precision_is_computed_in_float32(loss):
    y = LABELS if loss == CrossEntropy() else normal(6, 3, seed=1).bfloat16()
    module = network().bfloat16()
    wide = network().bfloat16().float()
    got = GGN(module, [(normal(6, 3).bfloat16(), y)], output_loss_fn=loss)
    expected = GGN(wide, [(normal(6, 3).bfloat16().float(), y.float() if y.is_floating_point() else y)])
    assert torch.equal(dense(got), dense(expected))
