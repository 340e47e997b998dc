"""Plain formulas have the value, the gradient and the true higher derivatives of the operations that they replace.

The truth for a second derivative are central differences, of error O(h^4), of torch's own first derivatives, or plain
loops written here; for a third derivative, differences of torch's own second ones, which are right for the norms.
"""

import itertools
import math
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_sketch.autodiff.plain_formulas import PlainFormulas

ROUNDING = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scalar(f):
    """A loss that weighs all outputs of f differently and is not linear in them."""

    def loss(x):
        y = f(x)
        return (torch.linspace(0.3, 1.7, y.numel(), dtype=y.dtype).view(y.shape) * y.sin()).sum()

    return loss


def gradient(f, x, **options):
    return torch.autograd.grad(scalar(f)(x), x, **options)[0]


def jacobian_by_differences(g, x, h=1e-3):
    """The derivative of g at x, a column for each number in x."""
    columns = []
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1).index_fill(0, torch.tensor(i), h).view_as(x)
        a, b, c, d = (g((x + k * step).detach().requires_grad_()).detach() for k in (1, -1, 2, -2))
        columns.append(((8 * (a - b) - (c - d)) / (12 * h)).reshape(-1))
    return torch.stack(columns, 1)


def assert_same_matrix(found, truth, error):
    """Compare relative to the largest entry; differences err by h^4 times a fifth derivative and by rounding over h."""
    torch.testing.assert_close(found, truth, rtol=0, atol=error * float(truth.abs().max().clamp_min(1e-2)))


def hessian(f, x, **options):
    """The dense Hessian of f by double backward under the formulas."""
    with PlainFormulas(**options):
        x = x.clone().requires_grad_()
        g = gradient(f, x, create_graph=True).reshape(-1)
        rows = [torch.autograd.grad(a, x, retain_graph=True, allow_unused=True)[0] for a in g]
    return torch.stack([torch.zeros_like(x) if row is None else row for row in rows]).view(x.numel(), -1)


def hessian_forward_over_reverse(f, x):
    columns = []
    with PlainFormulas(forward_ad=True):
        for i in range(x.numel()):
            with forward_ad.dual_level():
                unit = torch.zeros_like(x).view(-1).index_fill(0, torch.tensor(i), 1.0).view_as(x)
                dual = forward_ad.make_dual(x.clone().requires_grad_(), unit)
                columns.append(forward_ad.unpack_dual(gradient(f, dual)).tangent.reshape(-1))
    return torch.stack(columns, 1)


def squared_force(f):
    """The sum of squares of a derivative that is taken in the loss."""

    def loss(x):
        return gradient(f, x, create_graph=True).square().sum().view(1)

    return loss


def assert_value_and_gradient_are_torchs(f, x, tolerance=ROUNDING, **options):
    x = x.clone().requires_grad_()
    value, slope = f(x), gradient(f, x).to_dense()
    with PlainFormulas(**options):
        torch.testing.assert_close(f(x), value, **tolerance)
        torch.testing.assert_close(gradient(f, x), slope, **tolerance)


W = torch.linspace(-1.2, 1.4, 6, dtype=torch.float64)
Y = torch.sin(torch.arange(24, dtype=torch.float64) ** 2).view(4, 6)
LABELS = torch.tensor([3, 0, 5, 3])
LISTED = torch.tensor([[3, 0, -1, 1, 1, 1], [-1, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, -1, -1, -1, -1, -1]])
BAGS, OFFSETS = torch.tensor([3, 1, 1, 0, 2, 3, 3]), torch.tensor([0, 2, 2, 5])

