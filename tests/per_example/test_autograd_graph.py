"""Rows of bare parameters and of embeddings of positions are the gradients of one example alone."""

import pytest
import torch
from dense_rows import assert_exact, error, rows_by_autograd, rows_by_hooks, sum_error
from torch import nn
from torch.utils.checkpoint import checkpoint

B, T, E = 4, 5, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Bare(nn.Module):
    """A module with one parameter, and a function that uses it."""

    def __init__(self, shape, use):
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.use = use

    def forward(self, x):
        return self.use(self.p, x)


def tokens():
    return torch.randn(B, T, E, dtype=torch.float64)


USES = {
    "class_token": ((1, 1, E), lambda p, x: torch.cat([p.expand(len(x), -1, -1), x], 1)),
    "token_and_steps": ((1, 1, E), lambda p, x: p.expand(len(x), T, E) * x.sin()),
    "positions": ((1, T, E), lambda p, x: x + p),
    "positions_flat": ((T, E), lambda p, x: p + x),
    "bias": ((E,), lambda p, x: x + p),
    "scaled_sum": ((E,), lambda p, x: torch.add(x, p, alpha=3)),
    "difference": ((T, 1), lambda p, x: x - p),
    "scaled_difference": ((E,), lambda p, x: torch.sub(x, p, alpha=3)),
    "minus_what": ((E,), lambda p, x: p - x),
    "layer_scale": ((E,), lambda p, x: x * p),
    "layer_scale_first": ((T, 1), lambda p, x: p * x),
    "in_place_scale": ((E,), lambda p, x: x.clone().mul_(p)),
    "in_place_sum": ((E,), lambda p, x: x.clone().add_(p)),
    "scalar": ((), lambda p, x: x * p),
    "reshaped": ((T * E,), lambda p, x: x + p.view(T, E).unsqueeze(0)),
    "cast": ((E,), lambda p, x: x.float().double() * p.double().clone()),
    "used_twice": ((E,), lambda p, x: (x + p) * p),
    "repeated": ((1, 1, E), lambda p, x: torch.cat([p.repeat(len(x), 1, 1), x], 1)),
    "repeated_along_others": ((1, T, 1), lambda p, x: x.cos() * p.repeat(len(x), 1, E)),
    "repeated_vector": ((E,), lambda p, x: x.cos() * p.repeat(len(x), 2, 1)[:, 1:]),
    "first_positions": ((1, T + 2, E), lambda p, x: x + p[:, :T]),
    "last_positions": ((T + 2, E), lambda p, x: x + p[-T:]),
    "every_other": ((2 * T, E + 1), lambda p, x: x * p[::2, None, 1:].transpose(0, 1)),
    "one_of_a_stack": ((2, T, E), lambda p, x: x + p[1]),
    "both_of_a_stack": ((2, E), lambda p, x: x * p[0] + p[1]),
    "transposed": ((E, T), lambda p, x: x + p.T),
    "permuted": ((E, 1, T), lambda p, x: x * p.permute(1, 2, 0)),
    "both_factors": ((1, E), lambda p, x: (p[None] * x) * p),
}


@pytest.mark.parametrize(("shape", "use"), USES.values(), ids=USES)
def test_a_bare_parameter(shape, use):
    net = Bare(shape, use)
    hooks = assert_exact(net, net, tokens())
    assert hooks.supported == {"p"}


OTHER_USES = {
    "gathered": ((T + 2, E), lambda p, x: x + p[torch.arange(T)], "Index"),
    "repeated_whole": ((B, T, E), lambda p, x: x.repeat(2, 1, 1) + p.repeat(2, 1, 1), "without an axis"),
    "product": ((E, E), lambda p, x: x @ p, "Expand|View|Mm|Bmm|UnsafeView"),
    "function": ((E,), lambda p, x: x + p.exp(), "Exp"),
    "no_examples": ((E,), lambda p, x: x + p * 2, "without an axis of the 4 examples"),
    "examples_of_its_own": ((B, 1, 1), lambda p, x: x * p[: len(x)] if len(x) < B else x * p, "without an axis of the"),
}


@pytest.mark.parametrize(("shape", "use", "words"), OTHER_USES.values(), ids=OTHER_USES)
def test_other_uses_are_named(shape, use, words):
    net = Bare(shape, use)
    rows, hooks = rows_by_hooks(net, net, tokens())
    assert any(word in hooks.reasons["p"] for word in words.split("|")), hooks.reasons
    assert hooks.supported == set()
    assert not rows["p"].any()


def test_one_example_alone_is_the_whole_gradient_whatever_its_axes():
    net = Bare((T, E), lambda p, x: x + p * 2)
    _, hooks = rows_by_hooks(net, net, tokens()[:1])
    assert hooks.reasons == {}
    assert sum_error(rows_by_hooks(net.zero_grad() or net, net, tokens()[:1])[0], net) < 1e-12


