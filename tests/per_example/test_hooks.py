"""Hooks act in the batch's own forward and backward only, leave nothing behind, and change nothing."""

import gc
import weakref

import pytest
import torch
from dense_rows import DenseRows, assert_exact, error, losses_of, rows_by_autograd, rows_by_hooks, sum_error, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.curvature import Hessian
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.rules import linear, registry

B = 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def batch(examples=B):
    return torch.randn(examples, 3, dtype=torch.float64)


def table_sizes(module):
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]


def test_the_last_smaller_batch():
    net = network()
    hooks = ExampleHooks(net, trained(net))
    for examples in (B, B, 2, 1):
        x = batch(examples)
        net.zero_grad()
        rows, _ = rows_by_hooks(net, net, x, hooks=hooks)
        assert error(rows, rows_by_autograd(net, net, x)) < 1e-12


def test_frozen_and_other_parameters_get_no_factors():
    net = network()
    net[3].weight.requires_grad_(False)
    chosen = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    hooks = ExampleHooks(net, chosen)
    accumulator = DenseRows(chosen, B)
    with hooks.recording(accumulator, B):
        loss = losses_of(net(batch())).sum()
        hooks.before_backward(loss)
        loss.backward()
    assert hooks.supported == {"0.weight", "2.weight"}
    assert {id(factor.parameter) for factor in accumulator.factors} == {id(net[0].weight), id(net[2].weight)}


def test_inputs_of_frozen_layers_are_not_kept(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).requires_grad_(False)
    net[2].bias.requires_grad_()
    given = []

    def factors(module, input, gradient):
        given.append(input)
        return linear.linear(module, input, gradient)

    monkeypatch.setitem(registry.RULES, nn.Linear, registry.Rule(factors))
    rows_by_hooks(net, net, torch.randn(B, 3))
    (input,) = given
    assert input.is_meta
    assert input.shape == (B, 3)


