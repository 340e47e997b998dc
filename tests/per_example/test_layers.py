"""Each layer's rows are the gradients of one example alone, by autograd."""

import copy

import pytest
import torch
from dense_rows import DenseRows, assert_exact, error, losses_of, rows_by_autograd, rows_by_hooks, sum_error, trained
from marks import pairs, some
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_sketch.per_example.factors import Dense, LowRank, Unsupported
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.rules import normalization as norms
from lightning_sketch.per_example.rules import registry
from lightning_sketch.per_example.rules.normalization import couples
from lightning_sketch.per_example.rules.registry import register_layer, rule_of

B = 6
DTYPES = pytest.mark.parametrize(
    "dtype", some([torch.float64, torch.float32], default=[torch.float64]), ids=["float64", "float32"]
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomized(module, dtype=torch.float64):
    """Draw all parameters: normalizations start at weight one, where a forgotten factor would not be seen."""
    module = module.to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def images(*size, dtype=torch.float64):
    return torch.randn(B, *size, dtype=dtype)


LINEAR = {
    "matrix": (nn.Linear(3, 4), (3,)),
    "sequence": (nn.Linear(3, 4), (5, 3)),
    "four_axes": (nn.Linear(3, 4), (2, 5, 3)),
    "no_bias": (nn.Linear(3, 4, bias=False), (5, 3)),
    "one_number": (nn.Linear(1, 1), (1,)),
}


@DTYPES
@pytest.mark.parametrize(("layer", "size"), LINEAR.values(), ids=LINEAR)
def test_linear(layer, size, dtype):
    assert_exact(randomized(layer, dtype), layer, images(*size, dtype=dtype))


def test_linear_on_an_input_that_is_not_contiguous_counts_its_bias_once():
    """There `linear` is a product and a sum, and the sum alone would be the use of a bare parameter."""
    layer = randomized(nn.Linear(3, 4))
    assert_exact(layer, lambda x: layer(x.transpose(1, 2)), images(3, 5))


def test_the_input_may_come_by_name():
    layer = randomized(nn.Linear(3, 4))
    assert_exact(layer, lambda x: layer(input=x), images(3))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3), (2, 9)),
    "2d": (nn.Conv2d(2, 3, (3, 2)), (2, 7, 6)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 4, 5, 3)),
    "stride": (nn.Conv2d(2, 3, 3, stride=(2, 3)), (2, 8, 9)),
    "padding": (nn.Conv2d(2, 3, 3, padding=(1, 2)), (2, 5, 6)),
    "dilation": (nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2, stride=2), (2, 8, 9)),
    "same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 7, 6)),
    "valid": (nn.Conv1d(2, 3, 3, padding="valid"), (2, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 7, 6)),
    "many_groups": (nn.Conv2d(20, 40, 3, groups=10), (20, 5, 6)),
    "depthwise": (nn.Conv1d(5, 10, 3, groups=5, padding=1), (5, 7)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 5, 6)),
    "circular": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 6)),
    "replicate": (nn.Conv3d(2, 3, 3, padding=(1, 0, 2), padding_mode="replicate"), (2, 4, 5, 6)),
    "no_bias": (nn.Conv2d(2, 3, 3, bias=False), (2, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@DTYPES
@pytest.mark.parametrize(("layer", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(layer, size, dtype):
    assert_exact(randomized(layer, dtype), layer, images(*size, dtype=dtype))


def test_convolution_of_images_in_other_orders_of_memory():
    layer = randomized(nn.Conv2d(2, 3, 3, stride=2))
    assert_exact(layer, layer, images(2, 7, 6).to(memory_format=torch.channels_last))
    assert_exact(layer, lambda x: layer(x.transpose(2, 3)[..., 1:]), images(2, 7, 8))


NORMS = {
    "layer": (nn.LayerNorm(4), (5, 4)),
    "layer_two_axes": (nn.LayerNorm((5, 4)), (3, 5, 4)),
    "layer_no_bias": (nn.LayerNorm(4, bias=False), (5, 4)),
    "layer_matrix": (nn.LayerNorm(4), (4,)),
    "rms": (nn.RMSNorm(4), (5, 4)),
    "rms_eps": (nn.RMSNorm((5, 4), eps=0.1), (5, 4)),
    "group": (nn.GroupNorm(2, 6), (6, 5, 3)),
    "group_no_places": (nn.GroupNorm(2, 6, eps=0.1), (6,)),
    "batch_1d": (nn.BatchNorm1d(4), (4,)),
    "batch_2d": (nn.BatchNorm2d(4, eps=0.1), (4, 5, 3)),
    "batch_3d": (nn.BatchNorm3d(2), (2, 3, 2, 3)),
}


@DTYPES
@pytest.mark.parametrize(("layer", "size"), NORMS.values(), ids=NORMS)
def test_normalization(layer, size, dtype):
    randomized(layer, dtype).eval()
    for name, statistics in layer.named_buffers():
        if name.startswith("running"):
            statistics.uniform_(0.5, 2)
    assert_exact(layer, layer, 2 * images(*size, dtype=dtype) + 1)


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_in_training_splits_its_own_parameters(tracked):
    """Against losses of the same forward: alone, an example has other statistics."""
    layer = randomized(nn.BatchNorm2d(3, track_running_stats=tracked))
    x = images(3, 4, 5)
    losses = losses_of(layer(x))
    for p, truth in zip(layer.parameters(), zip(*(both(loss, layer) for loss in losses), strict=True), strict=True):
        rows, _ = rows_by_hooks(layer, layer, x)
        name = "weight" if p is layer.weight else "bias"
        assert (rows[name] - torch.stack(truth)).norm() < 1e-12 * rows[name].norm()


def both(loss, layer):
    return torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)


def test_half_precision_is_widened_before_it_is_multiplied():
    """Rounding z to bfloat16 would cost 4e-3."""
    layer = nn.LayerNorm(16).to(torch.bfloat16)
    x = torch.randn(B, 3, 16, dtype=torch.bfloat16)
    gradient = torch.randint(-3, 4, x.shape).to(torch.bfloat16)
    z = nn.functional.layer_norm(x.double(), (16,))
    weight, _ = norms.layer_norm(layer, x, gradient)
    torch.testing.assert_close(weight.values.double(), (z * gradient).sum(1), rtol=1e-5, atol=1e-5)


def test_which_layers_couple_examples():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3).eval(), nn.LayerNorm(3), nn.SyncBatchNorm(3))
    assert couples(net) == ["0", "3"]
    assert couples(net.eval()) == []
    assert couples(nn.BatchNorm1d(3, track_running_stats=False).eval()) == [""]


EMBEDDINGS = {
    "plain": nn.Embedding(7, 3),
    "padding": nn.Embedding(7, 3, padding_idx=2),
    "sparse": nn.Embedding(7, 3, sparse=True),
}


@DTYPES
@pytest.mark.parametrize(("kind", "size"), pairs(EMBEDDINGS, [(), (5,), (2, 4)]))
def test_embedding(kind, size, dtype):
    """Few rows and many tokens, so that some occur more than once."""
    layer = EMBEDDINGS[kind]
    assert_exact(randomized(layer, dtype), layer, torch.randint(0, 7, (B, *size)))


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=["freq", "max_norm"])
def test_embedding_options_that_mix_examples_are_refused(options):
    layer = randomized(nn.Embedding(7, 3, **options))
    _, hooks = rows_by_hooks(layer, layer, torch.randint(0, 7, (B, 5)))
    assert next(iter(options)) in hooks.reasons["weight"]
    assert hooks.supported == set()


