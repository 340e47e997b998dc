"""Rows that the writer makes are right on every batch or marked, and carry what belongs to their step and weights."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from marks import slow, some
from models import Digits, dataset, fit, trainer
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler
from uneven import KINDS, Net, truth_of

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset, sketch_gradients
from lightning_sketch.attribution import scores

WEIGHTS = torch.tensor([1.0, 1.0, 30.0])


@pytest.mark.slow
@pytest.mark.parametrize("per", ["step", "example"])
def test_of_a_thousand_batches_at_most_one_row_is_wrong_and_unmarked(tmp_path, per):
    """Rows of training examples, or at a checkpoint; weights stand still, so that one pass tells the truth."""
    wrong = {}
    for kind, (draw, loss) in KINDS.items():
        for seed in range(10 if per == "example" else 4):
            torch.manual_seed(seed)

            class Model(LightningModule):
                def __init__(self):
                    super().__init__()
                    self.net = Net()

                def training_step(self, batch, batch_idx):
                    return loss(self.net, batch["data"])  # noqa: B023

                def validation_step(self, batch, batch_idx):
                    pass

                def configure_optimizers(self):
                    return torch.optim.SGD(self.parameters(), lr=0.0)

            counts = torch.randint(2, 12, (20,)).tolist()
            starts = [sum(counts[:i]) for i in range(20)]
            batches = [
                {"data": draw(even=i == 0, count=count), "number": torch.arange(count) + start}
                for i, (count, start) in enumerate(zip(counts, starts, strict=True))
            ]
            model, folder = Model(), tmp_path / f"{kind}{seed}"
            run = trainer(folder, writer(folder, per=per, index_key="number", dim=24), max_epochs=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if per == "example":
                    run.fit(model, DataLoader(batches, batch_size=None))
                else:
                    run.validate(model, DataLoader(batches, batch_size=None), verbose=False)
            rows = rows_of(folder, "fit" if per == "example" else "validate")
            truth = torch.cat([
                truth_of(model.net, loss, batch["data"], rows.sketch, count)
                for batch, count in zip(batches, counts, strict=True)
            ])  # fmt: skip
            assert rows.example_id.tolist() == list(range(len(truth)))
            off = (rows.sketches - truth).norm(dim=1) > 2e-3 * truth.norm(dim=1) + 1e-6
            wrong[kind] = wrong.get(kind, 0) + int((off & rows.scale_known).sum())
    assert sum(wrong.values()) <= 1, wrong


class Classes(LightningModule):
    """Class weights, of which the rare class is in later batches only, and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], weight=WEIGHTS)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def examples(count=48):
    torch.manual_seed(1)
    labels = torch.randint(0, 2, (count,))
    labels[[19, 30, 33, 45]] = 2
    return list(zip(torch.randn(count, 5), labels, strict=True))


def loader(data=None, **options):
    return DataLoader(IndexedDataset(data or examples()), **{"batch_size": 8, **options})


def writer(tmp_path, **options):
    return GradientSketchWriter(tmp_path / "store", **{"dim": 64, "dtype": "float32", **options})


def rows_of(tmp_path, stage):
    return GradientStore.open(tmp_path / "store").where(stage=stage).read()


def weight_of(batch):
    return float(WEIGHTS[batch[1]].sum())


def test_training_rows_of_unknown_weights_are_marked_those_written_before_too(tmp_path):
    """Their directions are right. What an example weighs is said by weight_fn; then all is known, and right."""
    with pytest.warns(UserWarning, match="marked as not known.*weight_fn"):
        fit(
            tmp_path / "guessed",
            writer(tmp_path / "guessed", per="example"),
            model=Classes,
            data=loader(),
            max_epochs=1,
        )
    guessed = rows_of(tmp_path / "guessed", "fit")
    assert len(guessed) == 48
    assert not guessed.scale_known.any()
    told = writer(tmp_path / "told", per="example", weight_fn=weight_of)
    fit(tmp_path / "told", told, model=Classes, data=loader(), max_epochs=1)
    known = rows_of(tmp_path / "told", "fit")
    assert known.scale_known.all()
    assert known.weight.tolist() == WEIGHTS[torch.stack([y for _, y in examples()])].tolist()
    cosine = F.cosine_similarity(guessed.sketches, known.sketches)
    torch.testing.assert_close(cosine, torch.ones(48))
    ratio = guessed.sketches.norm(dim=1) / known.sketches.norm(dim=1)
    assert ratio[:16].tolist() == pytest.approx([1.0] * 16)
    assert not (ratio - 1).abs().max() < 0.5


