"""What hooks cannot split gets its part of the rows from a pass for each example; training does not notice."""

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, fit, trainer
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_do_no_harm import assert_same, outcome
from test_writer_per_example import Recurrent, Still, Tokens, data, sentences, writer
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import GradientStore
from lightning_sketch.autodiff.batches import BatchStructure, num_labels
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.callbacks.gradient_sketch_writer._fallback import left_by_hooks


def alone(model, sketch, examples):
    """Of one example after the other, by autograd, all parameters."""
    layout, rows = Layout.of(model), []
    with preserve_state(model):
        for example in examples:
            gradients = torch.autograd.grad(model.training_step(example, 0), layout.parameters(model))
            rows.append(sketch.matvec(torch.cat([g.flatten() for g in gradients])))
    return torch.stack(rows)


def digits(count=128):
    return [dataset()[i : i + 1] for i in range(count)]


class Gated(Still):
    """A weight in two places, of which hooks see one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.inner = nn.Linear(10, 10)

    def training_step(self, batch, batch_idx):
        x = self.net(batch[0])
        x = self.inner(x) + F.linear(x.tanh(), self.inner.weight)
        return F.cross_entropy(x, batch[1])


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}], ids=str)
@pytest.mark.parametrize(
    ("model", "left", "fallback"), [(Recurrent, 4, "loop"), (Gated, 1, "loop"), (Gated, 1, "vmap")]
)
def test_rows_are_whole(tmp_path, model, left, arguments, fallback):
    """Six batches an epoch, the last smaller; windows of three."""
    words = (
        rf"fallback='{fallback}' serves {left} of \d parameters, .* pass .*more for every batch.*, in evaluation mode"
    )
    with pytest.warns(UserWarning, match=words):
        fitted = fit(tmp_path, writer(tmp_path, fallback=fallback), model=model, data=data(), **arguments)
    store = GradientStore.open(tmp_path / "store")
    rows = store.read()
    assert not store.spec.left_out
    assert store.spec.parameters == Layout.of(fitted)
    truth = alone(fitted, store.sketch, digits())[rows.example_id]
    assert ((rows.sketches - truth).norm(dim=1) <= 1e-5 * truth.norm(dim=1)).all()
    assert len(rows) == 256


@pytest.mark.filterwarnings("ignore:fallback='loop' serves")
def test_a_scaled_loss_scales_the_shares_only(tmp_path):
    """In float16 by hooks, under a scale that grows from 2^10, and by the second pass, without either.

    float16 rounds to 2^-11, and a unit near its threshold may switch: a tenth of the rows may be further off.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "accumulate_grad_batches": 2}
    model = fit(tmp_path, writer(tmp_path, fallback="loop"), model=Gated, data=data(), **options)
    assert scaler.get_scale() > 2.0**10
    store = GradientStore.open(tmp_path / "store")
    truth = alone(model, store.sketch, digits())[store.read().example_id]
    errors = (store.read().sketches - truth).norm(dim=1) / truth.norm(dim=1)
    assert errors.quantile(0.9) <= 5e-3


def test_a_mean_over_tokens_with_an_example_that_has_none(tmp_path):
    """The mean over no labels is NaN, its gradient too: such an example has no part in the step, its row is zero."""
    rows = sentences()
    for empty in (0, 3, 23):
        rows[empty]["labels"].fill_(-100)
    loader = DataLoader(rows, batch_size=8)

    class Half(Tokens):
        def training_step(self, batch, batch_idx):
            table = nn.functional.embedding(batch["x"], self.table.weight)
            counts = batch["labels"] != -100
            each = F.cross_entropy(self.head(table).mT, batch["labels"] * counts, reduction="none")
            return (each * counts).sum() / counts.sum()

    options = {"index_key": "number", "dim": 64, "fallback": "loop", "weight_fn": num_labels}
    with pytest.warns(UserWarning, match="serves 1 of 3 parameters.*\n  table.weight"):
        model = fit(tmp_path, writer(tmp_path, **options), model=Half, data=loader, max_epochs=1)
    store = GradientStore.open(tmp_path / "store")
    examples = [{k: v[None] for k, v in row.items() if k != "number"} for row in rows]
    truth = alone(model, store.sketch, examples).nan_to_num(0)
    torch.testing.assert_close(store.read().sketches, truth, rtol=1e-4, atol=1e-6)
    assert not truth[3].any()
    assert truth[4].any()