@pytest.mark.parametrize("padding", [None, 2])
def test_a_tied_output_layer_adds_to_the_embedding_padding_row_included(padding):
    net = nn.Sequential(nn.Embedding(7, 3, padding_idx=padding), nn.Tanh(), nn.Linear(3, 7, bias=False))
    net[2].weight = net[0].weight
    rows = assert_exact(randomized(net), net, torch.randint(0, 7, (B, 5)))
    assert rows.supported == {"0.weight"}


def test_a_layer_called_twice_adds_up():
    layer = randomized(nn.Linear(4, 4))
    assert_exact(layer, lambda x: layer(layer(x).tanh()), images(5, 4))


@pytest.mark.parametrize("size", [(4,), (5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_in_place_after_linear(size, bias):
    """With three axes and a bias, what `linear` returns is a view, whose history the activation replaces."""
    net = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.SiLU(inplace=True))
    assert_exact(randomized(net), net, images(*size))


def test_an_activation_in_place_after_other_layers():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(True), nn.GroupNorm(1, 3), nn.ReLU(True), nn.Conv2d(3, 2, 1))
    assert_exact(randomized(net), net, images(2, 5, 5))


PARTS = {
    "linear": (nn.Linear(3, 4), (5, 3)),
    "convolution": (nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "norm": (nn.LayerNorm(4), (5, 4)),
    "group_norm": (nn.GroupNorm(2, 4), (4, 5)),
}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(("layer", "size"), PARTS.values(), ids=PARTS)
def test_one_of_two_parameters_frozen(layer, size, frozen):
    layer = randomized(layer).requires_grad_(True)
    getattr(layer, frozen).requires_grad_(False)
    hooks = assert_exact(layer, layer, images(*size))
    assert hooks.supported == {"weight", "bias"} - {frozen}


def test_large_gradients_stay_products():
    layer = nn.Sequential(
        nn.Linear(3, 20), nn.Unflatten(1, (20, 1)), nn.Conv1d(20, 20, 1), nn.Conv1d(20, 20, 1, groups=2)
    )
    found = []
    hooks = ExampleHooks(layer, {n: p for n, p in trained(layer).items() if n.endswith("weight")})
    with hooks.recording(type("Kept", (), {"add": lambda self, factor: found.append(factor)})(), B):
        loss = losses_of(layer(torch.randn(B, 3))).sum()
        hooks.before_backward(loss)
        loss.backward()
    assert [type(factor) for factor in found] == [LowRank] * 4


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Plain(nn.Linear):
        pass

    assert rule_of(Doubled(2, 2)) is None
    assert rule_of(Plain(2, 2)) is rule_of(nn.Linear(2, 2)) is not None
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    assert rule_of(replaced) is None


def pruned(layer, name="weight"):
    return prune.random_unstructured(layer, name, 0.3)


WRAPS = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    pruned,
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("wrap", "layer"), pairs(WRAPS, [nn.Linear(4, 4), nn.Conv1d(12, 12, 1, groups=12), nn.LayerNorm((4, 4))])
)
def test_weights_made_from_others_are_named(wrap, layer):
    net = nn.Sequential(nn.Linear(4, 4), wrap(copy.deepcopy(layer))).double()
    x = images(4, 4) if isinstance(layer, nn.LayerNorm) else images(12, 4)
    rows, hooks = rows_by_hooks(net, net, x)
    assert hooks.supported >= {"0.weight", "0.bias"}
    made = {name for name in rows if name.startswith("1.") and name != "1.bias"}
    assert made <= hooks.reasons.keys()
    assert not made & hooks.supported


def test_a_further_parameter_of_a_subclass_is_supported_where_it_is_broadcast():
    layer = nn.Linear(3, 4)
    layer.factor = nn.Parameter(torch.ones(4))
    assert_exact(randomized(layer), lambda x: layer(x) * layer.factor, images(5, 3))


def test_one_axis_less_is_refused_even_if_the_number_fits():
    for layer, size in ((nn.Linear(B, B), (B,)), (nn.Conv1d(B, B, 3), (B, 5)), (nn.LayerNorm((B, 4)), (B, 4))):
        layer.double()
        x = torch.randn(*size, dtype=torch.float64)
        _, hooks = rows_by_hooks(layer, lambda x, layer=layer: layer(x)[None], x, examples=B)
        assert hooks.reasons.keys() == {"weight", "bias"}
        assert hooks.supported == set()


def test_another_first_axis_is_refused():
    layer = randomized(nn.Linear(3, 4))
    rows, hooks = rows_by_hooks(layer, lambda x: layer(x.transpose(0, 1)).transpose(0, 1), images(5, 3))
    assert "(5, 6, 3)" in hooks.reasons["weight"]
    assert "6 examples" in hooks.reasons["weight"]
    assert hooks.supported == set()
    assert not rows["weight"].any()


class Summed(nn.Linear):
    def forward(self, input):
        return super().forward(input).sum(0, keepdim=True)


class Spread(nn.Linear):
    def forward(self, input):
        return super().forward(input).expand(B, -1)


@pytest.mark.parametrize("kind", [Summed, Spread])
def test_the_first_axis_counts_before_and_after_a_layer(kind):
    register_layer(kind)(lambda module, input, gradient: pytest.fail("called"))
    layer = kind(3, 4)
    x = torch.randn(B if kind is Summed else 1, 3)
    _, hooks = rows_by_hooks(layer, layer, x, examples=B)
    assert hooks.reasons.keys() == {"weight", "bias"}


def test_a_wrong_axis_of_the_right_length_passes_the_sum():
    """Hooks cannot see it: with as many tokens as examples, rows are those of tokens. The row check finds it."""
    layer = randomized(nn.Linear(3, 4))
    x = images(B, 3)

    def run(x):
        return layer(x.transpose(0, 1)).transpose(0, 1)

    rows, _ = rows_by_hooks(layer, run, x)
    assert sum_error(rows, layer) < 1e-12
    assert error(rows, rows_by_autograd(layer, run, x)) > 0.5


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.factor.exp() * x


def test_a_users_layer():
    layer = randomized(Scale())
    _, hooks = rows_by_hooks(layer, layer, images(3))
    assert "Scale" in hooks.reasons["factor"]
    assert "register_layer" in hooks.reasons["factor"]

    @register_layer(Scale)
    def scale(module, input, gradient):
        if input.ndim > 2:
            raise Unsupported("matrices only")
        return [Dense(module.factor, module.factor.exp() * input * gradient)]

    assert_exact(layer, layer, images(3))
    _, hooks = rows_by_hooks(layer, layer, images(2, 3))
    assert hooks.reasons == {"factor": "matrices only"}


def test_only_a_class_of_modules_is_registered(untyped):
    with pytest.raises(TypeError, match=r"takes a class of modules, got Linear\(.*use @register_layer\(MyLayer\)"):
        register_layer(nn.Linear(2, 2))


def test_an_input_changed_in_place_after_the_layer_is_named():
    """Autograd keeps the padded copy and finds nothing wrong; the hooks kept the input."""
    layer = randomized(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"))

    def run(x):
        x = x * 1
        y = layer(x)
        x.mul_(2)
        return y

    _, hooks = rows_by_hooks(layer, run, images(2, 6))
    assert "changed in place" in hooks.reasons["weight"]


def test_a_rule_of_ones_own_replaces_a_built_in_one_also_of_attention(monkeypatch):
    """One registry: attention, whose products are recorded inside, is no exception."""
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    net, x = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), torch.randn(3, 5, 4)

    def supported():
        hooks = ExampleHooks(net, trained(net))
        with hooks.recording(DenseRows(trained(net), 3), 3):
            loss = net(x).square().sum()
            hooks.before_backward(loss)
            loss.backward()
        return hooks.supported

    assert supported() == set(trained(net))

    @register_layer(nn.MultiheadAttention)
    @register_layer(nn.LayerNorm)
    def split(module, input, gradient):
        raise Unsupported("it was asked")

    assert supported() == {name for name in trained(net) if name.startswith("linear")}


def test_rules_of_subclasses_with_their_forward_are_found():
    class Own(nn.MultiheadAttention):
        pass

    class Other(nn.MultiheadAttention):
        def forward(self, *args):
            return args

    assert rule_of(Own(4, 2)) is rule_of(nn.MultiheadAttention(4, 2))
    assert rule_of(Other(4, 2)) is None