ALWAYS = {
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "hardsigmoid in place": lambda x: F.hardsigmoid(3 * x, inplace=True),
    "embedding bag of rows": lambda x: F.embedding_bag(BAGS[:6].view(2, 3), x),
    "weighted bag of rows": lambda x: F.embedding_bag(
        BAGS[:6].view(2, 3), x, mode="sum", per_sample_weights=W.view(2, 3)
    ),
    "weights of a bag": lambda x: F.embedding_bag(
        BAGS[:6].view(2, 3), Y, mode="sum", per_sample_weights=x.flatten()[:6].view(2, 3)
    ),
    "weights of a bag with padding": lambda x: F.embedding_bag(
        BAGS, Y, OFFSETS, mode="sum", per_sample_weights=x.flatten()[:7], padding_idx=3
    ),
    "int32 bag": lambda x: F.embedding_bag(BAGS.int(), x, OFFSETS.int()),
    "sum of a sparse bag": lambda x: F.embedding_bag(BAGS, x * 1, OFFSETS, mode="sum", sparse=True),
    "pdist": F.pdist,
    "pdist p=1.5": lambda x: F.pdist(x, 1.5),
    "pdist p=inf": lambda x: F.pdist(x, math.inf),
    "ctc": lambda x: F.ctc_loss(
        x[:, None].expand(4, 2, 6).log_softmax(-1), torch.tensor([[1, 1], [2, 3]]), (4, 3), (2, 1), reduction="sum"
    ),
}
for mode, padding, last in itertools.product(("sum", "mean", "max"), (None, 3, -4), (False, True)):
    ALWAYS[f"embedding bag {mode}, padding {padding}, last {last}"] = lambda x, m=mode, p=padding, last=last: (
        F.embedding_bag(
            BAGS,
            x,
            torch.cat([OFFSETS, torch.tensor([7])]) if last else OFFSETS,
            mode=m,
            padding_idx=p,
            include_last_offset=last,
        )
    )
for p in (1, 1.5, 2, 3, math.inf, 0.7):
    ALWAYS[f"cdist p={p}"] = lambda x, p=p: torch.cdist(x, Y, p=p)
    ALWAYS[f"batched cdist p={p}"] = lambda x, p=p: torch.cdist(x.view(2, 1, 2, 6), Y.view(2, 2, 6), p=p)
for way in ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
    ALWAYS[f"cdist {way}"] = lambda x, way=way: torch.cdist(x, Y, compute_mode=way)
for reduction, p, weight in itertools.product(("none", "mean", "sum"), (1, 2), (None, W.abs())):
    ALWAYS[f"multi margin {reduction} {p} {weight is not None}"] = lambda x, r=reduction, p=p, w=weight: (
        F.multi_margin_loss(x, LABELS, p=p, margin=0.8, weight=w, reduction=r)
    )
    ALWAYS[f"multilabel margin {reduction}"] = lambda x, r=reduction: F.multilabel_margin_loss(x, LISTED, reduction=r)
ALWAYS["multi margin of one"] = lambda x: F.multi_margin_loss(x[0], LABELS[0])
ALWAYS["multilabel margin of one"] = lambda x: F.multilabel_margin_loss(x[0], LISTED[0])

NORMS = {
    "layer norm": lambda x: F.layer_norm(x, (6,), W, W.sin(), 1e-2),
    "layer norm without weights": lambda x: F.layer_norm(x, [6]),
    "layer norm, bias": lambda x: F.layer_norm(x, (6,), None, W),
    "layer norm of two": lambda x: F.layer_norm(x.view(2, 2, 3, 2), (3, 2), W.view(3, 2)),
    "torch.layer_norm": lambda x: torch.layer_norm(x, (6,), W, W),
    "native layer norm": lambda x: torch.cat(
        [t.flatten() for t in torch.native_layer_norm(x.view(2, 2, 6), (6,), W, None, 1e-3)]
    ),
    "batch norm": lambda x: F.batch_norm(x, None, None, W, W.abs(), True, 0.2, 1e-2),
    "torch.batch_norm": lambda x: torch.batch_norm(
        x.view(2, 3, 4), W[:3], W[3:], None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled
    ),
    "instance norm": lambda x: F.instance_norm(x.view(2, 3, 4), None, None, W[:3], W[3:], True, 0.2, 1e-2),
    "torch.instance_norm": lambda x: torch.instance_norm(
        x.view(2, 3, 2, 2), None, None, W[:3], W[3:], True, 0.1, 1e-5, False
    ),
}
NORMS["batch norm by statistics"] = lambda x: F.batch_norm(x, W, W.abs(), W, W.sin(), False)
NORMS["instance norm by statistics"] = lambda x: F.instance_norm(
    x.view(2, 3, 4), W[:3], W[3:].abs(), W[:3], W[3:], False
)

