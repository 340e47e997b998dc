"""A row of an optimizer step is S times the gradient that the step uses, with its step, loss, rate and examples."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, fit, loader, trainer
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from test_do_no_harm import assert_same, outcome
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout


class Spy(Callback):
    """Record what the rows should contain, by means of Lightning alone."""

    def __init__(self):
        self.gradients, self.losses, self.rates, self.marks = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        grads = [p.grad if p.grad is not None and id(p) in own else torch.zeros_like(p) for p in pl_module.parameters()]
        self.gradients.append(torch.cat([g.to_dense().flatten() for g in grads]))
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.marks.append(module_fingerprint(pl_module))


def writer(tmp_path, **arguments):
    return GradientSketchWriter(tmp_path / "store", **{"dim": 128, "dtype": "float32", **arguments})


def rows_of(tmp_path):
    store = GradientStore.open(tmp_path / "store")
    store.verify()
    return store.read()


def assert_sketched(rows, gradients):
    """Compare up to the rounding of float32 sums in another order."""
    expected = rows.sketch.matvec(torch.stack(gradients))
    assert (rows.sketches - expected).norm(dim=1).max() <= 1e-5 * expected.norm(dim=1).max()


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.01}], ids=str)
def test_rows_are_the_gradients_of_the_steps(tmp_path, arguments):
    """Gradients are accumulated and not yet clipped; of eight batches per epoch the last window of three has two."""
    spy = Spy()
    model = fit(tmp_path, writer(tmp_path), spy, **arguments)
    rows = rows_of(tmp_path)
    assert rows.step.tolist() == list(range(1, len(spy.gradients) + 1))
    assert model.trainer.global_step == len(rows)
    assert_sketched(rows, spy.gradients)
    assert rows.lr.tolist() == pytest.approx(spy.rates)
    assert rows.metadata()["fingerprint"].tolist() == spy.marks
    assert rows.epoch.tolist() == sorted(rows.epoch.tolist())
    if not arguments:
        assert rows.loss.tolist() == pytest.approx(model.losses, rel=1e-5)


def test_training_is_the_same_bit_for_bit(tmp_path):
    data = DataLoader(IndexedDataset(dataset()), batch_size=32, shuffle=True)
    plain = DataLoader(dataset(), batch_size=32, shuffle=True)
    arguments = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    watched = fit(tmp_path, writer(tmp_path), data=data, **arguments)
    alone = fit(tmp_path, data=plain, **arguments)
    one, other = outcome(watched), outcome(alone)
    assert one["metrics"].pop("sketches/rows") == 8
    assert_same(one, other)
    assert "_on_before_batch_transfer" not in vars(watched)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_have_the_ids_of_their_examples(tmp_path, workers):
    """The ids of a row are those of its step's examples, under shuffling and accumulation."""

    class Seen(Digits):
        def training_step(self, batch, batch_idx):
            self.losses.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    data = DataLoader(IndexedDataset(dataset()), batch_size=32, shuffle=True, num_workers=workers)
    model = fit(tmp_path, writer(tmp_path), model=Seen, data=data, accumulate_grad_batches=2)
    ids = rows_of(tmp_path).example_ids
    assert ids.shape == (8, 64)
    sums = [dataset()[batch][0].sum().item() for row in ids for batch in row.split(32)]
    assert model.losses[::2] == pytest.approx(sums)
    assert ids[:4].flatten().sort()[0].tolist() == list(range(256))


