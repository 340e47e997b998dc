"""Which store a writer writes to, what it does if that is another one, lost or broken, and the user's own columns."""

import errno
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, fit, loader, trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_gradient_sketch_writer import Every, writer
from torch.utils.data import DataLoader, Dataset

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset
from lightning_sketch.store import CorruptFile

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:The dirpath has changed from"
)


class At(Callback):
    """Do something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.action()


def saving(folder):
    return ModelCheckpoint(folder, every_n_train_steps=4, save_last=True)


def interrupted(tmp_path, **arguments):
    """Eight steps with a checkpoint at the fourth and the last, and the path of the last."""
    fit(tmp_path, writer(tmp_path), saving(tmp_path / "saved"), max_epochs=1, enable_checkpointing=True, **arguments)
    return tmp_path / "saved" / "last.ckpt"


def resumed(tmp_path, saved, dirpath, **arguments):
    watch = GradientSketchWriter(dirpath, dim=128, dtype="float32", **arguments)
    save = saving(saved.parent)
    fit(tmp_path, watch, save, max_epochs=2, ckpt_path=saved, enable_checkpointing=True)
    return GradientStore.open(watch.dirpath)


def steps(store):
    return store.metadata()["step"].tolist()


@pytest.mark.parametrize("per", ["step", "example"])
def test_fast_dev_run_writes_a_store_that_is_thrown_away(tmp_path, per):
    """A script runs to its end: fit, validate, questions; the real folder is not touched."""
    watch = writer(tmp_path, per=per, queries="val")
    run = trainer(tmp_path, watch, fast_dev_run=True)
    model, data = Every(), DataLoader(IndexedDataset(dataset(40)), batch_size=16)
    run.fit(model, data, data)
    for evaluate in (run.validate, run.test, run.predict):
        evaluate(model, data)
    store = GradientStore.open(watch.dirpath)
    assert len(store.where(stage="fit")) == (1 if per == "step" else 16)
    queries = store.where(stage="validate").read()
    assert store.where(stage="test").top_k(queries, 1).example_ids.shape == (16, 1)
    assert not (tmp_path / "store").exists()
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    trainer(tmp_path, watch, max_epochs=1).fit(model, data)
    assert watch.dirpath == str(tmp_path / "store")
    assert GradientStore.open(tmp_path / "store").metadata()["step"].max() == 3


def test_a_fit_that_starts_again_begins_a_new_lineage(tmp_path):
    """As after a kill before the first checkpoint: the rows of the new fit are visible, the others are kept."""
    fit(tmp_path, writer(tmp_path), max_epochs=1)
    with pytest.warns(UserWarning, match=r"has rows of other fits, \[1\].*lineage=NUMBER.*overwrite=True"):
        fit(tmp_path, writer(tmp_path), max_epochs=2)
    store = GradientStore.open(tmp_path / "store")
    assert steps(store) == list(range(1, 17))
    assert store.metadata()["attempt"].unique().tolist() == [2]
    assert steps(GradientStore.open(tmp_path / "store", lineage=1)) == list(range(1, 9))
    store.verify()


def test_overwrite_deletes_the_store_once_and_nothing_else(tmp_path):
    fit(tmp_path, writer(tmp_path), max_epochs=1)
    (tmp_path / "store" / "notes.txt").write_text("mine")
    watch = writer(tmp_path, overwrite=True)
    trainer(tmp_path, watch, fast_dev_run=True).fit(Digits(), loader())
    assert len(GradientStore.open(tmp_path / "store")) == 8
    model = fit(tmp_path, watch, max_epochs=1, data=DataLoader(IndexedDataset(dataset(64)), batch_size=32))
    trainer(tmp_path, watch).validate(Every(), DataLoader(IndexedDataset(dataset(5))))
    store = GradientStore.open(tmp_path / "store")
    assert store.metadata()["attempt"].tolist() == [1, 1, 2, 2, 2, 2, 2]
    trainer(tmp_path, writer(tmp_path, overwrite=True)).validate(Every(), DataLoader(IndexedDataset(dataset(5))))
    assert len(GradientStore.open(tmp_path / "store").where(stage="fit")) == 2
    assert (tmp_path / "store" / "notes.txt").read_text() == "mine"
    assert model.trainer.global_step == 2


def test_a_store_without_rows_does_not_hold_up_the_corrected_fit(tmp_path):
    """A first batch that fails leaves one; other settings then replace it, and are refused once there are rows."""

    class Fails(Digits):
        def training_step(self, batch, batch_idx):
            raise ArithmeticError("a mistake")

    with pytest.raises(ArithmeticError):
        fit(tmp_path, writer(tmp_path), model=Fails, max_epochs=1)
    fit(tmp_path, writer(tmp_path, dim=64), max_epochs=1)
    assert GradientStore.open(tmp_path / "store").sketch.dim == 64
    with pytest.raises(ValueError, match=r"another spec(.|\n)*overwrite=True"):
        fit(tmp_path, writer(tmp_path), max_epochs=1)
    assert len(GradientStore.open(tmp_path / "store")) == 8


def test_two_writers_of_a_trainer_have_two_folders(tmp_path):
    """By default each has one of its own name; neither deletes the other's where they are given the same."""
    both = [GradientSketchWriter(dim=64), GradientSketchWriter(dim=64, name="b")]
    fit(tmp_path, *both, max_epochs=1)
    assert [len(GradientStore.open(tmp_path / name)) for name in ("sketches", "b")] == [8, 8]
    both = [writer(tmp_path, overwrite=True), writer(tmp_path, overwrite=True, name="b")]
    with pytest.raises(
        MisconfigurationException, match=r"two GradientSketchWriters write to .*pass each its own dirpath"
    ):
        fit(tmp_path, *both, max_epochs=1)
    assert not (tmp_path / "store").exists()