@pytest.mark.parametrize("fallback", ["loop", "vmap"])
@pytest.mark.filterwarnings("ignore:fallback='.*' serves")
def test_a_compiled_module_goes_through_the_second_pass_alone(tmp_path, fallback):
    class Compiled(Still):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    options = {"fallback": fallback, "index_key": "hash"}
    model = fit(tmp_path, writer(tmp_path, **options), model=Compiled, data=DataLoader(dataset(48), batch_size=24))
    store = GradientStore.open(tmp_path / "store")
    truth = alone(model, store.sketch, digits(48))
    torch.testing.assert_close(store.read().sketches, truth.repeat(2, 1), rtol=1e-4, atol=1e-6)


class Disturbed(Digits):
    """Dropout, batch statistics, a metric, lists, logs, a batch that is changed in place, and a recurrent part."""

    def __init__(self):
        super().__init__()
        self.rows = nn.GRU(8, 8, batch_first=True)

    def training_step(self, batch, batch_idx):
        images = batch[0].mul_(0.5)
        images = images + self.rows(images.squeeze(1))[0][:, None]
        return super().training_step([images, batch[1]], batch_idx)


@pytest.mark.filterwarnings("ignore:fallback='loop' serves 4 of 10")
def test_training_is_the_same_bit_for_bit(tmp_path):
    plain = DataLoader(dataset(128), batch_size=24, shuffle=True)
    options = {"fallback": "loop", "every_n_train_steps": 2}
    watched = fit(tmp_path, writer(tmp_path, **options), model=Disturbed, data=data(), accumulate_grad_batches=2)
    other = fit(tmp_path, model=Disturbed, data=plain, accumulate_grad_batches=2)
    one, two = outcome(watched), outcome(other)
    assert one["metrics"].pop("sketches/rows") == 128  # steps 2, 4 and 6 of batches of 24 and 8
    assert_same(one, two)
    assert not any(part._forward_hooks for part in watched.modules())


def test_nothing_to_serve_says_nothing_and_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_sketch.callbacks.gradient_sketch_writer._example_rows.SecondPass", None)
    fit(tmp_path, writer(tmp_path, fallback="loop"), model=Still, data=data(), max_epochs=1)
    assert len(GradientStore.open(tmp_path / "store")) == 128


def test_without_a_fallback_both_messages_name_it(tmp_path):
    with pytest.warns(UserWarning, match="leave out 1 of 4 parameters; fallback='loop' would serve them"):
        fit(tmp_path / "a", writer(tmp_path / "a"), model=Gated, data=data(), max_epochs=1)

    class Every(Still):
        def training_step(self, batch, batch_idx):
            x = self.net(batch[0])
            return F.cross_entropy(x / x.norm(), batch[1])

    with pytest.raises(MisconfigurationException, match="fallback='loop'"):
        fit(tmp_path / "b", writer(tmp_path / "b"), model=Every, data=data(), max_epochs=1)


def test_what_another_rank_cannot_split_is_left_out_on_all(tmp_path, monkeypatch):
    """Its first batch may take a way through the module that this one's does not."""
    run, model = trainer(tmp_path), Still()
    monkeypatch.setattr(type(run), "world_size", 2)
    elsewhere = {"net.4.bias": "seen elsewhere"}
    monkeypatch.setattr(run.strategy, "broadcast", lambda own, rank: elsewhere if rank else own)
    with pytest.warns(UserWarning, match=r"leave out 1 of 6 .*\n  net.4.bias: seen elsewhere"):
        assert (
            left_by_hooks(run, model, Layout.of(model), dataset(8)[:], None, "mean", BatchStructure(), None)
            == elsewhere
        )
