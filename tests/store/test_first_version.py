"""Stores that the first version wrote open, answer, and take more rows; they are in the folder first_version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_row_store import LAYOUT, SKETCH, rows

from lightning_sketch.attribution import Curvature, GradientStore, StoreSpec, read_shard
from lightning_sketch.store import CorruptFile

WRITTEN = Path(__file__).with_name("first_version")  # float16 is compacted


@pytest.fixture(params=["float32", "float16"])
def folder(tmp_path, request):
    return Path(shutil.copytree(WRITTEN / request.param, tmp_path / "store"))


def assert_as_written(folder):
    store = GradientStore.open(folder)
    fit, validate = store.where(stage="fit").read(), store.where(stage="validate").read()
    assert fit.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert fit.metadata()["attempt"].tolist() == [1, 1, 1, 1, 2, 2]
    for found in (fit, validate, store.queries()[3]):
        torch.testing.assert_close(found.sketches, rows(found.step.tolist()).sketches, rtol=0, atol=2**-10)
    assert validate.fingerprint == 7
    assert Curvature.load(folder / "curvature", "fisher", fingerprint=7).matrix[0, 0] == 3
    return store


def test_a_store_is_read_without_being_changed(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    store = assert_as_written(folder)
    assert store.verify() == (9 if (folder / "rows-2").exists() else 12)
    assert sum(len(read_shard(uri)) for uri in store.shards()) == 8
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_it_gets_an_identity_before_rows_are_added(folder):
    spec = GradientStore.open(folder).spec
    assert spec == StoreSpec.of(SKETCH, LAYOUT, dtype=spec.dtype)
    GradientStore.create(folder, spec)
    assert json.loads((folder / "spec.json").read_text())["format"] == 2
    store = assert_as_written(folder)
    with store.appender(store.begin_run("fit", parent=2, parent_step=6)) as appender:
        appender.put(rows([7]))
    store = GradientStore.open(folder)
    assert store.where(stage="fit").metadata()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    store.verify()
    store.compact().verify()
    assert_as_written_without(folder, 7)


def assert_as_written_without(folder, step):
    store = GradientStore.open(folder)
    assert store.where(stage="fit").metadata()["step"].tolist() == list(range(1, step + 1))
    assert store.where(stage="validate").read().fingerprint == 7


def test_ranks_without_files_are_not_missed(folder):
    """Of the rows of steps only the first rank writes files."""
    for file in (folder / "attempts").iterdir():
        file.write_text(json.dumps({**json.loads(file.read_text()), "world_size": 2}))
    GradientStore.create(folder, GradientStore.open(folder).spec)
    assert_as_written(folder).compact().verify()


def test_a_run_may_begin_or_compaction_come_first(folder):
    run = GradientStore.open(folder).begin_run("fit", parent=2, parent_step=6)
    assert run.number == 4
    assert_as_written(folder)
    assert_as_written(Path(GradientStore.open(folder).compact().path))


def test_an_interrupted_change_of_format_is_done_again(folder, monkeypatch):
    """Killed before each of its files: of format 1 or 2, with the same rows."""
    from lightning_sketch.store import format as module

    spec, real = GradientStore.open(folder).spec, module.write_document
    for left in range(8):
        calls = iter(range(99))

        def killed(*args, left=left, calls=calls, **kwargs):
            if next(calls) == left:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        copy = Path(shutil.copytree(folder, folder.with_name(f"copy{left}")))
        monkeypatch.setattr(module, "write_document", killed)
        with pytest.raises(KeyboardInterrupt):
            GradientStore.create(copy, spec)
        monkeypatch.setattr(module, "write_document", real)
        assert_as_written(copy)
        GradientStore.create(copy, spec)
        assert_as_written(copy).verify()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attempts/00000002.json", {"parent": 2}),
        ("attempts/00000002.json", {"parent": "1"}),
        ("attempts/00000001.json", {"stage": "train"}),
        ("attempts/00000001.json", {"number": 1e400}),
        ("attempts/00000001.json", {"world_size": None}),
        ("spec.json", {"layout": [["weight", [9, -10]]]}),
        ("spec.json", {"layout": 3}),
        ("spec.json", {"sketch": {"kind": "block_srht"}}),
        ("spec.json", {"dtype": "int8"}),
        ("spec.json", {"dtype": 2}),
    ],
    ids=str,
)
def test_json_without_checksums_is_checked_field_by_field(tmp_path, name, change):
    folder = Path(shutil.copytree(WRITTEN / "float32", tmp_path / "store"))
    stored = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**stored, **change}))
    with pytest.raises(CorruptFile, match=name.split("/")[-1]):
        GradientStore.open(folder)


def test_the_format_of_a_later_version_is_refused_as_such(tmp_path):
    folder = Path(shutil.copytree(WRITTEN / "float32", tmp_path / "store"))
    stored = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**stored, "format": 3, "new": True}))
    with pytest.raises(ValueError, match=r"has format 3.*install the version that wrote it"):
        GradientStore.open(folder)