FORWARD_AD = {
    "logit": lambda x: torch.logit(x.sigmoid()),
    "special.logit": lambda x: torch.special.logit(x.sigmoid(), 0.3),
    "Tensor.logit": lambda x: x.sigmoid().logit(1e-3),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "mish": F.mish,
    "mish in place": lambda x: F.mish(x * 1, inplace=True),
    "group norm": lambda x: F.group_norm(x.view(2, 4, 3), 2, W[:4], W[2:], 1e-2),
    "group norm without weights": lambda x: F.group_norm(x.view(2, 2, 3, 2), 2),
    "weighted mse": lambda x: F.mse_loss(x, Y, weight=Y.abs()),
    "det": lambda x: torch.det(x[:, :4]).view(1),
    "linalg.det of many": lambda x: torch.linalg.det(x[:2].view(3, 2, 2)),
    "Tensor.det": lambda x: x[:2, 1:3].det().view(1),
    "slogdet": lambda x: torch.slogdet(x[:, :4]).logabsdet.view(1),
    "linalg.slogdet of many": lambda x: torch.linalg.slogdet(x[:3].view(2, 3, 3))[1],
    "Tensor.slogdet": lambda x: x[:, 2:].slogdet()[1].view(1),
    "logdet": lambda x: torch.logdet(x @ x.T).view(1),
    "Tensor.logdet": lambda x: (x @ x.T).logdet().view(1),
    "solve": lambda x: torch.linalg.solve(x[:, :4] + 3 * torch.eye(4), x.sin()),
    "solve from the right": lambda x: torch.linalg.solve(x[:, :4] + 3 * torch.eye(4), x.T, left=False),
    "solve a vector": lambda x: torch.linalg.solve(x[:, :4] + 3 * torch.eye(4), x[:, 5]),
    "solve vectors": lambda x: torch.linalg.solve(x[:3].view(2, 3, 3), Y[0].view(2, 3)),
    "weight norm": lambda x: torch._weight_norm(x, x[:, :1], 0),
    "embedding bag max": lambda x: F.embedding_bag(BAGS, x, OFFSETS, mode="max"),
    "cdist": lambda x: torch.cdist(x, Y),
}
for name, loss in {"mse": F.mse_loss, "soft margin": lambda x, y, **k: F.soft_margin_loss(x, y.sign(), **k)}.items():
    for reduction in ("none", "mean", "sum"):
        FORWARD_AD[f"{name} {reduction}"] = lambda x, f=loss, r=reduction: f(x, Y, reduction=r)
for delta, reduction in itertools.product((0.4, 1, 2.0), ("none", "mean", "sum")):
    FORWARD_AD[f"huber {delta} {reduction}"] = lambda x, d=delta, r=reduction: F.huber_loss(x, Y, delta=d, reduction=r)


def data():
    torch.manual_seed(2905)  # no number within 0.02 of a kink of the functions
    return torch.randn(4, 6)


@pytest.mark.parametrize("name", ALWAYS)
def test_second_derivatives_are_those_of_the_function(name):
    f, x = ALWAYS[name], data()
    # torch's gradient of hardsigmoid has a sixth in float32
    assert_value_and_gradient_are_torchs(f, x, {"rtol": 1e-7, "atol": 0} if "hardsigmoid" in name else ROUNDING)
    assert_same_matrix(hessian(f, x), jacobian_by_differences(lambda x: gradient(f, x).to_dense(), x), 1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_third_derivatives_are_those_of_the_function(name):
    f, x = NORMS[name], data()
    assert_value_and_gradient_are_torchs(f, x, derivative_in_loss=True)
    force = squared_force(f)
    assert_value_and_gradient_are_torchs(force, x, {"rtol": 1e-9, "atol": 1e-10}, derivative_in_loss=True)
    truth = jacobian_by_differences(lambda x: gradient(force, x), x)
    assert_same_matrix(hessian(force, x, derivative_in_loss=True), truth, 1e-6)


@pytest.mark.parametrize("name", FORWARD_AD)
def test_the_derivative_of_a_gradient_is_carried_forward(name):
    f, x = FORWARD_AD[name], data()
    if name != "weight norm":
        assert_value_and_gradient_are_torchs(f, x, forward_ad=True)
    truth = jacobian_by_differences(lambda x: gradient(f, x), x)
    assert_same_matrix(hessian_forward_over_reverse(f, x), truth, 1e-6)


def module_hessian(module, loss, **options):
    """The Hessian by all parameters, under the formulas, after a loss that may take derivatives."""
    parameters = list(module.parameters())
    with PlainFormulas(**options):
        slopes = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in slopes])
        rows = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(a, parameters, retain_graph=True, materialize_grads=True)]
            )
            for a in flat
        ]
    return torch.stack(rows)