def test_every_third_step_some_parameters_and_a_key(tmp_path):
    class Keyed(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    rows = [{"x": x, "y": y, "number": i} for i, (x, y) in enumerate(dataset(96))]
    options = {"every_n_train_steps": 3, "parameters": "net.5.*", "index_key": "number"}
    model = fit(tmp_path, writer(tmp_path, **options), model=Keyed, data=DataLoader(rows, batch_size=16))
    found = rows_of(tmp_path)
    assert found.step.tolist() == [3, 6, 9, 12]
    assert found.sketch.n == 650
    assert found.example_ids[1].tolist() == list(range(80, 96))
    assert found.loss.tolist() == pytest.approx(model.losses[2::3])  # of the same step


class Sparse(Digits):
    """A module with sparse gradients, and with parameters that get none."""

    def __init__(self):
        super().__init__()
        self.table, self.unused = nn.Embedding(17, 64, sparse=True), nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        features = self.table((batch[0].flatten(1) * 16).long()).mean(1)
        return F.cross_entropy(self.net[5](features), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_sparse_and_missing_gradients(tmp_path):
    spy = Spy()
    fit(tmp_path, writer(tmp_path), spy, model=Sparse)
    assert_sketched(rows_of(tmp_path), spy.gradients)


class Adversarial(LightningModule):
    """Manual optimization by two optimizers, each for its own half; the gradients of the other half stay."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(64, 10), nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        for part, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self.one(x) + self.two(x), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            assert part.weight.grad is not None

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=lr) for part, lr in ((self.one, 0.1), (self.two, 0.2))]


def test_several_optimizers_under_manual_optimization(tmp_path):
    spy = Spy()
    fit(tmp_path, writer(tmp_path), spy, model=Adversarial, max_epochs=1)
    rows = rows_of(tmp_path)
    assert rows.step.tolist() == list(range(1, 17))
    assert rows.lr.tolist() == pytest.approx([0.1, 0.2] * 8)
    assert_sketched(rows, spy.gradients)


def test_closures_that_are_called_several_times_give_one_row_per_step(tmp_path):
    class Newton(Digits):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    fit(tmp_path, writer(tmp_path), model=Newton, max_epochs=1)
    assert rows_of(tmp_path).step.tolist() == list(range(1, 9))


def test_a_gradient_that_is_not_finite_is_marked(tmp_path):
    class Bursting(Digits):
        def on_after_backward(self):
            if self.global_step == 2:
                self.net[5].bias.grad[0] = torch.inf

    fit(tmp_path, writer(tmp_path), model=Bursting, max_epochs=1)
    rows = rows_of(tmp_path)
    assert rows.finite.tolist()[:4] == [True, True, False, False]  # Adam made the weights NaN
    assert not rows.sketches[2].any()


def test_queries_are_stored_at_every_validation(tmp_path):
    """Each epoch writes one row per example, of the training loss; the sanity check writes nothing."""

    class Checked(Digits):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    seed_everything(3, verbose=False)
    model = Checked()
    run = trainer(tmp_path, writer(tmp_path, queries="val"), num_sanity_val_steps=2)
    run.fit(model, loader(), DataLoader(IndexedDataset(dataset(40)), batch_size=16))
    store = GradientStore.open(tmp_path / "store")
    queries = store.queries()
    assert list(queries) == [8, 16]
    assert queries[16].example_id.tolist() == list(range(40))
    assert queries[16].fingerprint == module_fingerprint(model) != queries[8].fingerprint
    assert len(store) == 16


class Every(Digits):
    """A module with all evaluation steps, which do nothing."""

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch[1]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_rows_of_examples_at_a_checkpoint(tmp_path, stage):
    """Rows are at the final weights, in inference mode, with the step and the rate of the fit."""
    seed_everything(3, verbose=False)
    model = Every()
    watch = writer(tmp_path, row_fn=lambda m, b: 2 * (F.cross_entropy(m.net(b[0]), b[1], reduction="none"),))
    run = trainer(tmp_path, watch, max_epochs=1)
    data = DataLoader(IndexedDataset(dataset(40)), batch_size=16)
    run.fit(model, loader(), data)
    getattr(run, stage)(model, data)
    store = GradientStore.open(watch.dirpath)
    assert len(store) == 8 + 40
    rows = store.where(stage=stage).read()
    assert rows.example_id.tolist() == list(range(40))
    assert rows.fingerprint == module_fingerprint(model)
    assert rows.step.unique().tolist() == [8]
    assert rows.lr.unique().tolist() == pytest.approx([3e-3])
    model.eval()
    layout = Layout.of(model)
    x, y = dataset(40)[7]
    loss = F.cross_entropy(model.net(x[None]), y[None])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, layout.parameters(model))])
    torch.testing.assert_close(rows.sketches[7], rows.sketch.matvec(gradient), rtol=1e-4, atol=1e-6)
    assert float(rows.loss[7]) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # validation needs no ModelCheckpoint
def test_rows_at_a_checkpoint_file_have_its_step_and_rate(tmp_path):
    save = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")

    class Checked(Digits):
        def validation_step(self, batch, batch_idx):
            pass

    model = fit(tmp_path, save, enable_checkpointing=True)
    other = Checked()
    run = trainer(tmp_path, writer(tmp_path))
    run.validate(other, DataLoader(dataset(20), batch_size=20), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    rows = rows_of(tmp_path)
    assert rows.step.unique().tolist() == [8]
    assert rows.lr.unique().tolist() == pytest.approx([3e-3])
    assert rows.fingerprint == module_fingerprint(other) != module_fingerprint(model)


@pytest.mark.parametrize("key", [None, "hash"])
def test_several_data_loaders_are_told_apart(tmp_path, key):
    """Both have an example of index 0; scores may add up rows of equal contents, but not those of equal indices."""

    class Every(Digits):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    whole = dataset(40)
    parts = [torch.utils.data.Subset(whole, range(start, start + 20)) for start in (0, 20)]
    loaders = [DataLoader(IndexedDataset(part) if key is None else part, batch_size=16) for part in parts]
    warned = pytest.warns(UserWarning, match=r"where\(dataloader=0\)") if key is None else nullcontext()
    with warned:
        trainer(tmp_path, writer(tmp_path, index_key=key)).validate(Every(), loaders, verbose=False)
    store = GradientStore.open(tmp_path / "store")
    assert [len(store.where(dataloader=i)) for i in (0, 1)] == [20, 20]
    assert len(store.metadata()["example_id"].unique()) == (20 if key is None else 40)


def test_two_writers_at_once(tmp_path):
    """Both get the ids of the examples, and the module gets batches without ids."""
    writers = [GradientSketchWriter(tmp_path / per, dim=64, name=per, per=per) for per in ("step", "example")]
    data = DataLoader(IndexedDataset(dataset()), batch_size=32, shuffle=True)
    model = fit(tmp_path, *writers, data=data, max_epochs=1)
    steps, examples = (GradientStore.open(one.dirpath).metadata() for one in writers)
    assert torch.equal(steps["example_ids"].flatten(), examples["example_id"])
    assert "_on_before_batch_transfer" not in vars(model)


def test_indexed_batches_inside_others_are_refused(tmp_path):
    data = {"one": DataLoader(IndexedDataset(dataset(32))), "two": DataLoader(dataset(32))}
    with pytest.raises(ValueError, match="inside other batches"):
        fit(tmp_path, writer(tmp_path), data=data)


def test_files_go_where_the_checkpoints_go_and_rows_are_logged(tmp_path):
    watch = GradientSketchWriter(dim=64)
    logger = CSVLogger(tmp_path, name="mine")
    model = fit(tmp_path, watch, logger=logger)
    assert watch.dirpath == f"{tmp_path}/mine/version_0/sketches"
    assert len(GradientStore.open(watch.dirpath)) == 16
    assert model.trainer.callback_metrics["sketches/rows"] == 16
    assert "sketches/rows" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_a_small_model_gets_as_many_numbers_as_it_has(tmp_path):
    fit(tmp_path, writer(tmp_path, dim=4096), max_epochs=1)
    assert rows_of(tmp_path).sketch.dim == 698


@pytest.mark.parametrize(
    ("arguments", "rows"), [({}, "8"), ({"per": "example", "every_n_train_steps": 2}, "up to 256")], ids=str
)
def test_the_size_is_printed_at_the_start(tmp_path, caplog, arguments, rows):
    """A row per example: for four steps of two batches of 32."""
    data = DataLoader(IndexedDataset(dataset()), batch_size=32)
    accumulate = 2 if arguments else 1
    fit(tmp_path, writer(tmp_path, **arguments), data=data, max_epochs=accumulate, accumulate_grad_batches=accumulate)
    size = "0.1 MB" if arguments else "0.0 MB"
    assert f"sketches: {rows} rows of 0.5 kB, {size}, to {tmp_path}/store" in caplog.messages
    assert len(rows_of(tmp_path)) == int(rows.split()[-1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sketch": "srht"}, "sketch='srht'.*'block_srht'"),
        ({"per": "epoch"}, "per='epoch'"),
        ({"queries": "train"}, "queries='train'.*'val'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"reduction": "max"}, "reduction='max'.*'mean', 'sum'"),
        ({"engine": "fast"}, "engine='fast'.*'auto', 'hooks', 'loop', 'vmap'"),
        ({"fallback": "auto"}, "fallback='auto'.*'loop', 'vmap', None"),
        ({"dim": 0}, "need dim >= 1, got 0"),
        ({"every_n_train_steps": 0}, "need every_n_train_steps >= 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, words, untyped):
    with pytest.raises(ValueError, match=words):
        writer(tmp_path, **arguments)
