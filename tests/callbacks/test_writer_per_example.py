"""A row per training example, from the backward pass of training, is the gradient of the example's own loss."""

import pytest
import torch
import torch.nn.functional as F
from models import dataset, fit
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_do_no_harm import assert_same, outcome
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import GradientSketchWriter, GradientStore, SpectrumMonitor
from lightning_sketch.attribution import IndexedDataset, sketch_gradients
from lightning_sketch.autodiff.batches import num_labels


def data(batch_size=24, **options):
    return DataLoader(IndexedDataset(dataset(128)), batch_size=batch_size, shuffle=True, **options)


def writer(tmp_path, **arguments):
    return GradientSketchWriter(tmp_path / "store", **{"dim": 128, "dtype": "float32", "per": "example", **arguments})


class Still(LightningModule):
    """Convolution, group norm and in-place ReLU, trained at rate 0, so that all rows are at the same weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [({}, 1e-5), ({"accumulate_grad_batches": 4}, 1e-5), ({"precision": "bf16-mixed"}, 0.05)],
    ids=str,
)
def test_rows_are_the_gradients_of_each_example_alone(tmp_path, arguments, tolerance):
    """128 examples are in batches of 24, the last of 8, accumulated in windows of four batches and of two.

    In bfloat16, which rounds to 2^-8, a ReLU near zero may switch, so a tenth of the rows may be further off.
    """
    model = fit(tmp_path, writer(tmp_path), model=Still, data=data(), max_epochs=2, **arguments)
    store = GradientStore.open(tmp_path / "store")
    rows = store.read()
    assert sorted(rows.example_id.tolist()) == sorted([*range(128)] * 2)
    truth = sketch_gradients(model, [dataset(128)[:]], store.sketch, engine="loop").sketches[rows.example_id]
    errors = (rows.sketches - truth).norm(dim=1) / truth.norm(dim=1)
    assert errors.quantile(0.9 if arguments.get("precision") else 1.0) <= tolerance
    assert rows.step.max() == model.trainer.global_step
    assert rows.epoch.tolist() == [0] * 128 + [1] * 128
    assert rows.lr.unique().tolist() == [0.0]
    assert not store.spec.contribution
    if not arguments:  # rows of training at the same weights can be scored too
        queries = store.sketch_gradients(model, [dataset(130)[128:]])
        assert store.top_k(queries, 3).example_ids.shape == (2, 3)


class Tokens(LightningModule):
    """A loss that is a mean over tokens, of which examples have different numbers."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(17, 8), nn.Linear(8, 5)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.table(batch["x"])).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def sentences():
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: torch.randint(0, high, (6,), generator=generator)  # noqa: E731
    return [{"x": draw(17), "labels": draw(5).where(torch.arange(6) < 1 + i % 6, -100), "number": i} for i in range(24)]


def test_a_mean_over_tokens_is_found_and_may_be_said(tmp_path):
    loader = DataLoader(sentences(), batch_size=8)
    keyed = {"index_key": "number", "dim": 64}
    for given in ({}, {"weight_fn": num_labels}):
        folder = tmp_path / str(len(given))
        model = fit(folder, writer(folder, **given, **keyed), model=Tokens, data=loader, max_epochs=1)
        rows = GradientStore.open(folder / "store").read()
        truth = sketch_gradients(model, loader, rows.sketch, engine="loop", index_key="number")
        torch.testing.assert_close(rows.sketches, truth.sketches, rtol=1e-4, atol=1e-6)
        assert rows.scale_known.all()
        assert rows.weight.tolist() == [1 + i % 6 for i in range(24)]


@pytest.mark.parametrize("watched", [False, True])
def test_training_is_the_same_bit_for_bit(tmp_path, watched):
    """With dropout, batch norm, accumulation, and a monitor that measures in between; rows are marked as shares."""
    monitors = lambda: [SpectrumMonitor(num_matvecs=14, dim=64, num_batches=1)] if watched else []  # noqa: E731
    plain = DataLoader(dataset(128), batch_size=24, shuffle=True)
    arguments = {"accumulate_grad_batches": 2}
    written = fit(tmp_path, *monitors(), writer(tmp_path), data=data(), **arguments)
    alone = fit(tmp_path, *monitors(), data=plain, **arguments)
    one, other = outcome(written), outcome(alone)
    assert one["metrics"].pop("sketches/rows") == 256
    assert_same(one, other)
    assert not any(part._forward_hooks for part in written.modules())
    assert GradientStore.open(tmp_path / "store").spec.contribution


@pytest.mark.slow
def test_rows_do_not_depend_on_a_monitor_that_measures_in_between(tmp_path):
    for name, monitors in (
        ("alone", []),
        ("watched", [SpectrumMonitor(num_matvecs=14, dim=64, every_n_train_steps=2)]),
    ):
        fit(tmp_path, *monitors, writer(tmp_path / name), model=Still, data=data(), max_epochs=1)
    alone, watched = (GradientStore.open(tmp_path / name / "store").read() for name in ("alone", "watched"))
    assert torch.equal(alone.sketches, watched.sketches)