def test_overwrite_does_not_delete_what_a_fit_resumes(tmp_path):
    saved = interrupted(tmp_path)
    assert steps(resumed(tmp_path, saved, tmp_path / "store", overwrite=True)) == list(range(1, 17))


def test_another_training_s_store_is_refused_and_overwritten_if_asked(tmp_path):
    """The runs of every store have the numbers 1, 2, ...; stores are told apart by their UUID."""
    saved = interrupted(tmp_path)
    other = writer(tmp_path / "other")
    fit(tmp_path, other, max_epochs=1)
    with pytest.raises(ValueError, match=r"another one.*two trainings would be mixed.*overwrite=True"):
        resumed(tmp_path, saved, other.dirpath)
    assert steps(GradientStore.open(other.dirpath)) == list(range(1, 9))
    with pytest.warns(UserWarning, match="rows of steps 1 to 8 are not in"):
        store = resumed(tmp_path, saved, other.dirpath, overwrite=True)
    assert steps(store) == list(range(9, 17))


@pytest.mark.parametrize("dirpath", ["store", "empty", None])
def test_a_lost_store_is_said_and_the_training_goes_on_in_a_new_one(tmp_path, dirpath):
    saved = interrupted(tmp_path)
    shutil.rmtree(tmp_path / "store")
    with pytest.warns(UserWarning, match=r"rows of steps 1 to 8 are not in .*pass its folder as dirpath"):
        store = resumed(tmp_path, saved, dirpath and tmp_path / dirpath)
    assert steps(store) == list(range(9, 17))
    again = interrupted(tmp_path / "again")
    assert steps(resumed(tmp_path, again, None)) == list(range(1, 17))


@pytest.mark.filterwarnings("ignore:.* has rows of other fits")
def test_a_job_that_lost_its_store_may_be_started_again_and_again(tmp_path):
    """Before its next checkpoint: the store that it began for the same checkpoint is known."""
    saved = shutil.copy(interrupted(tmp_path), tmp_path / "saved" / "kept.ckpt")
    shutil.rmtree(tmp_path / "store")
    for number in range(1, 4):
        with pytest.warns(UserWarning, match="rows of steps 1 to 8 are not in"):
            store = resumed(tmp_path, saved, tmp_path / "store")
        assert steps(store) == list(range(9, 17))
        assert store.metadata()["attempt"].unique().tolist() == [number]


def test_a_copy_of_a_store_that_went_another_way_is_another_store(tmp_path):
    """Its runs have the same numbers and the same store; each has an id of its own."""
    saved = shutil.copy(interrupted(tmp_path), tmp_path / "saved" / "kept.ckpt")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    resumed(tmp_path, saved, tmp_path / "store")
    resumed(tmp_path, saved, tmp_path / "copy")
    last = tmp_path / "saved" / "last.ckpt"  # of the copy
    with pytest.raises(ValueError, match="or a copy that went on without it"):
        resumed(tmp_path, last, tmp_path / "store")
    assert steps(resumed(tmp_path, last, tmp_path / "copy"))[:16] == list(range(1, 17))


def test_a_folder_that_was_moved_is_found_beside_the_checkpoint(tmp_path):
    """As Lightning places both, below the version of the logger."""
    watch = GradientSketchWriter(dim=128, dtype="float32")
    save = {"enable_checkpointing": True, "logger": CSVLogger(tmp_path / "logs")}
    fit(tmp_path, watch, ModelCheckpoint(every_n_train_steps=4, save_last=True), max_epochs=1, **save)
    shutil.move(tmp_path / "logs", tmp_path / "moved")
    (saved,) = (tmp_path / "moved").rglob("last.ckpt")
    again = GradientSketchWriter(dim=128, dtype="float32")
    fit(tmp_path, again, saving(saved.parent), max_epochs=2, ckpt_path=saved, enable_checkpointing=True)
    assert again.dirpath == str(saved.parents[1] / "sketches")
    assert steps(GradientStore.open(again.dirpath, again.lineage)) == list(range(1, 17))