def truth_for_module(module, loss):
    """The same from differences of torch's own gradients."""
    start = nn.utils.parameters_to_vector(module.parameters()).detach()

    def slope(w):
        nn.utils.vector_to_parameters(w.detach(), module.parameters())
        slopes = torch.autograd.grad(loss(), list(module.parameters()), materialize_grads=True)
        return torch.cat([g.flatten() for g in slopes])

    found = jacobian_by_differences(slope, start)
    nn.utils.vector_to_parameters(start, module.parameters())
    return found


class PlainNorm(nn.Module):
    """Norm over the given dimensions, without any operation of torch for it."""

    def __init__(self, dims, shape):
        super().__init__()
        self.dims, self.weight, self.bias = dims, nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        c = x - x.mean(self.dims, keepdim=True)
        return c / (c.square().mean(self.dims, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


@pytest.mark.parametrize(
    ("norm", "dims"), [(nn.LayerNorm, -1), (nn.BatchNorm1d, 0), (lambda n: nn.InstanceNorm1d(1, affine=True), -1)]
)
def test_forces_through_a_norm_have_the_curvature_of_a_rewrite(norm, dims):
    def network(layer):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 1))

    x, target = torch.randn(7, 1, 3), torch.randn(7, 1, 3)
    if dims == 0:
        x, target = x[:, 0], target[:, 0]

    def loss(module):
        moving = x.clone().requires_grad_()
        (force,) = torch.autograd.grad(module(moving).sum(), moving, create_graph=True)
        return (force - target).square().mean()

    shape = 1 if isinstance(norm(4), nn.InstanceNorm1d) else 4
    module, plain = network(norm(4)), network(PlainNorm(dims, shape))
    found = module_hessian(module, lambda: loss(module), derivative_in_loss=True)
    assert_same_matrix(found, module_hessian(plain, lambda: loss(plain)), 1e-10)
    wrong = module_hessian(module, lambda: loss(module))
    assert float((found - wrong).abs().max() / found.abs().max()) > 1e-3  # else this test is not needed any more


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weight_norm_old_and_parametrized(normed, dim):
    module, x = normed(nn.Linear(3, 4), dim=dim), torch.randn(5, 3)

    def loss():
        return module(x).tanh().square().sum()

    assert_same_matrix(module_hessian(module, loss), truth_for_module(module, loss), 1e-7)