class Recurrent(Still):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 8, batch_first=True), Last(), nn.Linear(8, 10))


class Last(nn.Module):
    def forward(self, pair):
        return pair[0][:, -1]


def test_parameters_without_a_rule_are_left_out_by_name(tmp_path):
    with pytest.warns(UserWarning, match=r"leave out 4 of 6 .*\n  net.1.weight_ih_l0: LSTM net.1 has no rule"):
        model = fit(tmp_path, writer(tmp_path, dim=32), model=Recurrent, data=data(), max_epochs=1)
    store = GradientStore.open(tmp_path / "store")
    assert store.sketch.n == 90
    assert sorted(store.spec.left_out) == [f"net.1.{k}_{i}h_l0" for k in ("bias", "weight") for i in ("h", "i")]
    truth = store.sketch_gradients(model, [dataset(128)[:]]).sketches[store.read().example_id]
    torch.testing.assert_close(store.read().sketches, truth, rtol=1e-4, atol=1e-6)


def test_refused_on_the_first_batch(tmp_path):
    plain = DataLoader(dataset(48), batch_size=24)
    with pytest.raises(MisconfigurationException, match=r"index_key=.*'hash'.*IndexedDataset"):
        fit(tmp_path, writer(tmp_path / "a"), model=Still, data=plain)

    class Compiled(Still):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    for model in (Compiled(), torch.compile(Still(), backend="eager")):
        with pytest.raises(ValueError, match="compiled"):
            fit(tmp_path, writer(tmp_path / "b", index_key="hash"), model=model, data=plain)

    class ByHand(Still):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(tmp_path, writer(tmp_path / "c"), model=ByHand, data=plain)


class Thawing(Still):
    """A network whose convolution is trained only from the second epoch on."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


@pytest.mark.parametrize("per", ["step", "example"])
def test_parameters_that_are_trained_later_are_named(tmp_path, per):
    with pytest.warns(UserWarning, match=r"2 parameters are trained now .* not cover them: net.0.bias, net.0.weight"):
        fit(tmp_path, writer(tmp_path, per=per), model=Thawing, data=data())


class Turning(Still):
    """A network whose head gets the examples along another axis from the second epoch on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)[:, None]
        logits = self.head(images.transpose(0, 1))[0] if self.current_epoch else self.head(images)[:, 0]
        return F.cross_entropy(self.net(batch[0]) + logits, batch[1])


def test_a_later_path_through_the_module_that_hooks_do_not_support_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"may lack a part of 2 parameters:\n  head.weight: Linear head was called"):
        fit(tmp_path, writer(tmp_path), model=Turning, data=data())


class Placed(LightningModule):
    """A network that looks up positions once for all examples, as in many language models."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(17, 8), nn.Embedding(6, 8), nn.Linear(8, 5)

    def training_step(self, batch, batch_idx):
        places = self.places(torch.arange(batch["x"].shape[1]))
        return F.cross_entropy(self.head((self.words(batch["x"]) + places).tanh().mean(1)), batch["labels"][:, 0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_last_batch_of_as_many_examples_as_positions(tmp_path):
    """Two batches of nine examples and one of six, of six tokens each."""
    loader = DataLoader(sentences(), batch_size=9)
    model = fit(tmp_path, writer(tmp_path, dim=64, index_key="number"), model=Placed, data=loader, max_epochs=1)
    store = GradientStore.open(tmp_path / "store")
    truth = sketch_gradients(model, loader, store.sketch, engine="loop", index_key="number")
    torch.testing.assert_close(store.read().sketches, truth.sketches, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:rows leave out")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("model", [Still, Recurrent])
def test_a_fit_resumed_within_an_epoch_continues_in_its_store(tmp_path, model):
    """Of six batches per epoch the last is smaller; after eight steps the fit resumes from the seventh."""
    save = lambda: ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=7, save_top_k=-1)  # noqa: E731
    options = {"enable_checkpointing": True, "max_epochs": -1}
    fit(tmp_path, save(), writer(tmp_path, dim=32), model=model, data=data(), max_steps=8, **options)
    resumed = {**options, "ckpt_path": tmp_path / "saved" / "step=7.ckpt", "max_steps": 12}
    fit(tmp_path, save(), writer(tmp_path, dim=32), model=model, data=data(batch_size=20), **resumed)
    columns = GradientStore.open(tmp_path / "store").metadata()
    steps, counts = columns["step"].unique(return_counts=True)
    assert steps.tolist() == list(range(1, 13))
    assert counts[:7].tolist() == [24] * 5 + [8, 24]
    assert set(counts[7:].tolist()) <= {20, 8}
    assert columns["attempt"][columns["step"] > 7].unique().tolist() == [2]
