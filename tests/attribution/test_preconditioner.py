"""Preconditioners against dense matrices by autodiff: factors, eigenvalues, the inverse, and rows that went through."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from forks import Started
from marks import some
from torch import nn

from lightning_sketch.attribution import Preconditioner, fit_preconditioner, scores, sketch_gradients
from lightning_sketch.operators import BlockSRHT

CLASSES, TOKENS = 5, 4


def cross_entropy(module, batch):
    """The mean loss of examples of one label, or of (examples, tokens) labels of which none is ignored."""
    output = module(batch[0])
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


class Sum(nn.Module):
    """A layer whose outputs at all places are averaged into a vector for a linear head."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, CLASSES)

    def forward(self, x):
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y.flatten(1, -2).mean(1) if y.ndim > 2 else y)


class Image(Sum):
    def forward(self, x):
        return self.head(self.layer(x).flatten(2).mean(2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.attention(x, x.flip(1), x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """A table that is looked up and multiplied by, as a language model's is; labels are words."""

    def __init__(self, words=CLASSES):
        super().__init__()
        self.table, self.mix = nn.Embedding(words, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.mix(self.table(x))).mean(1) @ self.table.weight.T


class SharedBias(nn.Module):
    """Two layers that add the same bias, which is in the block of neither."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.a(x) + self.b(x.square())


class TiedHead(Tied):
    def __init__(self, words=CLASSES, bias=False):
        super().__init__(words)
        self.head = nn.Linear(6, words, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.table(x))).mean(1))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(6, CLASSES))

    def forward(self, x):
        return (self.scale * x) @ self.matrix


class Recurrent(nn.Module):
    """No rule splits a recurrent layer, so that its examples are differentiated one at a time."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def words(count):
    return torch.randint(CLASSES, (count, TOKENS))


def numbers(*size):
    return lambda count: torch.randn(count, *size, dtype=torch.float64)


def transposed():
    from transformers.pytorch_utils import Conv1D

    return Sum(Conv1D(3, 6), 3)


MODULES = {
    "linear": (lambda: Sum(nn.Linear(6, 3), 3), numbers(6)),
    "no_bias": (lambda: Sum(nn.Linear(6, 3, bias=False), 3), numbers(TOKENS, 6)),
    "shared_bias": (SharedBias, numbers(6)),
    "tied_bias": (lambda: TiedHead(bias=True), words),
    "tokens": (lambda: Sum(nn.Linear(6, 3), 3), numbers(TOKENS, 6)),
    "transposed": (transposed, numbers(TOKENS, 6)),
    "embedding": (lambda: Sum(nn.Embedding(CLASSES, 6), 6), words),
    "embedding_padded": (lambda: Sum(nn.Embedding(CLASSES, 6, padding_idx=0), 6), words),
    "convolution": (lambda: Image(nn.Conv2d(2, 3, 2, padding=1), 3), numbers(2, 4, 3)),
    "groups": (lambda: Image(nn.Conv1d(4, 6, 2, groups=2), 6), numbers(4, 5)),
    "depthwise": (lambda: Image(nn.Conv1d(10, 10, 2, groups=10), 10), numbers(10, 5)),
    "layer_norm": (lambda: Sum(nn.LayerNorm(6), 6), numbers(TOKENS, 6)),
    "attention": (Attention, numbers(TOKENS, 6)),
    "tied": (Tied, words),
    "tied_head": (TiedHead, words),
    "bare": (Bare, numbers(6)),
    "recurrent": (Recurrent, numbers(TOKENS, 6)),
}
FAST = ["tokens", "embedding", "groups", "attention", "tied_head", "bare", "recurrent", "shared_bias"]


def case(name, dtype=torch.float64):
    """Return a module with random weights, and batches of unequal sizes."""
    torch.manual_seed(sum(map(ord, name)))
    make, inputs = MODULES[name]
    module = make().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    batches = [(inputs(count), torch.randint(CLASSES, (count,))) for count in (3, 5)]
    plain = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batches]
    return module, plain


def class_gradients(module, batches):
    """Return vec of sqrt(p_c) d(log p_c)/d theta of each example and class, (examples x classes, n), by autodiff alone.

    The sum of their outer products is the Gauss-Newton matrix of cross-entropy, E over labels that the model draws.
    """
    found = []
    for x, _ in batches:
        for one in x.split(1):
            logits = module(one)[0].log_softmax(-1)
            for c in range(CLASSES):
                found.append(flat(module, torch.exp(logits[c].detach() / 2) * logits[c]))
    return torch.stack(found)


def flat(module, loss):
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def dense(module, preconditioner):
    """Return L as a matrix, a column for each number of the parameters."""
    named = dict(module.named_parameters())
    n = sum(p.numel() for p in named.values())
    columns = []
    for unit in torch.eye(n, dtype=torch.float64):
        parts = unit.split([p.numel() for p in named.values()])
        gradients = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        columns.append(torch.cat([g.flatten() for g in preconditioner.whiten(gradients).values()]))
    return torch.stack(columns, 1)


def places(module, name, block):
    """Return where the numbers of a block, its bias in the last column or row, are in the vector of all parameters."""
    starts, start = {}, 0
    for key, parameter in module.named_parameters():
        starts[key] = start
        start += parameter.numel()
    rows, columns = block.shape
    own = starts[name] + block.start + torch.arange(rows * columns).view(rows, columns)
    if block.bias is None:
        return own.flatten()
    first = starts[block.bias.name] + block.bias.start
    left = block.bias.side == "left"
    bias = first + torch.arange(rows if left else columns)
    return torch.cat([own, bias[:, None] if left else bias[None]], 1 if left else 0).flatten()


@pytest.mark.filterwarnings("ignore:the preconditioner of .* is diagonal")
@pytest.mark.parametrize("name", some(MODULES, FAST))
def test_eigenvalues_of_ekfac_are_second_moments_in_its_basis_and_L_is_the_root_of_the_inverse(name):
    """E = (1/n) sum over examples and classes of (Uᵀ G V)², block by block; then Lᵀ L (P + lambda) = 1.

    P is built here from U, V and E; its diagonal in that basis is compared with the dense Gauss-Newton matrix.
    """
    module, batches = case(name)
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy, damping=0.3)
    rows = class_gradients(module, batches)
    gauss_newton = rows.T @ rows / p.examples
    assert p.examples == 8
    assert p.n == len(gauss_newton)
    damped, covered = torch.zeros_like(gauss_newton), []
    for name, blocks in p.blocks.items():
        for block in blocks:
            rows_, columns = block.eigenvalues.shape
            u = torch.eye(rows_).double() if block.left is None else block.left
            v = torch.eye(columns).double() if block.right is None else block.right
            for basis in (u, v):
                torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
            both, part = torch.kron(u, v), places(module, name, block)
            covered += part.tolist()
            moments = (both.T @ gauss_newton[part][:, part] @ both).diagonal()
            torch.testing.assert_close(block.eigenvalues.flatten().double(), moments, rtol=1e-6, atol=1e-12)
            own = block.eigenvalues.flatten().double() + 0.3 * block.eigenvalues.double().mean()
            damped[part[:, None], part] = both @ own.diag() @ both.T
    assert sorted(covered) == list(range(p.n))
    root = dense(module, p)
    known = damped.diagonal() > 0
    product = (root.T @ root @ damped)[known][:, known]
    torch.testing.assert_close(product, torch.eye(len(product)).double(), rtol=0, atol=1e-9)


def test_factors_of_kfac_are_the_dense_sums_of_inputs_and_output_gradients():
    """Of a linear layer at tokens: A = sum x xᵀ, B = sum g gᵀ, where x has a one more, that of the bias.

    P = t (B / tr B) ⊗ (A / tr A), and its trace t is that of the dense Gauss-Newton matrix.
    """
    module, batches = case("tokens")
    p = fit_preconditioner(module, batches, "kfac", loss_fn=cross_entropy)
    (block,) = p.blocks["layer.weight"]
    inputs, outputs = [], []
    module.layer.register_forward_hook(lambda layer, args, output: (inputs.append(args[0]), outputs.append(output))[1])
    gram_x, gram_g = torch.zeros(7, 7).double(), torch.zeros(3, 3).double()
    for x, _ in batches:
        for one in x.split(1):
            logits = module(one)[0].log_softmax(-1)
            for c in range(CLASSES):
                loss = torch.exp(logits[c].detach() / 2) * logits[c]
                (g,) = torch.autograd.grad(loss, outputs[-1], retain_graph=True)
                x_one = torch.cat([inputs[-1][0], torch.ones(TOKENS, 1)], 1)
                gram_x += x_one.T @ x_one
                gram_g += g[0].T @ g[0]
    rows = class_gradients(module, batches)[:, :21]  # the matrix and then the bias
    dense_p = torch.kron(gram_g / gram_g.trace(), gram_x / gram_x.trace()) * rows.square().sum() / 8
    both = torch.kron(block.left, block.right)
    torch.testing.assert_close(both @ block.eigenvalues.flatten().diag() @ both.T, dense_p)


@pytest.mark.filterwarnings("ignore:the preconditioner of .* is diagonal", "ignore:.*one at a time")
@pytest.mark.parametrize("kind", some(["ekfac", "kfac"], ["ekfac"]))
@pytest.mark.parametrize("name", some(MODULES, FAST))
def test_rows_are_sketches_of_the_whitened_gradient_of_each_example(name, kind):
    """S L g_i, with g_i by autodiff of one example alone; hooks rotate the factors, the loop whole gradients."""
    module, batches = case(name)
    p = fit_preconditioner(module, batches, kind, loss_fn=cross_entropy)
    sketch, names = BlockSRHT(p.n, min(16, p.n)), [name for name, _ in module.named_parameters()]
    for engine in ("auto", "loop"):
        rows = sketch_gradients(module, batches, sketch, cross_entropy, engine=engine, preconditioner=p)
        assert (rows.preconditioner == p.id).all()
        for i, one in enumerate((x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)):
            gradients = torch.autograd.grad(cross_entropy(module, one), list(module.parameters()))
            truth = torch.cat([g.flatten() for g in p.whiten(dict(zip(names, gradients, strict=True))).values()])
            torch.testing.assert_close(rows.sketches[i].double(), sketch.matvec(truth), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("untyped")
def test_dot_products_of_whitened_rows_are_influence_by_the_damped_matrix():
    """The mean over 60 sketches, each without bias, of S L g . S L g' is gᵀ (P + lambda)⁻¹ g', within 5 deviations."""
    module, batches = case("linear")
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy)
    root = dense(module, p)
    pairs = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
    gradients = torch.stack([flat(module, cross_entropy(module, pair)) for pair in pairs])
    truth = gradients @ root.T @ root @ gradients.T
    found = []
    for seed in range(60):
        rows = sketch_gradients(module, batches, BlockSRHT(p.n, 16, seed), cross_entropy, preconditioner=p)
        found.append(scores(rows, rows).double())
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 60**0.5
    assert ((mean - truth).abs() <= 5 * error + 1e-5 * truth.abs().max()).all()


@pytest.mark.parametrize("labels", ["model", "data"])
def test_two_engines_of_labels(labels):
    """From the data P is the mean of g gᵀ of the examples' own gradients, whatever the sizes of the batches."""
    module, batches = case("tokens")
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy, labels=labels, damping=0.1)
    own = torch.stack(
        [flat(module, cross_entropy(module, (x[None], y[None]))) for b in batches for x, y in zip(*b, strict=True)]
    )
    truth = own if labels == "data" else class_gradients(module, batches)
    (block,) = p.blocks["head.weight"]
    part = places(module, "head.weight", block)
    both = torch.kron(block.left, block.right)
    moments = (truth[:, part] @ both).square().sum(0) / 8
    torch.testing.assert_close(block.eigenvalues.flatten(), moments)