def test_rows_at_a_checkpoint_are_right_and_those_before_the_first_doubt_are_marked(tmp_path):
    with pytest.warns(UserWarning, match="from batch 3 on.*earlier rows of this pass is marked"):
        trainer(tmp_path, writer(tmp_path)).validate(module := Classes(), loader(), verbose=False)
    rows = rows_of(tmp_path, "validate")
    truth = sketch_gradients(module, loader(), rows.sketch, engine="loop")
    torch.testing.assert_close(rows.sketches, truth.sketches, rtol=1e-4, atol=1e-6)
    assert rows.scale_known.tolist() == [False] * 16 + [True] * 32


def contrastive(module, batch):
    z = F.normalize(torch.cat([module.net(batch[0]), module.net(batch[0] * 0.9)]))
    pairs = torch.arange(len(batch[0]))
    same = torch.eye(2 * len(pairs)) * 1e9
    return F.cross_entropy(z @ z.T - same, torch.cat([pairs + len(pairs), pairs]))


def test_a_contrastive_loss_has_no_rows_of_zeros(tmp_path):
    """Of a batch of one example the loss is zero, whatever the weights."""

    class Contrastive(Classes):
        def training_step(self, batch, batch_idx):
            return contrastive(self, batch)

    with pytest.raises(ValueError, match="couples the examples"), pytest.warns(UserWarning, match="one at a time"):
        trainer(tmp_path, writer(tmp_path)).validate(Contrastive(), loader(), verbose=False)


SCHEDULES = {
    "linear to zero, per step": (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: max(0.0, 1 - k / 12)),
        "step",
    ),
    "cosine, per epoch": (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2), "epoch"),
    "one cycle": (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12), "step"),
}


@pytest.mark.parametrize("name", some(SCHEDULES, ["linear to zero, per step"]))
def test_the_rate_of_a_row_is_that_of_its_step(tmp_path, name):
    """Also at a checkpoint, of this training, of a file, and of a file that was saved by a Trainer without a writer."""
    make, interval = SCHEDULES[name]
    used = []

    class Scheduled(Classes):
        def on_before_optimizer_step(self, optimizer):
            used.append(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": make(optimizer), "interval": interval}]

    data = loader([(x, y.clamp(max=1)) for x, y in examples()])
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    run = trainer(tmp_path, writer(tmp_path), save, max_epochs=2, enable_checkpointing=True)
    run.fit(Scheduled(), data)
    run.validate(run.lightning_module, data, verbose=False)
    assert rows_of(tmp_path, "fit").lr.tolist() == pytest.approx(used)
    assert rows_of(tmp_path, "validate").lr.unique().tolist() == pytest.approx([used[-1]])

    last = tmp_path / "saved" / "last.ckpt"
    again = trainer(tmp_path / "file", writer(tmp_path / "file"), save, enable_checkpointing=True)
    again.validate(Scheduled(), data, ckpt_path=last, verbose=False)
    assert rows_of(tmp_path / "file", "validate").lr.unique().tolist() == pytest.approx([used[-1]])

    saved = torch.load(last, weights_only=False)
    saved["callbacks"] = {}
    torch.save(saved, last)
    trainer(tmp_path / "none", writer(tmp_path / "none")).validate(Scheduled(), data, ckpt_path=last, verbose=False)
    assert rows_of(tmp_path / "none", "validate").lr.isnan().all()  # the file has that of the next step only


def test_rows_and_queries_of_another_frozen_part_or_other_statistics_do_not_meet(tmp_path):
    torch.manual_seed(0)
    model = Digits()
    run = trainer(tmp_path, writer(tmp_path, parameters="net.5.*"))

    class Still(Digits):
        def validation_step(self, batch, batch_idx):
            pass

    model = Still()
    data = DataLoader(IndexedDataset(dataset(32)), batch_size=16)
    run.validate(model, data, verbose=False)
    store = GradientStore.open(tmp_path / "store")
    assert scores(store.sketch_gradients(model, data), store).shape == (32, 32)
    for change in (model.net[0].weight, model.net[1].running_mean):
        before = change.detach().clone()
        change.data.add_(0.1)
        with pytest.raises(ValueError, match="queries were taken at weights"):
            store.scores(store.sketch_gradients(model, data))
        change.data.copy_(before)
    assert store.scores(store.sketch_gradients(model, data)).shape == (32, 32)


COLLATORS = ("DataCollatorWithPadding", "DataCollatorForLanguageModeling")


class Loads(LightningModule):
    """Notes what it gets; a model of texts, or of words."""

    def __init__(self):
        super().__init__()
        self.table, self.head, self.got = nn.Embedding(20, 6), nn.Linear(6, 20), []

    def training_step(self, batch, batch_idx):
        self.got.append(type(batch).__name__)
        labels = batch["labels"]
        out = self.head(self.table(batch["input_ids"]))
        if labels.ndim == 1:
            return F.cross_entropy((out * batch["attention_mask"][..., None]).mean(1), labels)
        return F.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("name", COLLATORS)
@pytest.mark.parametrize("workers", [0, slow(2)])
def test_an_indexed_data_set_works_with_collators_of_hugging_face_with_and_without_a_writer(tmp_path, name, workers):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate("<pad> a b c d e f".split())}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>")
    options = {"mlm": False} if "Language" in name else {}
    collate = getattr(transformers, name)(tokenizer, **options)
    label = {} if options else {"labels": 1}
    texts = [{"input_ids": [1 + (i + j) % 6 for j in range(2 + i % 4)], **label} for i in range(12)]
    data = DataLoader(IndexedDataset(texts), 4, sampler=[5, 2, 11, 0, 1, 3, 4, 6, 10, 9, 8, 7], collate_fn=collate,
                      num_workers=workers)  # fmt: skip

    model = Loads()
    run = trainer(tmp_path, writer(tmp_path), max_epochs=1)
    run.fit(model, data)
    run.validate(model, data, verbose=False)
    assert rows_of(tmp_path, "validate").example_id.tolist() == [5, 2, 11, 0, 1, 3, 4, 6, 10, 9, 8, 7]
    assert sorted(rows_of(tmp_path, "fit").example_ids.flatten().tolist()) == list(range(12))
    trainer(tmp_path / "plain", max_epochs=1).fit(model, data)  # no writer
    model.got += [type(batch).__name__ for batch in data]  # no Trainer
    assert set(model.got) == {"BatchEncoding"}


