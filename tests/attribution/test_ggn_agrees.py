"""`fit_ggn` and `GGN` agree: the matrix in sketch space is S G Sᵀ of `GGN`, with default losses too."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from marks import slow, some
from torch import nn

from lightning_sketch import GGN, BlockSRHT
from lightning_sketch.attribution import fit_ggn
from lightning_sketch.autodiff import Layout
from lightning_sketch.curvature import CrossEntropy

N = 24


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class Module(pl.LightningModule):
    """A typical LightningModule: without `forward` if it has one child only."""

    def __init__(self, step, outputs=3):
        super().__init__()
        self.net, self.step = net(outputs), step

    def training_step(self, batch, batch_idx):
        return self.step(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def binary(z, y):
    return F.binary_cross_entropy_with_logits(z, y)


MULTI_HOT = (normal(N, 3, seed=1) > 0).double()
SOFT = normal(N, 3, seed=1).softmax(1)
CLASSES = torch.arange(N) % 3

WEIGHTED = SOFT * torch.linspace(0.1, 3, N, dtype=torch.float64)[:, None]

TRAINED = {
    "multi-hot targets of cross-entropy": (F.cross_entropy, MULTI_HOT),
    "weights in the targets": (F.cross_entropy, WEIGHTED),
    "classes": (F.cross_entropy, CLASSES),
    "some ignored": (F.cross_entropy, torch.where(torch.arange(N) % 5 == 0, -100, CLASSES)),
    "soft labels": (F.cross_entropy, SOFT),
    "probabilities by squared error": (F.mse_loss, SOFT),
    "multi-label": (binary, MULTI_HOT),
    "indicators by squared error": (F.mse_loss, MULTI_HOT),
    "real labels": (F.mse_loss, normal(N, 3, seed=1)),
}
QUICK = ["classes", "some ignored", "multi-label", "real labels"]


def both(module, batches, **options):
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, layout.n)
    s = sketch.as_matrix(dtype=torch.float64)
    ggn = GGN(module, batches, **options)
    with ggn.hold():
        dense = ggn.as_matrix()
    return s @ dense @ s.T, fit_ggn(module, batches, sketch, layout, **options)


@pytest.mark.parametrize("name", some(TRAINED, QUICK))
def test_the_trained_loss_is_found_and_both_have_its_matrix(name):
    """Truth: the same loss as a function that autograd differentiates, with every label counted."""
    step, y = TRAINED[name]
    module, x = Module(step), normal(N, 4)
    dense, found = both(module, [(x, y)])
    layout = Layout.of(module)
    s = BlockSRHT(layout.n, layout.n).as_matrix(dtype=torch.float64)
    truth = s @ GGN(module, [(x, y)], output_loss_fn=lambda z, batch: step(z, batch[1])).as_matrix() @ s.T
    torch.testing.assert_close(dense, truth)
    counted = N if y.is_floating_point() else int((y >= 0).sum())  # a mean over examples, over those with a label
    torch.testing.assert_close(found.dense() * N / counted, truth)


@pytest.mark.parametrize("name", some(TRAINED, QUICK))
def test_the_loss_may_be_passed_by_name_or_as_a_function(name):
    """A plain module, with the loss of another module."""
    step, y = TRAINED[name]
    plain, x = net(), normal(N, 4)
    named, found = both(plain, [(x, y)], loss_fn=lambda module, batch: step(module(batch[0]), batch[1]))
    expected, same = both(Module(step), [(x, y)])
    torch.testing.assert_close(named, expected)
    torch.testing.assert_close(found.dense(), same.dense())
    name = "binary_cross_entropy" if step is binary else "squared_error" if step is F.mse_loss else "cross_entropy"
    named, found = both(plain, [(x, y)], output_loss_fn=name)
    torch.testing.assert_close(named, expected)
    torch.testing.assert_close(found.dense(), same.dense())


OTHERS = {
    "class weights": (lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 5, 1]).double()), CLASSES),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2), CLASSES),
    "half of it": (lambda z, y: F.mse_loss(z, y) / 2, normal(N, 3, seed=1)),
    "regularized": (lambda z, y: F.cross_entropy(z, y) + z.square().mean(), CLASSES),
    "none of the kinds": (lambda z, y: F.huber_loss(z, y), normal(N, 3, seed=1)),
}


@pytest.mark.parametrize(("step", "y"), OTHERS.values(), ids=OTHERS)
def test_both_refuse_a_loss_that_is_not_in_the_table(step, y):
    module, x = Module(step), normal(N, 4)
    layout = Layout.of(module)
    said = r"would be of a loss of .*, but training_step returns .*output_loss_fn"
    with pytest.raises(ValueError, match=said):
        GGN(module, [(x, y)]).matvec(torch.ones(layout.n, dtype=torch.float64))
    with pytest.raises(ValueError, match=said):
        fit_ggn(module, [(x, y)], BlockSRHT(layout.n, 8), layout)


@pytest.mark.parametrize(
    "given", [lambda z, batch: F.cross_entropy(z, batch[1]), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 1]))]
)
def test_a_function_without_roots_is_refused_with_a_way_out(given, untyped):
    module, layout = net(), Layout.of(net())
    with pytest.raises(ValueError, match=r"needs the method `roots`.*curvature='margin'\) or 'fisher'"):
        fit_ggn(module, [(normal(N, 4), CLASSES)], BlockSRHT(layout.n, 8), layout, output_loss_fn=given)


def test_a_batch_without_labels_adds_zeros():
    """The first batch decides nothing, though plain and shifted cross-entropy are alike on it: both are NaN."""

    def step(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    module, x, y = Module(step), normal(6, 4, 4), torch.arange(24).view(6, 4) % 3
    layout = Layout.of(module)
    one = fit_ggn(module, [(x, y)], BlockSRHT(layout.n, 8), layout)
    two = fit_ggn(module, [(x, torch.full_like(y, -100)), (x, y)], BlockSRHT(layout.n, 8), layout, engine="hooks")
    assert two.examples == 2 * one.examples
    assert two.trace == pytest.approx(one.trace / 2, rel=0.5)  # other draws


@pytest.mark.parametrize(
    ("y", "said"),
    [(SOFT, "are probabilities.*output_loss_fn="), (MULTI_HOT, "all of them 0 or 1.*output_loss_fn=")],
    ids=["probabilities", "zeros and ones"],
)
def test_both_refuse_ambiguous_real_labels(y, said):
    """A plain module, whose trained loss is unknown."""
    module, x = net(), normal(N, 4)
    layout = Layout.of(module)
    with pytest.raises(ValueError, match=said):
        GGN(module, [(x, y)]).matvec(torch.ones(layout.n, dtype=torch.float64))
    with pytest.raises(ValueError, match=said):
        fit_ggn(module, [(x, y)], BlockSRHT(layout.n, 8), layout)


def test_every_batch_is_compared_not_the_first_alone():
    """In the third batch a class has another weight."""
    step = OTHERS["class weights"][0]
    x, y = normal(N, 4), torch.cat([torch.zeros(16, dtype=torch.long), torch.arange(8) % 2])
    batches, layout = list(zip(x.split(8), y.split(8), strict=True)), Layout.of(Module(step))
    for ask in (
        lambda: GGN(Module(step), batches).matvec(torch.ones(layout.n, dtype=torch.float64)),
        lambda: fit_ggn(Module(step), batches, BlockSRHT(layout.n, 8), layout),
    ):
        with pytest.raises(ValueError, match="but training_step returns"):
            ask()


def test_two_losses_of_one_value_are_distinguished_by_their_gradients():
    """All logits zero: plain and shifted cross-entropy are both log 3, with different matrices."""
    module = Module(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
    for p in module.net[-1].parameters():
        p.data.zero_()
    batch = normal(6, 4, 4), torch.arange(24).view(6, 4) % 3
    dense, _ = both(module, [batch])
    torch.testing.assert_close(dense, both(module, [batch], output_loss_fn="cross_entropy")[0])


def test_two_losses_of_one_value_and_gradient_are_refused():
    """All inputs zero, and no biases: every gradient is zero."""
    module = Module(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
    module.net = nn.Linear(4, 3, bias=False).double()
    batch, layout = (torch.zeros(6, 4, 4).double(), torch.arange(24).view(6, 4) % 3), Layout.of(module)
    for ask in (
        lambda: GGN(module, [batch]).matvec(torch.ones(12, dtype=torch.float64)),
        lambda: fit_ggn(module, [batch], BlockSRHT(layout.n, 8), layout),
    ):
        with pytest.raises(ValueError, match="both have the value and the gradient of the loss that is trained"):
            ask()
    assert GGN(module, [batch], output_loss_fn="cross_entropy").loss() == pytest.approx(1.0986123)


@pytest.mark.parametrize(("shift", "draws"), [(True, 4), slow(True, 20), slow(False, 20)])
def test_tokens_are_shifted_as_in_training(shift, draws):
    """Ten times so many draws of fit_ggn: five standard errors of their mean, each example weighing the same."""

    def step(z, y):
        z, y = (z[:, :-1], y[:, 1:]) if shift else (z, y)
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    module, x = Module(step), normal(6, 4, 4)
    y = torch.arange(24).view(6, 4) % 3
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 8)
    s = sketch.matvec(torch.eye(layout.n, dtype=torch.float64)).T
    loss = CrossEntropy(shift=shift)
    g = GGN(module, [(x, y)])
    torch.testing.assert_close(g.as_matrix(), GGN(module, [(x, y)], output_loss_fn=loss).as_matrix())
    assert g.loss() == pytest.approx(step(module.net(x), y).item())
    parts = [fit_ggn(module, [(x, y)], sketch, layout, draws=draws, seed=seed).dense() for seed in range(10)]
    error = torch.stack(parts).std(0) / 10**0.5
    assert ((sum(parts) / 10 - s @ g.as_matrix() @ s.T).abs() <= 5 * error + 1e-12).all()


class Named(pl.LightningModule):
    """Batches are mappings, with keys that the model does not take."""

    def __init__(self, call):
        super().__init__()
        self.net, self.call = net(), call

    def forward(self, x, scale=1.0):
        return self.net(x) * scale

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.call(self, batch), batch["labels"])


class Whole(Named):
    def forward(self, batch):
        return self.net(batch["x"])


class Keywords(Named):
    def forward(self, **batch):
        return self.net(batch["x"])


@pytest.mark.parametrize("kind", [Named, Whole, Keywords])
def test_a_mapping_is_passed_as_forward_takes_it(kind):
    module, batch = kind(lambda self, batch: self.net(batch["x"])), {"x": normal(N, 4), "labels": CLASSES}
    expected = GGN(module.net, [(batch["x"], CLASSES)]).as_matrix()
    torch.testing.assert_close(GGN(module, [batch]).as_matrix(), expected)


class Two(Module):
    def __init__(self):
        super().__init__(F.cross_entropy)
        self.other = nn.Linear(4, 3).double()


def test_without_forward_and_with_two_children_the_error_names_model_fn():
    module, batch = Two(), (normal(N, 4), CLASSES)
    layout = Layout.of(module)
    said = r"Two has no forward, and 2 children with parameters \(net, other\).*pass model_fn="
    with pytest.raises(ValueError, match=said):
        GGN(module, [batch]).matvec(torch.ones(layout.n, dtype=torch.float64))
    with pytest.raises(ValueError, match=said):
        fit_ggn(module, [batch], BlockSRHT(layout.n, 8), layout)
    given = both(module, [batch], model_fn=lambda module, batch: module.net(batch[0]))
    torch.testing.assert_close(given[0], given[1].dense())


def test_a_step_that_cannot_run_alone_asks_for_the_loss():
    module = Module(lambda z, y: module.trainer.global_step * F.cross_entropy(z, y))
    with pytest.raises(ValueError, match=r"the loss of the output that is trained is unknown: .*output_loss_fn"):
        GGN(module, [(normal(N, 4), CLASSES)]).matvec(torch.ones(43, dtype=torch.float64))


FLAT = {
    "class weights": (lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2, 3]).double()), CLASSES),
    "a temperature": (lambda z, y: F.cross_entropy(4 * z, y), CLASSES),
    "a temperature of binary": (lambda z, y: binary(3 * z, y), MULTI_HOT),
}


@pytest.mark.parametrize("spread", [0.0, 1e-3], ids=["zeros", "nearly"])
@pytest.mark.parametrize(("step", "y"), FLAT.values(), ids=FLAT)
def test_losses_of_one_initial_value_are_distinguished_by_their_gradients(step, y, spread):
    """At equal logits a temperature does not change the value of the loss, and class weights hardly do."""
    module, x = Module(step), normal(N, 4)
    for p in module.net[-1].parameters():
        p.data = spread * normal(*p.shape)
    layout = Layout.of(module)
    said = "with a gradient that differs by|would be of a loss of"
    with pytest.raises(ValueError, match=said):
        GGN(module, [(x, y)]).matvec(torch.ones(layout.n, dtype=torch.float64))
    with pytest.raises(ValueError, match=said):
        fit_ggn(module, [(x, y)], BlockSRHT(layout.n, 8), layout)


def test_losses_are_compared_again_after_training():
    """Plain cross-entropy first; later a class has twice the weight."""
    counts = {"double": False}

    def step(z, y):
        return F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0 if counts["double"] else 1.0, 1.0]).double())

    module = Module(step)
    g, v = GGN(module, [(normal(N, 4), CLASSES)]), torch.ones(43, dtype=torch.float64)
    assert g.matvec(v).isfinite().all()
    counts["double"] = True
    with torch.no_grad():
        module.net[0].weight += 0.1
    with pytest.raises(ValueError, match="but training_step returns"):
        g.matvec(v)


@pytest.mark.parametrize(
    ("step", "y"),
    [
        (lambda z, y: F.mse_loss(z.squeeze(-1), y), normal(N, seed=3)),
        (lambda z, y: binary(z.squeeze(-1), y), (normal(N, seed=3) > 0).double()),
    ],
    ids=["regression", "binary"],
)
def test_one_output_may_have_labels_without_its_axis(step, y):
    module, x = Module(step, outputs=1), normal(N, 4)
    dense, found = both(module, [(x, y)])
    given = GGN(module, [(x, y)], output_loss_fn=lambda z, batch: step(z, batch[1])).as_matrix()
    s = BlockSRHT(len(given), len(given)).as_matrix(dtype=torch.float64)
    torch.testing.assert_close(dense, s @ given @ s.T)
    torch.testing.assert_close(found.dense(), dense)


def test_micro_batches_find_the_loss_too():
    module, x = Module(F.cross_entropy), normal(N, 4)
    cut = GGN(module, [(x, CLASSES)], micro_batch_size=5).as_matrix()
    torch.testing.assert_close(cut, GGN(module, [(x, CLASSES)]).as_matrix())


def test_a_batch_without_labels_says_so():
    module = Module(lambda z, y: z.square().mean())
    with pytest.raises(ValueError, match=r"found no labels in a batch of type dict.*output_loss_fn"):
        GGN(module.net, [{"input": normal(N, 4)}]).matvec(torch.ones(43, dtype=torch.float64))


class Sequences(pl.LightningModule):
    """The time axis comes first, as in recurrent layers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn, self.head = nn.LSTM(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.slow
def test_time_may_come_first():
    """The matrix is the same; without `batch_dim`, also with `num_examples` alone, it is refused."""
    module, batch = Sequences(), (normal(7, 6, 4), torch.arange(6) % 3)
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 16)
    s = sketch.matvec(torch.eye(layout.n, dtype=torch.float64)).T
    g = GGN(module, [batch], batch_dim=1).as_matrix()
    found = fit_ggn(module, [batch], sketch, layout, batch_dim=1, engine="loop")
    torch.testing.assert_close(found.dense(), s @ g @ s.T)
    with pytest.raises(ValueError, match="batch_dim=1"):
        fit_ggn(module, [batch], sketch, layout)
    with pytest.raises(ValueError, match=r"num_examples gives 6 for a part of 1 of the 6 examples.*batch_dim=1"):
        fit_ggn(module, [batch], sketch, layout, engine="loop", num_examples=lambda batch: batch[0].shape[1])
