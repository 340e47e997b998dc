"""Rows of `nn.MultiheadAttention` are the gradients of one example alone, by autograd."""

import itertools

import pytest
import torch
from dense_rows import (
    DenseRows,
    assert_exact,
    error,
    gradients,
    losses_of,
    rows_by_autograd,
    rows_by_hooks,
    sum_error,
    trained,
)
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sketch.per_example.hooks import ExampleHooks

B, T, S, E = 3, 4, 5, 8
PLAIN = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    assert torch.nn.functional.linear is PLAIN


def attention(**options):
    layer = nn.MultiheadAttention(E, 2, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def sequences(length=T, width=E):
    return torch.randn(B, length, width, dtype=torch.float64)


def called(layer, **options):
    """Return the attention as a function of tensors with the examples first, whatever its `batch_first`."""

    def run(*inputs):
        inputs = inputs * 3 if len(inputs) == 1 else inputs
        if layer.batch_first:
            return layer(*inputs, **options)[0]
        return layer(*(x.transpose(0, 1) for x in inputs), **options)[0].transpose(0, 1)

    return run


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "sdpa"])
@pytest.mark.parametrize("first", [True, False], ids=["batch_first", "tokens_first"])
def test_attention_to_itself(first, weights, mode):
    layer = attention(batch_first=first).train(mode)
    hooks = assert_exact(layer, called(layer, need_weights=weights), sequences())
    assert hooks.supported == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize("first", [True, False], ids=["batch_first", "tokens_first"])
def test_attention_to_another_sequence_multiplies_by_slices(first):
    layer = attention(batch_first=first)
    memory = sequences(S)
    assert_exact(layer, called(layer), sequences(), memory, memory)
    assert_exact(layer, lambda x, y: called(layer)(x, y, y), sequences(), sequences(S))
    assert_exact(layer, called(layer), sequences(), sequences(S), sequences(S))


def test_slices_of_a_matrix_in_another_order_of_memory():
    layer = attention(batch_first=True)
    layer.in_proj_weight.data = layer.in_proj_weight.data.t().contiguous().t()
    memory = sequences(S)
    assert_exact(layer, called(layer), sequences(), memory, memory)


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_widths(bias):
    layer = attention(kdim=6, vdim=7, batch_first=True, bias=bias)
    assert_exact(layer, called(layer), sequences(), sequences(S, 6), sequences(S, 7))


@pytest.mark.parametrize(
    "frozen", list(itertools.combinations(["in_proj_weight", "in_proj_bias", "out_proj.weight"], 2))
)
def test_parts_of_it_frozen(frozen):
    layer = attention(batch_first=True)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    assert_exact(layer, called(layer), sequences())


def same_forward(module, run, x):
    """Return the rows of hooks and of losses of one forward pass, for modules that draw random numbers."""
    hooks = ExampleHooks(module, trained(module))
    accumulator = DenseRows(trained(module), len(x))
    with hooks.recording(accumulator, len(x)):
        losses = losses_of(run(x))
        truth = [gradients(loss, module, retain_graph=True) for loss in losses]
        hooks.before_backward(losses.sum())
        losses.sum().backward()
    assert hooks.reasons == {}
    return accumulator.rows, {n: torch.stack(g) for n, g in zip(trained(module), zip(*truth, strict=True), strict=True)}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_against_losses_of_the_same_forward(dropout, norm_first):
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    assert error(*same_forward(net, net, sequences())) < 1e-12
    if not dropout:
        assert_exact(net.eval(), net, sequences())


def test_a_whole_transformer_with_a_mask():
    net = nn.Transformer(E, 2, 1, 1, 16, dropout=0.0, batch_first=True).double()
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    assert_exact(net, lambda x, y: net(x, y, tgt_mask=mask), sequences(S), sequences())


def test_other_numbers_of_sequences_are_named():
    layer = attention(batch_first=True)
    rows, hooks = rows_by_hooks(layer, lambda x: layer(*[torch.cat([x, x])] * 3)[0], sequences())
    assert set(hooks.reasons) == set(rows)
    assert "6 sequences, not 3" in hooks.reasons["out_proj.weight"]


def test_extra_keys_are_named():
    """These are repeated for each example along the second axis."""
    layer = attention(batch_first=True, add_bias_kv=True)
    x = sequences()
    rows, hooks = rows_by_hooks(layer, called(layer), x)
    assert hooks.reasons.keys() == {"bias_k", "bias_v"}
    assert "without an axis of the 3 examples in front" in hooks.reasons["bias_k"]
    truth = rows_by_autograd(layer, called(layer), x)
    assert hooks.supported == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert error({n: rows[n] for n in hooks.supported}, {n: truth[n] for n in hooks.supported}) < 1e-12


def test_a_parametrized_attention_is_named():
    layer = parametrizations.weight_norm(attention(batch_first=True), "in_proj_weight")
    rows, hooks = rows_by_hooks(layer, called(layer), sequences())
    assert set(hooks.reasons) | hooks.supported == set(rows)
    assert hooks.reasons.keys() >= {"out_proj.weight", "parametrizations.in_proj_weight.original1"}


def test_linear_is_wrapped_only_inside_and_put_back_after_an_error():
    layer = attention()
    inside = []

    class Watching(nn.Module):
        def forward(self, x):
            inside.append(torch.nn.functional.linear)
            return x

    net = nn.Sequential(Watching())
    net.attention = layer
    hooks = ExampleHooks(net, trained(net))
    with hooks.recording(DenseRows(trained(net), B), B):
        net[0](torch.zeros(1))
        with pytest.raises(AssertionError):
            layer(*[torch.zeros(T, B, E + 1, dtype=torch.float64)] * 3)
        assert torch.nn.functional.linear is PLAIN
        with torch.no_grad():
            layer(*[sequences().transpose(0, 1)] * 3)
        assert torch.nn.functional.linear is PLAIN
    assert inside == [PLAIN]


def test_an_interrupt_inside_leaves_it_wrapped_until_detach(monkeypatch):
    """Torch calls no hooks for what is no `Exception`."""
    layer = attention()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", interrupted)
    hooks = ExampleHooks(layer, trained(layer))
    hooks.attach(DenseRows(trained(layer), B), B)
    with pytest.raises(KeyboardInterrupt):
        layer(*[sequences().transpose(0, 1)] * 3)
    hooks.detach()
    assert torch.nn.functional.linear is PLAIN


def test_two_sets_of_hooks_record_the_same():
    layer = attention(batch_first=True)
    x = sequences()
    accumulators = [DenseRows(trained(layer), B) for _ in range(2)]
    first, second = ExampleHooks(layer, trained(layer)), ExampleHooks(layer, trained(layer))
    with first.recording(accumulators[0], B), second.recording(accumulators[1], B):
        loss = losses_of(layer(x, x, x)[0]).sum()
        assert torch.nn.functional.linear is PLAIN
        first.before_backward(loss)
        second.before_backward(loss)
        loss.backward()
    assert sum_error(accumulators[0].rows, layer) < 1e-12
    assert all(torch.equal(accumulators[0].rows[n], accumulators[1].rows[n]) for n in trained(layer))