def test_rows_of_several_optimizers_are_not_announced_with_a_number(tmp_path, capsys):
    class Two(Classes):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net[0], self.net[3])]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()

    fit(tmp_path, writer(tmp_path), model=Two, data=loader(), max_epochs=1)
    assert len(rows_of(tmp_path, "fit")) == 12
    said = capsys.readouterr()
    assert "rows of" not in said.out + said.err


def test_shuffled_examples_without_ids_are_said(tmp_path):
    model = Classes()
    data = DataLoader(examples(), 8, shuffle=True)
    with pytest.warns(UserWarning, match=r"no ids.*IndexedDataset"), pytest.warns(UserWarning, match="shuffling"):
        trainer(tmp_path, writer(tmp_path, weight_fn=weight_of)).validate(model, data, verbose=False)


def test_a_contrastive_loss_is_refused_while_training_too(tmp_path):
    class Contrastive(Classes):
        def training_step(self, batch, batch_idx):
            return contrastive(self, batch)

    with pytest.raises(MisconfigurationException, match="no gradient of Contrastive can be split"):
        fit(tmp_path, writer(tmp_path, per="example"), model=Contrastive, data=loader(), max_epochs=1)


@pytest.mark.parametrize("place", ["first", "key"])
def test_class_weights_are_noticed_wherever_the_classes_are(tmp_path, place):
    """One rare example in a batch of eight: the pair whose losses are compared has it."""

    class Placed(Classes):
        def training_step(self, batch, batch_idx):
            x, y = (batch["x"], batch["target"]) if place == "key" else (batch[1], batch[0])
            return F.cross_entropy(self.net(x), y, weight=WEIGHTS)

    def item(x, y, i):
        return {"x": x, "target": y, "number": i} if place == "key" else (y, x, i)

    data = [item(x, y, i) for i, (x, y) in enumerate(examples())]
    key = "number" if place == "key" else 2
    with pytest.warns(UserWarning, match="marked as not known"):
        fit(
            tmp_path,
            writer(tmp_path, per="example", index_key=key),
            model=Placed,
            data=DataLoader(data, 8),
            max_epochs=1,
        )
    assert not rows_of(tmp_path, "fit").scale_known.any()


