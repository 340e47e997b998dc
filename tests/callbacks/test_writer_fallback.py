"""A second pass per example covers the parameters that hooks do not support, and leaves training unchanged."""

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from models import Digits, dataset, fit
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_do_no_harm import assert_same, outcome
from test_writer_per_example import Recurrent, Still, Tokens, data, sentences, writer
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import GradientStore
from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.preserve_state import preserve_state


def alone(model, sketch, examples):
    """Return the sketched gradients of single examples, by autograd."""
    layout, rows = Layout.of(model), []
    with preserve_state(model):
        for example in examples:
            gradients = torch.autograd.grad(model.training_step(example, 0), layout.parameters(model))
            rows.append(sketch.matvec(torch.cat([g.flatten() for g in gradients])))
    return torch.stack(rows)


def digits(count=128):
    return [dataset()[i : i + 1] for i in range(count)]


class Gated(Still):
    """A weight that is used in two places, of which hooks see one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.inner = nn.Linear(10, 10)

    def training_step(self, batch, batch_idx):
        x = self.net(batch[0])
        x = self.inner(x) + F.linear(x.tanh(), self.inner.weight)
        return F.cross_entropy(x, batch[1])


@pytest.mark.parametrize("arguments", [{"accumulate_grad_batches": 3}, slow({})], ids=str)
@pytest.mark.parametrize(
    ("model", "unsupported", "fallback"), [(Recurrent, 4, "loop"), (Gated, 1, "vmap"), slow(Gated, 1, "loop")]
)
def test_rows_cover_all_parameters(tmp_path, model, unsupported, arguments, fallback):
    """Six batches an epoch, the last smaller; windows of three."""
    words = rf"fallback='{fallback}' covers {unsupported} of \d parameters, .* pass .*more for every batch"
    with pytest.warns(UserWarning, match=words):
        fitted = fit(tmp_path, writer(tmp_path, fallback=fallback), model=model, data=data(), **arguments)
    store = GradientStore.open(tmp_path / "store")
    rows = store.read()
    assert not store.spec.left_out
    assert store.spec.parameters == Layout.of(fitted)
    truth = alone(fitted, store.sketch, digits())[rows.example_id]
    assert ((rows.sketches - truth).norm(dim=1) <= 1e-5 * truth.norm(dim=1)).all()
    assert len(rows) == 256


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fallback='loop' covers")
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
    """The mean over no labels is NaN, and so is its gradient: the example has no part in the step, and its row is 0."""
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
    with pytest.warns(UserWarning, match="covers 1 of 3 parameters.*\n  table.weight"):
        model = fit(tmp_path, writer(tmp_path, **options), model=Half, data=loader, max_epochs=1)
    store = GradientStore.open(tmp_path / "store")
    examples = [{k: v[None] for k, v in row.items() if k != "number"} for row in rows]
    truth = alone(model, store.sketch, examples).nan_to_num(0)
    torch.testing.assert_close(store.read().sketches, truth, rtol=1e-4, atol=1e-6)
    assert not truth[3].any()
    assert truth[4].any()


@pytest.mark.parametrize("fallback", ["loop", "vmap"])
@pytest.mark.filterwarnings("ignore:fallback='.*' covers")
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


@pytest.mark.filterwarnings("ignore:fallback='loop' covers 4 of 10")
def test_training_is_the_same_bit_for_bit(tmp_path):
    plain = DataLoader(dataset(128), batch_size=24, shuffle=True)
    options = {"fallback": "loop", "every_n_train_steps": 2}
    watched = fit(tmp_path, writer(tmp_path, **options), model=Disturbed, data=data(), accumulate_grad_batches=2)
    other = fit(tmp_path, model=Disturbed, data=plain, accumulate_grad_batches=2)
    one, two = outcome(watched), outcome(other)
    assert one["metrics"].pop("sketches/rows") == 128  # steps 2, 4 and 6 of batches of 24 and 8
    assert_same(one, two)
    assert not any(part._forward_hooks for part in watched.modules())


def test_a_fallback_without_work_warns_of_nothing_and_takes_no_pass(tmp_path):
    calls = {None: 0, "loop": 0}

    class Counting(Still):
        def training_step(self, batch, batch_idx):
            calls[fallback] += 1
            return super().training_step(batch, batch_idx)

    for fallback in calls:
        folder = tmp_path / str(fallback)
        fit(folder, writer(folder, fallback=fallback), model=Counting, data=data(), max_epochs=1)
        assert len(GradientStore.open(folder / "store")) == 128
    assert calls["loop"] == calls[None]


def test_without_a_fallback_both_messages_name_it(tmp_path):
    with pytest.warns(UserWarning, match="leave out 1 of 4 parameters; fallback='loop' would cover them"):
        fit(tmp_path / "a", writer(tmp_path / "a"), model=Gated, data=data(), max_epochs=1)

    class Every(Still):
        def training_step(self, batch, batch_idx):
            x = self.net(batch[0])
            return F.cross_entropy(x / x.norm(), batch[1])

    with pytest.raises(MisconfigurationException, match="fallback='loop'"):
        fit(tmp_path / "b", writer(tmp_path / "b"), model=Every, data=data(), max_epochs=1)