def test_a_wide_factor_is_its_diagonal():
    module, batches = case("tied_head")
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy, max_factor=5)
    (table,), (mix,) = p.blocks["table.weight"], p.blocks["mix.weight"]
    assert table.left is not None
    assert table.right is None
    assert mix.is_diagonal
    rows = class_gradients(module, batches)[:, places(module, "mix.weight", mix)]
    torch.testing.assert_close(mix.eigenvalues.flatten(), rows.square().sum(0) / 8)


def test_padding_and_ignored_labels_change_nothing():
    """A padded batch of texts with labels -100 gives the eigenvalues of the texts alone: no example counts padding."""
    torch.manual_seed(3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)

        def forward(self, x):
            return self.head(torch.tanh(self.mix(self.table(x))))

    def loss_fn(module, batch):
        return F.cross_entropy(module(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    module = Model().double()
    texts = [torch.randint(1, 9, (length,)) for length in (3, 5, 2)]
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = nn.utils.rnn.pad_sequence([t.flip(0) for t in texts], batch_first=True, padding_value=-100)
    alone = [{"input_ids": t[None], "labels": t.flip(0)[None]} for t in texts]
    kind = {"loss_fn": loss_fn, "labels": "data"}
    together = fit_preconditioner(module, [{"input_ids": padded, "labels": labels}], "kfac", **kind)
    apart = fit_preconditioner(module, alone, "kfac", **kind)
    for name in ("table.weight", "mix.weight", "head.weight"):
        (block,), (other,) = together.blocks[name], apart.blocks[name]
        torch.testing.assert_close(block.eigenvalues, other.eigenvalues, rtol=1e-9, atol=1e-12)


def test_labels_are_drawn_from_the_model_with_many_classes():
    """With one draw for each of 200 copies of the examples, the trace of each block is exact within 10 %."""
    module, batches = case("tokens")
    many = [(x.repeat(200, 1, 1), y.repeat(200)) for x, y in batches]
    exact = fit_preconditioner(module, batches, loss_fn=cross_entropy)
    drawn = fit_preconditioner(module, many, loss_fn=cross_entropy, max_classes=2)
    for name in ("head.weight", "layer.weight"):
        own, true = (p.blocks[name][0].eigenvalues.sum() for p in (drawn, exact))
        torch.testing.assert_close(own, true, rtol=0.1, atol=0)


def test_a_preconditioner_is_kept_and_read_a_parameter_at_a_time(tmp_path):
    module, batches = case("attention", torch.float32)
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy, damping=0.2)
    path = p.save(tmp_path)
    back = Preconditioner.load(tmp_path, p.id)
    assert repr(back) == repr(p)
    assert back.fingerprint == p.fingerprint
    assert back.id == p.id != p.damped(0.3).id
    gradients = {name: torch.randn_like(parameter) for name, parameter in module.named_parameters()}
    for name, found in back.whiten(gradients).items():
        torch.testing.assert_close(found, p.whiten(gradients)[name])  # products of mapped memory may round differently
    file = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"00002\.safetensors"):
        Preconditioner.read(path, check=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"00002\.safetensors is missing; restore it"):
        Preconditioner.read(path, check=True)