def test_a_checkpoint_s_folder_that_is_no_store_is_not_written_to(tmp_path):
    saved = interrupted(tmp_path)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "photo.jpg").write_text("mine")
    with pytest.warns(UserWarning, match="rows of steps 1 to 8 are not in"):
        store = resumed(tmp_path, saved, None)
    assert store.path != tmp_path / "store"
    assert os.listdir(tmp_path / "store") == ["photo.jpg"]


def test_a_folder_with_a_part_of_a_store_is_refused(tmp_path):
    fit(tmp_path, writer(tmp_path), max_epochs=1)
    (tmp_path / "store" / "spec.json").unlink()
    with pytest.raises(CorruptFile, match=r"parts of a store \(attempts, rows.*overwrite=True"):
        fit(tmp_path, writer(tmp_path), max_epochs=1)
    fit(tmp_path, writer(tmp_path, overwrite=True), max_epochs=1)
    assert GradientStore.open(tmp_path / "store").verify() == 8


def test_a_relative_folder_stays_where_it_was_when_the_working_directory_changes(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    watch = GradientSketchWriter("store", dim=16)
    fit(tmp_path, watch, At(4, lambda: os.chdir(tmp_path / "b")), max_epochs=1)
    assert watch.dirpath == str(tmp_path / "a" / "store")
    assert len(GradientStore.open(watch.dirpath)) == 8
    assert os.listdir(tmp_path / "b") == []
    monkeypatch.chdir(tmp_path / "a")
    store = GradientStore.open("store")
    monkeypatch.chdir(tmp_path)
    assert len(store.read()) == 8


def test_a_store_that_vanishes_ends_the_training_with_a_message(tmp_path):
    gone = At(4, lambda: shutil.rmtree(tmp_path / "store"))
    with pytest.raises(RuntimeError, match=r"rows could not be written to .*store was deleted, moved or replaced"):
        fit(tmp_path, writer(tmp_path), gone, max_epochs=1)
    assert not (tmp_path / "store").exists()


def test_on_error_warn_goes_on_without_rows(tmp_path):
    gone = At(4, lambda: shutil.rmtree(tmp_path / "store"))
    with pytest.warns(UserWarning, match=r"goes on without rows.*deleted") as said:
        model = fit(
            tmp_path,
            writer(tmp_path, on_error="warn"),
            gone,
            saving(tmp_path / "saved"),
            max_epochs=2,
            enable_checkpointing=True,
        )
    assert model.trainer.global_step == 16
    assert len([warning for warning in said if "goes on without rows" in str(warning.message)]) == 1
    alone = fit(tmp_path, max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def full_disk(monkeypatch, name):
    """Refuse to write files with this in their path."""
    replace = os.replace

    def full(source, target):
        if name in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


def test_on_error_warn_covers_the_beginning_of_a_run(tmp_path, monkeypatch):
    full_disk(monkeypatch, "store/")
    for act in (
        lambda watch: fit(tmp_path, watch, max_epochs=1),
        lambda watch: trainer(tmp_path, watch).validate(Every(), DataLoader(IndexedDataset(dataset(20)))),
    ):
        with pytest.warns(UserWarning, match=r"goes on without rows.*No space left"):
            act(writer(tmp_path, on_error="warn"))
        with pytest.raises(OSError, match="No space left"):
            act(writer(tmp_path))


def test_rows_that_are_left_out_are_said_later_too(tmp_path, monkeypatch):
    """By the store, whether the fit is resumed or not; and nothing keeps compaction out."""
    full_disk(monkeypatch, "0.safetensors")
    with pytest.warns(UserWarning, match=r"goes on without rows"):
        saved = interrupted_with(tmp_path, on_error="warn")
    monkeypatch.undo()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"some steps of runs \[1\] have no rows"):
            store = GradientStore.open(tmp_path / "store")
        with pytest.warns(UserWarning, match=r"some steps of runs \[1\] have no rows"):
            store.compact()
        with pytest.warns(UserWarning, match=r"some steps of runs \[1\] have no rows"):
            resumed(tmp_path, saved, tmp_path / "store")


def interrupted_with(tmp_path, **arguments):
    save = saving(tmp_path / "saved")
    fit(tmp_path, writer(tmp_path, **arguments), save, max_epochs=1, enable_checkpointing=True)
    return tmp_path / "saved" / "last.ckpt"


class Documents(Dataset):
    """Digits with a name and a source."""

    def __init__(self, count=20):
        self.digits = dataset(count)

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, i):
        image, label = self.digits[i]
        return {"image": image, "label": label, "name": f"doc-{i}"}


class Reads(Digits):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        pass


