"""Rows whose scale turned out to be unknown are marked after they were written; runs know their optimizers."""

import json

import numpy as np
import pytest
import torch
from test_row_store import SKETCH, rows, written

from lightning_sketch.attribution import GradientStore, read_shard
from lightning_sketch.store import SketchedGradients
from lightning_sketch.store.format import Manifest


def known(table):
    metadata = table.metadata()
    return dict(zip(metadata["step"].tolist(), metadata["scale_known"].tolist(), strict=True))


def doubted(tmp_path, **sizes):
    """Rows of steps 1 to 4 in two files, then two more; the first five are doubted."""
    store = written(tmp_path)
    with store.appender(store.begin_run("fit", world_size=2), rank=1, **sizes) as other:
        other.put(rows([1]))  # of another rank: its scale is known
    with store.appender(store.begin_run("fit", parent=2), **sizes) as appender:
        appender.put(rows([2, 3]))
        appender.flush()
        appender.put(rows([4]))
        appender.flush()
        appender.put(rows([5]))  # not on the disk yet
        appender.doubt_scale()
        appender.put(rows([6]))
    return GradientStore.open(tmp_path)


def test_the_mark_is_in_every_way_to_read_rows(tmp_path):
    store = doubted(tmp_path)
    expected = {1: True, 2: False, 3: False, 4: False, 5: False, 6: True}
    assert known(store) == expected
    assert known(SketchedGradients.cat(list(store.blocks(2)))) == expected
    assert known(SketchedGradients.cat([read_shard(uri) for uri in store.shards()])) == expected
    assert store.where(scale_known=False).metadata()["step"].tolist() == [2, 3, 4, 5]
    store = store.compact()
    assert known(store) == expected
    assert known(SketchedGradients.cat([read_shard(uri) for uri in store.shards()])) == expected
    store.verify()


def test_an_appender_that_goes_on_keeps_the_mark(tmp_path):
    doubted(tmp_path)
    store = GradientStore.open(tmp_path)
    with store.appender(next(run for run in [store_run(store)])) as appender:
        appender.put(rows([7]))
    assert known(GradientStore.open(tmp_path))[7]
    assert not known(GradientStore.open(tmp_path))[5]


def store_run(store):
    from lightning_sketch.store.format import read_runs

    return read_runs(store.snapshot)[-1]


def test_a_mark_that_cannot_be_written_is_raised_and_the_rows_stay(tmp_path, monkeypatch):
    write = Manifest.write

    def full(self, *args, **kwargs):
        if self.doubted:
            raise OSError("no space")
        write(self, *args, **kwargs)

    monkeypatch.setattr(Manifest, "write", full)
    with pytest.raises(RuntimeError, match="no space"):
        doubted(tmp_path)
    assert all(known(GradientStore.open(tmp_path)).values())


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    from lightning_sketch._files import write_document

    store = written(tmp_path, rows([1, 2]))
    for path in (tmp_path / "rows/manifests/r00000-a00000001.json", tmp_path / "attempts/00000001.json"):
        fields = json.loads(path.read_text())
        kept = {key: value for key, value in fields.items() if key not in ("checksum", "doubted", "optimizer")}
        assert kept != fields
        write_document(path, kept)
    store = GradientStore.open(tmp_path)
    store.verify()
    assert all(known(store).values())
    assert store.optimizers == frozenset()


def test_a_closed_appender_doubts_nothing(tmp_path):
    store = written(tmp_path)
    appender = store.appender(store.begin_run("fit"))
    appender.close()
    appender.flush()
    with pytest.raises(RuntimeError, match="closed"):
        appender.doubt_scale()


def test_rows_know_the_optimizers_that_trained_them(tmp_path):
    store = written(tmp_path)
    runs = [store.begin_run("fit", optimizer="AdamW, SGD")]
    runs.append(store.begin_run("validate", parent=runs[0].number))  # at the weights of that fit
    for run, stage in zip(runs, ("fit", "validate"), strict=True):
        with store.appender(run) as appender:
            appender.put(rows([1, 2], stage))
    store = GradientStore.open(tmp_path)
    assert store.optimizers == {"AdamW", "SGD"}
    assert store.where(stage="validate").optimizers == {"AdamW", "SGD"}
    assert store.where(np.zeros(len(store), dtype=bool)).optimizers == frozenset()


def test_weights_and_rows_that_are_not_finite_are_marked_in_memory():
    sketches = torch.ones(3, 16)
    sketches[1, 5] = torch.nan
    table = SketchedGradients(sketches, SKETCH)
    assert table.finite.tolist() == [True, False, True]
    assert table.weight.isnan().all()
    assert table.scale_known.all()
    both = SketchedGradients.cat([SketchedGradients(sketches, SKETCH, {"weight": [3, 4, 5]}), table])
    assert both.scale_known.all()
    assert len(both.weight) == 6