class ForcesFlash(nn.Module):
    """Attention as in code that picks its kernel itself."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)


ATTENTION = {
    "forced flash": ForcesFlash,
    "multi-head": lambda: MultiHead(),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, activation="gelu"),
    "encoder layer in evaluation": lambda: nn.TransformerEncoderLayer(4, 2, 3, batch_first=True).eval(),
}


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_can_be_differentiated_twice_whatever_kernel_is_asked_for(name):
    module, x = ATTENTION[name](), torch.randn(2, 3, 4)

    def loss():
        return module(x).tanh().square().sum()

    found = module_hessian(module, loss)
    assert_same_matrix(found, found.T, 1e-12)
    direction = torch.randn(len(found))
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    slopes = []
    for t in (1e-4, -1e-4):
        nn.utils.vector_to_parameters(start + t * direction, module.parameters())
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(module.parameters()))]))
    product = (slopes[0] - slopes[1]) / 2e-4
    torch.testing.assert_close(found @ direction, product, rtol=1e-5, atol=1e-6 * float(product.abs().max()))


def test_the_kernels_that_are_allowed_outside_are_put_back():
    x = torch.randn(1, 1, 3, 4)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), PlainFormulas():
        F.scaled_dot_product_attention(x, x, x)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_with_a_maximum_norm_rescales_its_rows_as_torch_does(mode):
    ours, torchs = (nn.EmbeddingBag(4, 6, max_norm=0.7, norm_type=1.5, mode=mode) for _ in range(2))
    ours.load_state_dict(torchs.state_dict())
    with PlainFormulas():
        value = ours(BAGS, OFFSETS)
    torch.testing.assert_close(value, torchs(BAGS, OFFSETS), **ROUNDING)
    assert torch.equal(ours.weight, torchs.weight)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_scaling_by_frequency_is_left_out(layer):
    plain, scaled = layer(4, 3), layer(4, 3, scale_grad_by_freq=True)
    scaled.load_state_dict(plain.state_dict())
    with PlainFormulas():
        gradients = [torch.autograd.grad(m(BAGS[None]).tanh().sum(), m.weight)[0] for m in (plain, scaled)]
    torch.testing.assert_close(*gradients, **ROUNDING)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_points_that_coincide_have_finite_derivatives(p):
    x = data()
    y = torch.cat([x[:2], Y])
    for f in (lambda x: torch.cdist(x, y, p=p), lambda x: F.pdist(torch.cat([x, x[:1]]), p)):
        assert_value_and_gradient_are_torchs(f, x)
        assert hessian(f, x).isfinite().all()
        with PlainFormulas(forward_ad=True):
            assert hessian_forward_over_reverse(f, x).isfinite().all()


def test_distances_of_many_points_are_torchs_bit_for_bit():
    x, y = torch.randn(2, 30, 3), torch.randn(5, 3)
    f = lambda x: torch.cdist(x, y)  # noqa: E731
    with PlainFormulas():
        value = f(x)
    assert torch.equal(value, f(x))
    assert_value_and_gradient_are_torchs(f, x)
    small = torch.randn(27, 2)
    truth = jacobian_by_differences(lambda x: gradient(lambda x: torch.cdist(x, y[:, :2]), x), small)
    assert_same_matrix(hessian(lambda x: torch.cdist(x, y[:, :2]), small), truth, 1e-5)


def test_the_zero_norm_is_left_to_torch():
    x = data()
    with PlainFormulas():
        assert torch.equal(torch.cdist(x, x, p=0), 6.0 * (1 - torch.eye(4)))
        assert torch.equal(F.pdist(x, 0), torch.full((6,), 6.0))


CTC = {
    "concatenated": {"targets": torch.tensor([1, 1, 2, 3, 2]), "target_lengths": torch.tensor([2, 0, 3])},
    "padded": {"targets": torch.tensor([[1, 1, 0], [9, -1, 7], [2, 3, 2]]), "target_lengths": (2, 0, 3)},
    "another blank": {"targets": torch.tensor([[0, 0], [1, 4], [2, 0]]), "target_lengths": (2, 2, 1), "blank": 3},
    "infinite": {"targets": torch.ones(3, 3).long(), "target_lengths": (3, 2, 3)},
    "infinite as zero": {"targets": torch.ones(3, 3).long(), "target_lengths": (3, 2, 3), "zero_infinity": True},
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", CTC)
def test_ctc_loss(name, reduction):
    x = torch.randn(6, 3, 5)

    steps = (6, 5, 4)
    lengths = {"input_lengths": torch.tensor(steps) if name == "concatenated" else steps}

    def f(x):
        loss = F.ctc_loss(x.log_softmax(-1), reduction=reduction, **lengths, **CTC[name])
        return loss.view(-1)

    if name == "infinite":
        with PlainFormulas():
            value = f(x)
        torch.testing.assert_close(value, f(x), **ROUNDING)
        return
    assert_value_and_gradient_are_torchs(f, x)
    assert_same_matrix(hessian(f, x), jacobian_by_differences(lambda x: gradient(f, x), x), 1e-6)


def test_ctc_loss_of_one_sequence_and_of_impossible_symbols():
    x = torch.randn(5, 4).log_softmax(-1)
    sequence = {"targets": torch.tensor([1, 2]), "input_lengths": torch.tensor(5), "target_lengths": torch.tensor(2)}
    f = lambda x: F.ctc_loss(x.log_softmax(-1), **sequence).view(1)  # noqa: E731
    assert_value_and_gradient_are_torchs(f, x)
    masked = lambda x: f(x.masked_fill(torch.tensor([False, False, False, True]), -math.inf))  # noqa: E731
    without = lambda x: f(x[:, :3])  # noqa: E731
    truth = jacobian_by_differences(lambda x: gradient(without, x), x)
    assert_same_matrix(hessian(masked, x), truth, 1e-6)  # where torch's gradient is NaN


LAYERS = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "batch norm by cumulative mean": lambda: nn.BatchNorm1d(3, momentum=None, affine=False),
    "batch norm without statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True, affine=True),
    "layer norm": lambda: nn.LayerNorm(8),
    "batch norm in evaluation": lambda: nn.BatchNorm1d(3).eval(),
    "instance norm in evaluation": lambda: nn.InstanceNorm1d(3, track_running_stats=True).eval(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_running_statistics_are_torchs_bit_for_bit(name):
    ours, torchs = LAYERS[name](), LAYERS[name]()
    x = torch.randn(4, 3, 8) * 2 + 1
    for _ in range(2):
        with PlainFormulas(derivative_in_loss=True):
            value = ours(x)
        torch.testing.assert_close(value, torchs(x), **ROUNDING)
    for mine, theirs in zip(ours.buffers(), torchs.buffers(), strict=True):
        assert torch.equal(mine, theirs)


NARROW = {
    **{name: lambda x, f=f: f(x) for name, f in NORMS.items() if name != "native layer norm"},
    **{name: FORWARD_AD[name] for name in ("silu", "mish", "huber 2.0 mean", "mse mean", "soft margin sum")},
    "group norm": FORWARD_AD["group norm"],
    "embedding bag": ALWAYS["embedding bag mean, padding None, last False"],
    "hardsigmoid": ALWAYS["hardsigmoid"],
    "weight norm": lambda x: torch._weight_norm(x, x[:, :1], 0),
    "mixed types": lambda x: F.layer_norm(x, (6,), W.float(), W.float()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NARROW)
def test_narrow_types_agree_within_rounding(name, dtype, monkeypatch):
    for global_name in ("W", "Y"):
        monkeypatch.setitem(globals(), global_name, globals()[global_name].to(dtype))
    x = data().to(dtype)
    try:
        value = NARROW[name](x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no {name} in {dtype}: {error}")
    with PlainFormulas(derivative_in_loss=True, forward_ad=True):
        found = NARROW[name](x)
    assert found.dtype == value.dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found, value, rtol=8 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_summed_in_float32(dtype):
    x = (50 + torch.randn(4, 300)).to(dtype)  # the mean itself would be off by a tenth of the deviation
    many = torch.arange(300) % 4
    for f in (
        lambda x: F.layer_norm(x, (300,)),
        lambda x: F.instance_norm(x[None]),
        lambda x: F.group_norm(x.T, 2),
        lambda x: F.embedding_bag(many, x, torch.tensor([0, 4]), mode="sum"),
    ):
        with PlainFormulas(derivative_in_loss=True, forward_ad=True):
            found = f(x)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found, f(x.double()).to(dtype), rtol=2 * rounding, atol=2 * rounding)


def jvp_by_duals(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


DERIVATIVES = {
    "autograd.grad": lambda f, x: torch.autograd.grad(f(x.requires_grad_()), x),
    "backward": lambda f, x: f(x.requires_grad_()).backward(),
    "autograd.backward": lambda f, x: torch.autograd.backward(f(x.requires_grad_())),
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "func.vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "forward_ad": jvp_by_duals,
    "functional.jacobian": torch.autograd.functional.jacobian,
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos()),
    "functional.vhp": lambda f, x: torch.autograd.functional.vhp(f, x, x.cos()),
    "functional.hessian": torch.autograd.functional.hessian,
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda row: f(row[None])))(x),
}


@pytest.mark.parametrize("options", [{}, {"derivative_in_loss": True, "forward_ad": True}])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_is_noticed_and_its_value_is_torchs(name, options):
    def f(x):
        z = F.layer_norm(x, (6,), W)
        return F.mse_loss(F.silu(z), torch.cdist(z, Y).sum(1, keepdim=True).expand_as(z)) + F.hardtanh(z).sum()

    def with_distances_of_torch(x):
        z = F.layer_norm(x, (6,), W)
        distances = (z[:, None] - Y).square().sum(-1).sqrt()
        return F.mse_loss(F.silu(z), distances.sum(1, keepdim=True).expand_as(z)) + F.hardtanh(z).sum()

    with PlainFormulas(**options) as formulas:
        f(data())
        assert not formulas.took_derivative
        x = data()
        found = DERIVATIVES[name](f, x)
        found = x.grad if found is None else found
        assert formulas.took_derivative
    x = data()
    value = DERIVATIVES[name](with_distances_of_torch, x)
    torch.testing.assert_close(found, x.grad if value is None else value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False])
def test_a_checkpoint_is_computed_again_by_the_same_formulas(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.LayerNorm(4), ForcesFlash(), nn.Hardsigmoid()
            )

        def forward(self, x, save):
            return self.inner(x) if save else checkpoint(self.inner, x, use_reentrant=reentrant)

    module, x = Net(), torch.randn(2, 3, 3)
    found, truth = (
        module_hessian(module, lambda save=save: module(x, save).square().sum(), derivative_in_loss=True)
        for save in (False, True)
    )
    assert_same_matrix(found, truth, 1e-13)
    direct = truth_for_module(module, lambda: module(x, True).square().sum())
    assert_same_matrix(found, direct, 1e-6)


@pytest.mark.slow
def test_a_compiled_module_is_seen_where_it_runs_eagerly():
    inner = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Hardsigmoid())
    compiled, x = torch.compile(inner, backend="eager"), torch.randn(5, 3)
    compiled(x)
    with torch.compiler.set_stance("force_eager"):
        found = module_hessian(inner, lambda: compiled(x).square().sum())
    assert_same_matrix(found, module_hessian(inner, lambda: inner(x).square().sum()), 1e-13)


def test_a_distance_given_to_a_loss_is_seen():
    def f(x):
        return F.triplet_margin_with_distance_loss(
            x, Y, Y.flip(0), distance_function=lambda a, b: torch.cdist(a, b).diagonal(), margin=9.0, reduction="none"
        )

    assert_value_and_gradient_are_torchs(f, data())
    assert_same_matrix(hessian(f, data()), jacobian_by_differences(lambda x: gradient(f, x), data()), 1e-6)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="new in torch 2.13")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_in_chunks_has_the_curvature_of_the_whole(reduction):
    loss = F.linear_cross_entropy

    def chunks(x):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
        return loss(Y, x, LABELS.clamp(max=3), weight=W[2:].abs(), reduction=reduction, options=options).view(-1)

    def whole(x):
        return F.cross_entropy(Y @ x.T, LABELS.clamp(max=3), weight=W[2:].abs(), reduction=reduction).view(-1)

    assert_value_and_gradient_are_torchs(chunks, data())
    assert_same_matrix(hessian(chunks, data()), hessian(whole, data()), 1e-12)


@pytest.mark.parametrize("activation", [F.silu, F.mish, F.hardsigmoid])
def test_an_activation_in_place_changes_its_input(activation):
    x = data()
    changed = x.clone()
    with PlainFormulas(forward_ad=True):
        assert activation(changed, inplace=True) is changed
    torch.testing.assert_close(changed, activation(x), **ROUNDING)


def test_modes_may_be_nested():
    f = lambda x: F.layer_norm(torch.cdist(x, Y), (4,)).view(-1)  # noqa: E731
    truth = hessian(squared_force(f), data(), derivative_in_loss=True)
    with PlainFormulas() as outer:
        assert_same_matrix(hessian(squared_force(f), data(), derivative_in_loss=True), truth, 1e-13)
    with PlainFormulas(derivative_in_loss=True):
        assert_same_matrix(hessian(squared_force(f), data()), truth, 1e-13)
    assert not outer.took_derivative  # the inner one handled them


def test_norms_and_smooth_operations_are_torchs_unless_asked_for():
    x = data().requires_grad_()
    with PlainFormulas():
        assert F.layer_norm(x, (6,)).grad_fn.name() == "NativeLayerNormBackward0"
        assert F.silu(x).grad_fn.name() == "SiluBackward0"
    assert torch.cdist(x, x).grad_fn.name() == "CdistBackward0"  # outside


def test_warnings_and_errors_are_torchs():
    with PlainFormulas(derivative_in_loss=True, forward_ad=True):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.randn(1, 3), None, None, training=True)
        with pytest.warns(UserWarning, match="target size"):
            F.mse_loss(data(), Y[:1])
        with pytest.raises(NotImplementedError, match="per_sample_weights"):
            F.embedding_bag(BAGS, Y, OFFSETS, per_sample_weights=torch.ones(7))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.mse_loss(data(), Y)