ADAPTIVE = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9)), 0.9),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), amsgrad=True), 0.95),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9), 0.9),
}


@pytest.mark.parametrize("name", some(ADAPTIVE, ["adam"]))
def test_that_of_an_optimizer_is_what_its_step_divides_by(name):
    """One more step of a constant gradient, without momentum's part: P = m / (step / lr) where m is known by hand."""
    module, batches = case("linear", torch.float32)
    make, decay = ADAPTIVE[name]
    optimizer = make(module.parameters())
    squares, largest = {}, {}
    for step in range(1, 4):
        optimizer.zero_grad()
        (cross_entropy(module, batches[step % 2]) * step).backward()
        optimizer.step()
        for key, parameter in module.named_parameters():
            squares[key] = decay * squares.get(key, 0) + (1 - decay) * parameter.grad**2
            largest[key] = torch.maximum(squares[key], largest.get(key, torch.zeros(())))
    p = Preconditioner.from_optimizer(module, optimizer, damping=0.5)
    assert p.kind == "optimizer"
    assert p.n == sum(q.numel() for q in module.parameters())
    for key in squares:
        v = squares[key] if name == "rmsprop" else largest[key] if name == "adamw" else squares[key]
        v = v if name == "rmsprop" else v / (1 - decay**3)
        torch.testing.assert_close(p.blocks[key][0].eigenvalues.view_as(v), v.sqrt() + 1e-8)
        whitened = p.whiten({key: torch.ones_like(v)})[key]
        torch.testing.assert_close(whitened, (v.sqrt() + 0.5 * v.sqrt().mean() + 1.5e-8).rsqrt())