class Positions(nn.Module):
    """Embeddings of words and of positions, (1, T) as in GPT-2 or (T,) as in nanoGPT."""

    def __init__(self, axes, length=T + 2):
        super().__init__()
        self.axes = axes
        self.words, self.places = nn.Embedding(9, E), nn.Embedding(length, E)
        self.double()

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        return self.words(ids) + self.places(places[None] if self.axes == 2 else places)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("examples", [B, 1])
def test_embeddings_of_positions(axes, examples):
    net = Positions(axes)
    assert_exact(net, net, torch.randint(0, 9, (examples, T)))


def test_positions_repeated_for_each_example_are_an_ordinary_embedding():
    net = nn.Embedding(T, E).double()
    assert_exact(net, lambda x: net(torch.arange(T).expand(len(x), T)) * x, tokens())


def test_positions_without_axis_and_as_many_as_examples_pass_the_sum():
    """Hooks cannot see it: (T,) with T = B is taken for one token of each example. The row check finds it."""
    net = Positions(1)
    ids = torch.randint(0, 9, (B, B))
    rows, hooks = rows_by_hooks(net, net, ids)
    truth = rows_by_autograd(net, net, ids)
    assert hooks.reasons == {}
    assert sum_error(rows, net) < 1e-12
    assert error({"w": rows["words.weight"]}, {"w": truth["words.weight"]}) < 1e-12
    assert error(rows, truth) > 0.5


def test_a_parameter_of_a_layer_used_past_it_is_not_counted_again():
    """The layer's own hook covers it; how its product is computed is no other use."""
    layer = nn.Linear(E, E).double()
    assert_exact(layer, lambda x: layer(x.transpose(1, 2).contiguous().transpose(1, 2)), tokens())


def test_a_layer_whose_parameters_are_used_past_it_is_supported_or_named():
    layer = nn.Linear(E, E).double()
    rows, hooks = rows_by_hooks(layer, lambda x: x @ layer.weight + layer.bias, tokens())
    assert hooks.supported == {"bias"}
    assert hooks.reasons.keys() == {"weight"}
    assert "Linear has a rule, but it is used by" in hooks.reasons["weight"]
    assert (rows["bias"].sum(0) - layer.bias.grad).norm() < 1e-12 * layer.bias.grad.norm()


def test_recurrent_layers_are_named():
    net = nn.LSTM(E, 2, batch_first=True).double()
    rows, hooks = rows_by_hooks(net, lambda x: net(x)[0], tokens())
    assert hooks.reasons.keys() == set(rows)
    assert all(
        "LSTM has no rule (lightning_sketch.per_example.register_layer adds one)" in reason
        for reason in hooks.reasons.values()
    )


def test_an_unused_parameter_is_no_reason():
    net = Bare((E,), lambda p, x: x * 1)
    net.layer = nn.Linear(E, E).double()
    _, hooks = rows_by_hooks(net, lambda x: net.layer(x), tokens())
    assert hooks.reasons == {}
    assert hooks.supported == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_sums_inside_checkpoints(reentrant):
    net = Bare((E,), lambda p, x: checkpoint(lambda x: (x + p).sin(), x, use_reentrant=reentrant))
    x = tokens().requires_grad_()
    rows, hooks = rows_by_hooks(net, lambda x: net(x * 1), x)
    if reentrant:
        assert "reentrant checkpointing" in hooks.reasons["p"]
        assert hooks.supported == set()
    else:
        assert hooks.reasons == {}
        assert sum_error(rows, net) < 1e-12


def test_factors_inside_checkpoints_are_named_and_training_goes_on():
    """What was computed again can be read only once, by autograd."""
    net = Bare((E,), lambda p, x: checkpoint(lambda x: x.sin() * p, x, use_reentrant=False))
    x = tokens().requires_grad_()
    _, hooks = rows_by_hooks(net, net, x)
    assert "inside activation checkpointing" in hooks.reasons["p"]
    assert net.p.grad.any()


def test_factors_saved_elsewhere_are_named():
    net = Bare((E,), lambda p, x: x * p)
    with torch.autograd.graph.save_on_cpu():
        _, hooks = rows_by_hooks(net, net, tokens())
    assert hooks.supported == set()
    assert "checkpointing" in hooks.reasons["p"]


def test_a_graph_with_many_paths_is_walked_once():
    """2^60 paths lead through it."""

    def use(p, x):
        y = x + p
        for _ in range(60):
            y = y + y
        return y / 2**60

    net = Bare((E,), use)
    assert_exact(net, net, tokens())