def columns(batch):
    return {
        "label": batch["label"],
        "weight": 0.5,
        "source": ["wiki" if label < 5 else "books" for label in batch["label"].tolist()],
        "run": "first",
        "even": batch["label"] % 2 == 0,
    }


def test_string_ids_and_columns_of_the_user(tmp_path):
    """They come back from the store, select rows, and name the answers of a query."""
    watch = writer(tmp_path, index_key="name", columns_fn=columns)
    trainer(tmp_path, watch).validate(Reads(), DataLoader(Documents(), batch_size=8))
    store = GradientStore.open(watch.dirpath)
    labels = Documents().digits.tensors[1]
    found = store.metadata()
    assert found["example_id"].tolist() == [f"doc-{i}" for i in range(20)]
    assert torch.equal(found["label"], labels)
    assert found["weight"].tolist() == [0.5] * 20
    assert found["run"].tolist() == ["first"] * 20
    assert torch.equal(found["even"], labels % 2 == 0)
    wiki = store.where(source="wiki", run="first")
    assert torch.equal(wiki.metadata()["label"], labels[labels < 5])
    two = store.where(example_id=["doc-3", "doc-7", "none"]).read()
    assert two.example_id.tolist() == ["doc-3", "doc-7"]
    best = store.top_k(two, 2)
    exact = store.scores(two)
    names = [[f"doc-{i}" for i in row] for row in exact.topk(2).indices.tolist()]
    assert best.example_ids == names
    assert names[0][0] in repr(best)
    own = store.self_influence(method="dot")
    assert own.example_ids == [f"doc-{i}" for i in range(20)]
    assert f"doc-{int(own.scores.argmax())} " in repr(own)
    frame = store.to_pandas()
    assert frame["stage"].tolist() == ["validate"] * 20
    assert frame["source"].tolist() == found["source"].tolist()
    assert store.compact().metadata()["source"].tolist() == found["source"].tolist()


@pytest.mark.parametrize("per", ["step", "example"])
def test_columns_of_training_rows(tmp_path, per):
    given = (lambda batch: {**columns(batch), "size": len(batch["label"])}) if per == "step" else columns
    watch = writer(tmp_path, per=per, index_key="name", columns_fn=given)
    fit(tmp_path, watch, model=Reads, data=DataLoader(Documents(), batch_size=8), max_epochs=1)
    store = GradientStore.open(watch.dirpath)
    if per == "step":
        assert store.metadata()["size"].tolist() == [8, 8, 4]
        assert len(store.where(run="first")) == 3
        sources = ["wiki" if label < 5 else "books" for label in Documents().digits.tensors[1].tolist()]
        of_steps = [set(sources[i : i + 8]) for i in (0, 8, 16)]
        assert store.metadata()["source"].tolist() == [one.pop() if len(one) == 1 else "" for one in of_steps]
        assert store.metadata()["label"].tolist() == [-1] * 3
        assert store.where(example_ids="doc-9").metadata()["step"].tolist() == [2]
        assert store.where(example_ids=["doc-9", "doc-1"]).metadata()["step"].tolist() == [1, 2]
    else:
        assert store.where(source="wiki").metadata()["example_id"].tolist() == [
            f"doc-{i}" for i, label in enumerate(Documents().digits.tensors[1].tolist()) if label < 5
        ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"source": ["wiki"]}, r"columns_fn returned 1 values for column 'source'; return one value.*8 examples"),
        ({"loss": 1.0}, "columns_fn names a column 'loss'; 'loss' is a column of every row; use another name"),
        ({"my source": 1}, "names a column 'my source'; use another name"),
        ({"source": [None] * 8}, "column 'source' has .*None.*give one number, boolean or string per row"),
        ({"source": torch.zeros(8, 2)}, r"returned shape \(8, 2\) for column 'source'"),
        ([1], "columns_fn returned a list; return a dict"),
    ],
    ids=str,
)
def test_bad_columns_are_refused(tmp_path, found, words):
    watch = writer(tmp_path, index_key="name", columns_fn=lambda batch: found)
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, watch).validate(Reads(), DataLoader(Documents(), batch_size=8))


def test_a_validation_beside_a_fit_disturbs_neither(tmp_path):
    """Another writer of the same folder, while the fit goes on, as a second process would have."""

    def validate():
        data = DataLoader(IndexedDataset(dataset(20)), batch_size=10)
        trainer(tmp_path, writer(tmp_path)).validate(Every(), data)

    fit(tmp_path, writer(tmp_path), At(4, validate), data=loader(), max_epochs=1)
    store = GradientStore.open(tmp_path / "store")
    assert steps(store.where(stage="fit")) == list(range(1, 9))
    assert len(store.where(stage="validate")) == 20
    assert store.verify() == 28
    assert re.fullmatch(r"[0-9a-f-]{36}", store.snapshot.store)