@pytest.mark.usefixtures("untyped")
def test_what_is_wrong_is_said_before_anything_is_computed():
    module, batches = case("linear")
    other = case("bare")[0]
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy)
    wrong = {
        "kind='shampoo' is not known; use one of 'ekfac', 'kfac'": lambda: fit_preconditioner(
            module, batches, "shampoo"
        ),
        "reads the batches twice": lambda: fit_preconditioner(module, iter(batches), loss_fn=cross_entropy),
        "got no batches": lambda: fit_preconditioner(module, [], loss_fn=cross_entropy),
        "damping=0": lambda: p.damped(0),
        "does not cover scale, matrix": lambda: p.whiten(dict(other.named_parameters())),
        "SGD has no mean square": lambda: Preconditioner.from_optimizer(module, torch.optim.SGD(module.parameters())),
        "no state of layer.weight": lambda: Preconditioner.from_optimizer(
            module, torch.optim.Adam(module.parameters())
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with torch.no_grad():
        module.head.bias += 1
    with pytest.raises(ValueError, match="was taken at weights"):
        sketch_gradients(module, batches, BlockSRHT(p.n, 8), cross_entropy, preconditioner=p)


def test_a_parameter_without_a_gradient_is_left_out_and_said():
    module, batches = case("linear")
    module.unused = nn.Parameter(torch.ones(3).double())
    with pytest.warns(UserWarning, match="no example has a gradient of unused"):
        p = fit_preconditioner(module, batches, loss_fn=cross_entropy)
    assert not p.whiten({"unused": torch.ones(3)})["unused"].any()


PEAK = """
import resource, sys
import torch, torch.nn.functional as F
from torch import nn
from lightning_sketch import BlockSRHT
from lightning_sketch.attribution import fit_preconditioner, sketch_gradients

torch.set_num_threads(1)
WORDS = 50_257

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).tanh())

def loss_fn(module, batch):
    return F.cross_entropy(module(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

def peak():
    try:  # not ru_maxrss, which has the peak of the process that started this one in it
        lines = dict(line.split(":") for line in open("/proc/self/status"))
        return int(lines["VmHWM"].split()[0]) * 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def run(tokens):
    module, ids = Model(), torch.randint(0, WORDS, (2, tokens))
    labels = ids.clone()
    labels[:, -tokens // 4 :] = -100
    batches = [{"input_ids": ids, "labels": labels}]
    p = fit_preconditioner(module, batches, loss_fn=loss_fn)
    fitted = peak()
    sketch_gradients(module, batches, BlockSRHT(p.n, 16), loss_fn, preconditioner=p)
    return fitted

run(2)  # all that does not grow with tokens
before = peak()
for after in (run(128), peak()):
    print((after - before) / (2 * 128 * WORDS * 4))
"""


@pytest.mark.slow
def test_a_real_vocabulary_costs_the_memory_of_a_training_step():
    """In tensors of the size of the logits, 51 MB: a training step has 3.0, the fit 2.8, rows 3.7, as without it."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    fitted, rows = map(float, done.stdout.split())
    assert 1 < fitted < 3.2
    assert 1 < rows < 4


def test_an_example_whose_loss_is_not_finite_is_left_out_and_said():
    """The eigenvalues are those of the other examples, whose mean has one example fewer in its sum."""
    module, batches = case("tokens")
    broken = [(x.clone(), y) for x, y in batches]
    broken[1][0][2] = torch.nan
    whole = [(x[[0, 1, 3, 4]] if len(x) == 5 else x, y[[0, 1, 3, 4]] if len(y) == 5 else y) for x, y in batches]
    with pytest.warns(UserWarning, match="loss is not finite are left out"):
        found = fit_preconditioner(module, broken, loss_fn=cross_entropy, output_loss_fn="cross_entropy")
    true = fit_preconditioner(module, whole, loss_fn=cross_entropy)
    for name in ("layer.weight", "head.weight"):
        own, other = found.blocks[name][0].eigenvalues, true.blocks[name][0].eigenvalues
        torch.testing.assert_close(own * 8, other * 7, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*not finite are left out")
def test_a_gradient_that_is_not_finite_is_refused():
    """The square root of zero has an infinite slope, though the loss is finite."""
    module, batches = case("linear")

    def loss_fn(module, batch):
        return cross_entropy(module, batch) + module.layer(batch[0] * 0).sub(module.layer.bias).abs().sum().sqrt()

    with pytest.raises(ValueError, match="is not finite: the gradient of an example is not"):
        fit_preconditioner(module, batches, "kfac", loss_fn=loss_fn, labels="data")


@pytest.mark.parametrize("name", ["transposed", "tokens"])
def test_labels_of_the_data_give_second_moments_of_the_examples_own_gradients(name):
    """Of batches of several: the bias of a layer has the scale of its example too, on whichever side it is."""
    module, batches = case(name)
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy, labels="data")
    pairs = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
    own = torch.stack([flat(module, cross_entropy(module, pair)) for pair in pairs])
    for key in ("layer.weight", "head.weight"):
        (block,) = p.blocks[key]
        moments = (own[:, places(module, key, block)] @ torch.kron(block.left, block.right)).square().mean(0)
        torch.testing.assert_close(block.eigenvalues.flatten(), moments)


def test_class_weights_are_those_that_are_passed_and_unknown_ones_take_the_loop():
    """In an example's own loss class weights cancel, and P is that of the plain loss either way."""
    module, batches = case("tokens")
    weights = torch.tensor([1.0, 5.0, 0.5, 2.0, 9.0]).double()

    def weighted(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], weights)

    true = fit_preconditioner(module, batches, "kfac", loss_fn=cross_entropy, labels="data")
    known = fit_preconditioner(
        module, batches, "kfac", loss_fn=weighted, labels="data", weight_fn=lambda batch: weights[batch[1]].sum()
    )
    with pytest.warns(UserWarning, match="differentiated one at a time"):
        found = fit_preconditioner(module, batches, "kfac", loss_fn=weighted, labels="data")
    for own in (known, found):
        torch.testing.assert_close(own.blocks["head.weight"][0].eigenvalues, true.blocks["head.weight"][0].eigenvalues)


class Three:
    """Three processes that have seen the same."""

    def sum(self, tensor):
        return tensor * 3

    def gather(self, value):
        return [value] * 3


def test_three_processes_with_the_same_examples_give_what_one_does():
    module, batches = case("attention")
    one = fit_preconditioner(module, batches, loss_fn=cross_entropy)
    three = fit_preconditioner(module, batches, loss_fn=cross_entropy, processes=Three())
    assert three.examples == 3 * one.examples
    for name, blocks in one.blocks.items():
        for block, other in zip(blocks, three.blocks[name], strict=True):
            torch.testing.assert_close(block.eigenvalues, other.eigenvalues)


RANKS = """
import sys, warnings
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from lightning_sketch.attribution import fit_preconditioner

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)]), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.experts[int(x[0, 0] > 0)](x)))

class Ranks:
    def sum(self, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value):
        found = [None] * 2
        dist.all_gather_object(found, value)
        return found

def loss_fn(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])

def main(rank, file):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module, x = Branches(), torch.randn(2, 8, 6)
    x[:, :, 0] = torch.tensor([[-1.0], [1.0]]) * x[:, :, 0].abs()
    batches = [(x[i], torch.arange(8) % 3) for i in range(2)]
    found = fit_preconditioner(module, [batches[rank]], loss_fn=loss_fn, labels="data", processes=Ranks())
    true = fit_preconditioner(module, batches, loss_fn=loss_fn, labels="data")
    for name, blocks in true.blocks.items():
        for block, other in zip(blocks, found.blocks[name], strict=True):
            torch.testing.assert_close(other.eigenvalues, block.eigenvalues)

main(int(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_that_saw_different_layers_fit_what_one_does(tmp_path):
    """Each process has one branch only, of the same shapes: sums of other layers must not be added up."""
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    ranks = [Started(program, rank, tmp_path / "meet") for rank in (0, 1)]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