@pytest.mark.slow
def test_of_many_batches_some_are_checked_and_a_new_weighing_marks_all_rows(tmp_path):
    """Class weights from batch 40 on, later than all batches are checked; three losses are computed for each check."""
    torch.manual_seed(0)
    data = [(x, y, i) for i, (x, y) in enumerate(examples() * 8)]
    for changes in (False, True):

        class Later(Classes):
            calls = 0

            def training_step(self, batch, batch_idx):
                Later.calls += 1
                weight = WEIGHTS if changes and self.global_step >= 40 else None  # noqa: B023
                return F.cross_entropy(self.net(batch[0]), batch[1], weight=weight)

        folder = tmp_path / str(changes)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = writer(folder, per="example", index_key=2)
            fit(folder, made, model=Later, data=DataLoader(data, 4), max_epochs=1)
        assert any("marked as not known" in str(one.message) for one in said) == changes
        rows = rows_of(folder, "fit")
        assert len(rows) == len(data) == 4 * 96
        assert rows.scale_known.tolist() == [not changes] * len(data)
        if not changes:
            checked = (Later.calls - 96) / 3  # less than the half: the first 32 batches, and a quarter of the others
            assert 32 + 64 / 8 < checked < 32 + 64 / 2


@pytest.mark.slow
@pytest.mark.parametrize("late", [35, 41, 50])
def test_a_class_that_comes_late_is_checked(tmp_path, late):
    """The loss has class weights, of which the first batches show nothing: all their examples are of one weight."""

    class Weighted(Classes):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1], weight=WEIGHTS)

    classes = [i // 3 % 2 for i in range(60 * 4)]
    classes[4 * late : 4 * late + 4] = 2, 1, 1, 1
    data = [(x, y, i) for i, ((x, _), y) in enumerate(zip(examples(60 * 4), classes, strict=True))]
    with pytest.warns(UserWarning, match="marked as not known"):
        fit(
            tmp_path, writer(tmp_path, per="example", index_key=2), model=Weighted, data=DataLoader(data, 4),
            max_epochs=1,
        )  # fmt: skip
    assert not rows_of(tmp_path, "fit").scale_known.any()


def test_the_scale_of_a_masked_mean_is_known_in_training(tmp_path):
    class Masked(Classes):
        def training_step(self, batch, batch_idx):
            each = F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")
            return (each * batch["mask"]).sum() / batch["mask"].sum().clamp(min=1)

    torch.manual_seed(0)
    data = [
        {"x": x, "y": y, "mask": float(i % 5 != 2), "number": i} for i, (x, y) in enumerate(examples())
    ]  # fmt: skip
    fit(
        tmp_path,
        writer(tmp_path, per="example", index_key="number"),
        model=Masked,
        data=DataLoader(data, 8),
        max_epochs=1,
    )
    rows = rows_of(tmp_path, "fit")
    assert rows.scale_known.all()
    assert rows.weight.tolist() == [float(i % 5 != 2) for i in range(48)]


def test_loaders_of_different_batches_and_a_cache_made_in_validation(tmp_path):
    """Pairs and triples; a buffer that a forward pass replaces in inference mode has no version."""

    class Caches(Classes):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(3), persistent=False)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.cache = self.cache * 1

    model = Caches()
    triples = [(x, y, i) for i, (x, y) in enumerate(examples())]
    run = trainer(tmp_path, writer(tmp_path, index_key="hash"), max_epochs=1)
    run.validate(model, [DataLoader(examples(), 8), DataLoader(triples, 8)], verbose=False)
    store = GradientStore.open(tmp_path / "store")
    assert store.metadata()["dataloader"].tolist() == [0] * 48 + [1] * 48
    assert len(store.sketch_gradients(model, DataLoader(examples(), 8))) == 48
    trainer(tmp_path / "fit", writer(tmp_path / "fit"), max_epochs=1).fit(model, DataLoader(examples(), 8))


def test_a_sampler_that_leaves_examples_out_is_said(tmp_path):
    sampler = WeightedRandomSampler(torch.ones(48), 16, replacement=True)
    model = Classes()
    data = loader(sampler=sampler)
    with pytest.warns(UserWarning, match="with replacement"):
        trainer(tmp_path, writer(tmp_path, weight_fn=weight_of)).validate(model, data, verbose=False)