def test_a_measurement_of_the_module_in_between_gives_nothing_and_changes_nothing():
    """As a measurement of curvature between the start of a batch and its backward."""
    encoder = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True).double()
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), encoder, nn.Linear(4, 2)).double()
    x = batch()
    rows, _ = rows_by_hooks(net, net, x)
    hooks = ExampleHooks(net, trained(net))
    accumulator = DenseRows(trained(net), B)

    def measure():
        with preserve_state(net):
            losses_of(net(batch())).sum().backward(inputs=[torch.zeros(1, requires_grad=True)], retain_graph=True)
        Hessian(lambda module, x: losses_of(module(x)).mean(), net, [batch()]).matvec(
            torch.ones(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
        )

    with hooks.recording(accumulator, B):
        measure()
        loss = losses_of(net(x)).sum()
        measure()
        hooks.before_backward(loss)
        measure()
        loss.backward()
        measure()
    assert all(torch.equal(accumulator.rows[name], rows[name]) for name in rows)


def test_hooks_made_within_a_measurement_act_there():
    net = network()
    x = batch()
    with preserve_state(net):
        inner, _ = rows_by_hooks(net, net, x)
    assert error(inner, rows_by_autograd(net, net, x)) < 1e-12


def test_gradients_before_the_backward_pass_to_record_give_nothing():
    """As a penalty on the gradient, taken in the training step."""
    net = network()
    x = batch().requires_grad_()
    hooks = ExampleHooks(net, trained(net))
    accumulator = DenseRows(trained(net), B)
    with hooks.recording(accumulator, B):
        loss = losses_of(net(x)).sum()
        torch.autograd.grad(loss, x, create_graph=True)
        assert accumulator.factors == []
        hooks.before_backward(loss)
        loss.backward()
    assert sum_error(accumulator.rows, net) < 1e-12


def test_forwards_without_a_graph_give_nothing():
    net = network()
    hooks = ExampleHooks(net, trained(net))
    with hooks.recording(DenseRows(trained(net), B), B):
        with torch.no_grad():
            net(batch(2))
        with torch.inference_mode():
            net(batch(2))
        assert hooks.reasons == {}


def test_a_second_backward_through_a_layer_is_named():
    net = network()
    hooks = ExampleHooks(net, trained(net))
    with hooks.recording(DenseRows(trained(net), B), B):
        loss = losses_of(net(batch())).sum()
        hooks.before_backward(loss)
        loss.backward(retain_graph=True)
        loss.backward()
    assert set(hooks.reasons) == set(trained(net))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_stays_behind(error):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.scale = nn.Parameter(torch.ones(4))
            self.places = nn.Embedding(7, 4)

        def forward(self, x):
            x = x * self.scale + self.places(torch.arange(7))
            return self.attention(x, x, x)[0]

    net = Net()
    hooks = ExampleHooks(net, trained(net))
    accumulator = DenseRows(trained(net), B)
    watched = []
    try:
        with hooks.recording(accumulator, B):
            x = torch.randn(B, 7, 4)
            output = net(x)
            loss = losses_of(output).sum()
            watched += [weakref.ref(output), weakref.ref(loss), weakref.ref(accumulator)]
            hooks.before_backward(loss)
            if error:
                raise error
            loss.backward()
    except KeyboardInterrupt:
        pass
    del accumulator, output, x
    hooks.detach()
    gc.collect()
    assert table_sizes(net) == [0] * len(table_sizes(net))
    del loss
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
    assert all(not p._backward_hooks for p in net.parameters())


def test_a_pass_without_a_backward_leaves_no_graph():
    net = nn.Embedding(7, 4)
    hooks = ExampleHooks(net, trained(net))
    hooks.attach(DenseRows(trained(net), B), B)
    nodes = weakref.WeakSet()
    output = net(torch.arange(7))

    class Kept:
        pass

    kept = Kept()
    nodes.add(kept)
    output.grad_fn.metadata["kept"] = kept
    hooks.detach()
    del output, kept
    gc.collect()
    assert len(nodes) == 0


def test_after_detach_a_backward_gives_nothing():
    net = network()
    hooks = ExampleHooks(net, trained(net))
    accumulator = DenseRows(trained(net), B)
    with hooks.recording(accumulator, B):
        loss = losses_of(net(batch())).sum()
        hooks.before_backward(loss)
    loss.backward()
    assert accumulator.factors == []


def test_attaching_again_forgets_the_batch_before():
    """A step may return no loss; then detach is not called."""
    net = network()
    hooks = ExampleHooks(net, trained(net))
    hooks.attach(DenseRows(trained(net), 2), 2)
    net(batch(2))
    rows, _ = rows_by_hooks(net, net, batch(), hooks=hooks)
    assert sum_error(rows, net) < 1e-12
    assert sum(table_sizes(net)) == 0


def test_before_backward_without_attach_is_an_error():
    net = network()
    with pytest.raises(RuntimeError, match="outside of a pass; call attach before the forward"):
        ExampleHooks(net, trained(net)).before_backward(torch.zeros(1))


@pytest.mark.parametrize("how", ["whole", "part", "in_place"])
def test_compiled_modules_are_refused(how):
    net = network()
    compiled = torch.compile(net, backend="eager") if how == "whole" else net
    hooks = None if how == "whole" else ExampleHooks(net, trained(net))
    if how == "part":
        net[0] = torch.compile(net[0], backend="eager")
    elif how == "in_place":
        net[2].compile(backend="eager")
    with pytest.raises(ValueError, match=r"is compiled, .* train without torch\.compile"):
        ExampleHooks(compiled, trained(compiled))
    if hooks:
        with pytest.raises(ValueError, match="is compiled"):
            hooks.attach(DenseRows(trained(net), B), B)


def test_a_wrong_axis_inside_reentrant_checkpoints_is_named_as_elsewhere():
    net = nn.Linear(3, 3)
    x = torch.randn(B, 6, 3, requires_grad=True)
    _, hooks = rows_by_hooks(net, lambda x: checkpoint(lambda x: net(x.transpose(0, 1)), x, use_reentrant=True), x)
    assert all("where the first axis is not that of" in reason for reason in hooks.reasons.values())
    assert hooks.reasons.keys() == {"weight", "bias"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activation_checkpointing(reentrant, dtype):
    net = nn.Sequential(
        nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.ReLU(True), nn.Linear(4, 3)
    ).to(dtype)
    x = torch.randn(B, 6, 3, dtype=dtype)

    def run(x):
        return checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)

    rows, hooks = rows_by_hooks(net, run, x)
    limit = 1e-12 if dtype == torch.float64 else 5e-6
    assert hooks.reasons == {}
    assert hooks.supported == set(rows)
    assert sum_error(rows, net) < limit
    assert error(rows, rows_by_autograd(net, net, x)) < limit


def test_bfloat16_autocast_is_near_the_autocast_gradient_of_each_example():
    """Factors are multiplied in float32; bfloat16 keeps 8 bits, 4e-3, in each of some products."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(8, 16), layer, nn.LayerNorm(16), nn.Linear(16, 8))

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    x = torch.randn(B, 10, 8)
    rows, hooks = rows_by_hooks(net, run, x)
    truth = rows_by_autograd(net, run, x)
    assert hooks.reasons == {}
    # a gradient that is rounding alone, as that of the keys' bias, has no relative error of its own
    whole, exact = torch.cat(list(rows.values()), 1), torch.cat(list(truth.values()), 1)
    for name in truth:
        difference = (rows[name] - truth[name]).norm()
        assert difference < 2e-2 * max(truth[name].norm(), 0.02 * exact.norm()), name
    assert torch.cosine_similarity(whole, exact).min() > 0.9999
    assert {tensor.dtype for tensor in _tensors(net, run, x)} == {torch.float32}


def _tensors(net, run, x):
    hooks, accumulator = ExampleHooks(net, trained(net)), DenseRows(trained(net), len(x))
    with hooks.recording(accumulator, len(x)):
        loss = losses_of(run(x)).sum()
        hooks.before_backward(loss)
        loss.backward()
    for factor in accumulator.factors:
        yield from (value for value in vars(factor).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_half_precision_give_float32(dtype):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.RMSNorm(4)).to(dtype)
    found = {t.dtype for t in _tensors(net, net, torch.randn(B, 3, dtype=dtype)) if not isinstance(t, nn.Parameter)}
    assert found == {torch.float32}


class Everything(nn.Module):
    """A network with what hooks could disturb: dropout, batch statistics, activations in place, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.2))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Embedding(17, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places(torch.arange(17))
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_training_is_bit_identical():
    """With a Hessian product between the start of the batch and the step, and a measurement's forward after it."""
    finals = []
    for hooked in (False, True):
        torch.manual_seed(1)
        net = Everything()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        hooks = ExampleHooks(net, trained(net))
        for _ in range(4):
            x = torch.randn(B, 1, 4, 4)
            accumulator = DenseRows(trained(net), B)
            if hooked:
                hooks.attach(accumulator, B)
            losses = losses_of(net(x))
            optimizer.zero_grad()
            if hooked:
                Hessian(lambda module, x: losses_of(module(x)).mean(), net, [x]).matvec(
                    torch.ones(sum(p.numel() for p in net.parameters()))
                )
                hooks.before_backward(losses.mean())
                loss = losses.mean()
                hooks.before_backward(loss)
                loss.backward()
                hooks.detach()
                assert hooks.reasons == {}
                assert hooks.supported == set(trained(net))
            else:
                losses.mean().backward()
            optimizer.step()
        finals.append([*(p.detach() for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_one_network_of_everything_in_evaluation_mode():
    net = Everything().double().eval()
    assert_exact(net, net, torch.randn(B, 1, 4, 4, dtype=torch.float64))


def test_doubled_hooks_on_one_graph_count_once():
    """Manual optimization may announce two losses of one graph; each use is recorded once a backward pass."""
    net = nn.Module()
    net.p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    hooks = ExampleHooks(net, trained(net))
    accumulator = DenseRows(trained(net), B)
    with hooks.recording(accumulator, B):
        y = batch() + net.p
        first, second = losses_of(y).sum(), losses_of(2 * y).sum()
        hooks.before_backward(first)
        first.backward(retain_graph=True)
        hooks.before_backward(second)
        second.backward()
    assert sum_error(accumulator.rows, net) < 1e-12


class Branched(nn.Module):
    """Layers in a row and side by side, in place, inside checkpointing, shared, unused; a parameter without a layer."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4), nn.Parameter(torch.randn(3, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True)
        self.twice, self.recomputed, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.beside, self.discarded, self.unused = nn.Linear(3, 7), nn.Linear(4, 4), nn.Linear(2, 2)
        self.head.weight = self.table.weight

    def forward(self, index):
        x = self.encoder(self.table(index) + self.places)
        x = self.twice(self.twice(x).relu_())
        x = x + checkpoint(self.recomputed, x, use_reentrant=False)
        self.discarded(x)
        return self.head(x).sum(1) + self.beside(index.double())


def rows_of_a_pass(module, index, run):
    """Return the rows of each parameter, the hooks, and what `run` returns after the forward pass."""
    hooks, accumulator = ExampleHooks(module, trained(module)), DenseRows(trained(module), len(index))
    with hooks.recording(accumulator, len(index)):
        found = run(hooks, losses_of(module(index)).sum())
    return accumulator.rows, hooks, found


def test_a_pass_for_the_hooks_alone_gives_the_same_rows_without_gradients_of_matrices():
    """Equal up to rounding, as kernels that give fewer results may sum in another order."""

    def whole(hooks, loss):
        hooks.before_backward(loss)
        found = torch.autograd.grad(loss, list(trained(module).values()), allow_unused=True)
        return [name for name, gradient in zip(trained(module), found, strict=True) if gradient is not None]

    module, index = Branched().double(), torch.randint(0, 7, (B, 3))
    true, before, used = rows_of_a_pass(module, index, whole)
    computed = []
    for name, parameter in trained(module).items():
        parameter.register_hook(lambda gradient, name=name: computed.append(name))
    rows, hooks, found = rows_of_a_pass(module, index, lambda hooks, loss: hooks.run_backward(loss))
    assert computed == ["places"]
    assert found == used == [name for name in trained(module) if not name.startswith(("discarded", "unused"))]
    assert (hooks.supported, hooks.reasons) == (before.supported, before.reasons) == (set(used), {})
    assert error(rows, true) < 1e-12


def test_a_use_of_a_parameter_whose_layer_leads_nowhere_is_noticed():
    """As where a later batch takes another way: the layer's hook gives nothing, but the parameter has a gradient."""

    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            self.last(x)
            return x @ self.last.weight

    module = Past().double()
    _, hooks, found = rows_of_a_pass(module, batch(), lambda hooks, loss: hooks.run_backward(loss))
    assert found == ["first.weight", "first.bias", "last.weight"]
    assert hooks.supported == {"first.weight", "first.bias"}


def test_a_layer_whose_output_gets_no_gradient_gives_no_factor():
    """PyTorch calls hooks with None where a function's backward returns None."""

    class Stopped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x + y

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    net = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).double()

    def run(x):
        return Stopped.apply(net[0](x), net[1](x))

    x = batch()
    net.zero_grad()
    rows, hooks = rows_by_hooks(net, run, x)
    assert hooks.supported == {"0.weight", "0.bias"}
    assert error(rows, rows_by_autograd(net, run, x)) < 1e-12
