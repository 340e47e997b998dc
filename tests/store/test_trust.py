"""What is missing, changed or exchanged is seen, and processes that share a store do not harm each other."""

import dataclasses
import errno
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import filelock
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from forks import FORKS
from test_files import no_folders, no_links
from test_row_store import SKETCH, rows, spec, written

from lightning_sketch.attribution import (
    Curvature,
    GradientStore,
    SketchedGradients,
    Strings,
    scores,
    self_influence,
    top_k,
)
from lightning_sketch.store import Busy, CorruptFile, CorruptShard
from lightning_sketch.store.format import read_runs


def several(path, **options):
    """Two runs of a file per row: steps 1 to 5, of which the second resumes at 3 and goes to 6."""
    written(path, *(rows([step]) for step in range(1, 6)), **options)
    return written(path, *(rows([step]) for step in range(4, 7)), parent=1, parent_step=3, **options)


def shard(store, run, sequence, rank=0):
    return store.snapshot.folder / f"r{rank:05d}" / f"a{run:08d}" / f"{sequence:08d}.safetensors"


def exchange(one, other):
    one.rename(one.with_suffix(".away"))
    other.rename(one)
    one.with_suffix(".away").rename(other)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("rows/r00000/a00000002/00000002.safetensors", "a00000002/00000002.safetensors"),
        ("rows/r00000/a00000001", "a00000001/00000000.safetensors and 4 more"),
        ("rows/r00000", "a00000001/00000000.safetensors and 4 more"),
        ("rows/r00000/a00000002 rows/manifests/r00000-a00000002.json", "all of rank 0 in run 2"),
    ],
)
def test_missing_rows_are_said_at_opening(tmp_path, gone, named):
    """The last file, all of a run, all of a rank: what remains can be read; verify() and compact() refuse."""
    store = several(tmp_path)
    for name in gone.split():
        (shutil.rmtree if (tmp_path / name).is_dir() else os.unlink)(tmp_path / name)
    with pytest.warns(UserWarning, match=rf"rows are missing.*{named}"):
        rest = GradientStore.open(tmp_path)
    assert set(rest.metadata()["step"].tolist()) < set(range(1, 7))
    with pytest.raises(CorruptFile, match=f"{named.split(' ')[0]}.* is missing"):
        store.verify()
    with pytest.raises(CorruptFile, match="would make losses final"):
        store.compact()
    accepted = store.compact(accept_loss=True)
    assert accepted.verify() == len(rest)
    assert torch.equal(accepted.read().sketches, rows(rest.metadata()["step"].tolist()).sketches)


def test_a_rank_that_is_lost_with_its_manifest_is_missed_after_a_compaction_too(tmp_path):
    """As when the disk of one node was not copied; a rank that had nothing to write, or did not come to it, is not."""
    store = GradientStore.create(tmp_path, spec())
    for number in range(2):
        run = store.begin_run("validate", world_size=3)
        for rank in (0, 1):
            with store.appender(run, rank) as appender:
                appender.put(rows([number + 1], "validate"))
        assert store.verify() == 2
        if not number:
            store = store.compact()
            shutil.copytree(tmp_path, tmp_path.with_name("whole"))
            shutil.rmtree(store.snapshot.folder / "r00001")
            (store.snapshot.folder / "manifests" / "r00001-a00000001.json").unlink()
            with pytest.warns(UserWarning, match="all of rank 1 in run 1"):
                GradientStore.open(tmp_path)
            shutil.rmtree(tmp_path)
            tmp_path.with_name("whole").rename(tmp_path)
            store = GradientStore.open(tmp_path)
            assert store.compact().verify() == 2
            break


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("rows/manifests", r"r00000-a00000001\.json is missing"),
        ("rows/manifests/r00000-a00000002.json", r"r00000-a00000002\.json is missing"),
        ("rows", "rows.* is missing"),
        ("generation.json", r"generation\.json is missing"),
        ("attempts/00000001.json", r"00000001\.json is missing"),
        ("attempts/00000002.json", r"rows of run 2, whose record .*00000002\.json is missing"),
        ("attempts", "rows of run 1, whose record"),
    ],
)
def test_missing_records_are_refused(tmp_path, gone, words):
    several(tmp_path)
    (shutil.rmtree if (tmp_path / gone).is_dir() else os.unlink)(tmp_path / gone)
    with pytest.raises(CorruptFile, match=words):
        GradientStore.open(tmp_path)


@pytest.mark.parametrize(("one", "other"), [((1, 1), (1, 3)), ((1, 1), (2, 1)), ((1, 0), (1, 4))])
def test_exchanged_files_are_refused(tmp_path, one, other):
    store = several(tmp_path)
    exchange(shard(store, *one), shard(store, *other))
    with pytest.raises(CorruptShard, match="belongs elsewhere: its"):
        GradientStore.open(tmp_path)


def test_files_of_another_store_with_the_same_name_are_refused(tmp_path):
    """Equal in all but the store's UUID: a shard, a manifest, a run."""
    one, other = several(tmp_path / "one"), several(tmp_path / "other")
    for name in (
        "rows/r00000/a00000001/00000001.safetensors",
        "rows/manifests/r00000-a00000001.json",
        "attempts/00000001.json",
        "generation.json",
    ):
        mine = (one.path / name).read_bytes()
        shutil.copy(other.path / name, one.path / name)
        with pytest.raises(CorruptFile, match="belongs elsewhere: its store is"):
            GradientStore.open(one.path)
        (one.path / name).write_bytes(mine)
    assert one.verify() == 8


def test_an_older_copy_of_a_file_is_refused(tmp_path):
    """A store that was copied after the first rows went another way than its copy; the last file says so."""
    written(tmp_path / "one", rows([1]))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for name, step in (("one", 2), ("copy", 3)):
        store = GradientStore.open(tmp_path / name)
        run = store.begin_run("fit", parent=1, parent_step=1)
        with store.appender(run, shard_bytes=1) as appender:
            for later in range(3):
                appender.put(rows([step + 10 * later]))
    store = GradientStore.open(tmp_path / "one")
    for sequence in range(3):
        mine = shard(store, 2, sequence).read_bytes()
        shutil.copy(shard(GradientStore.open(tmp_path / "copy"), 2, sequence), shard(store, 2, sequence))
        with pytest.raises(CorruptShard, match="was exchanged; restore both"):
            GradientStore.open(tmp_path / "one")
        shard(store, 2, sequence).write_bytes(mine)
    assert store.verify() == 4


def test_a_manifest_that_is_behind_loses_nothing(tmp_path):
    """Its writer was killed between a shard and the manifest, or an older copy was restored."""
    store = several(tmp_path)
    manifest = tmp_path / "rows/manifests/r00000-a00000002.json"
    latest = manifest.read_bytes()
    for count in (0, 1, 2):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        again = GradientStore.create(tmp_path / "again", spec())
        with again.appender(again.begin_run("fit"), shard_bytes=1) as appender:
            for step in range(count):
                appender.put(rows([step]))
        document = json.loads((tmp_path / "again/rows/manifests/r00000-a00000001.json").read_text())
        assert document["files"] == count
    manifest.write_bytes(latest)
    run = next(run for run in [store.begin_run("fit", parent=2, parent_step=6)])
    with store.appender(run) as appender:
        appender.put(rows([7]))
        appender.flush()
        before = (tmp_path / "rows/manifests/r00000-a00000003.json").read_bytes()
        appender.put(rows([8]))
    (tmp_path / "rows/manifests/r00000-a00000003.json").write_bytes(before)
    assert GradientStore.open(tmp_path).metadata()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with store.appender(run) as appender:
        appender.put(rows([9]))
    assert GradientStore.open(tmp_path).metadata()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert store.verify() == 11


def test_a_changed_number_is_refused_when_it_is_first_read(tmp_path):
    """Each file once: what was checked is not checked again, also by a selection of the rows."""
    store = written(tmp_path, *(rows([step]) for step in range(1, 4)), dtype="bfloat16")
    store.where(step=1).read()
    for sequence in (0, 1):
        data = bytearray(shard(store, 1, sequence).read_bytes())
        data[-3] ^= 4
        shard(store, 1, sequence).write_bytes(data)
    store.where(step=[1, 3]).read()
    with pytest.raises(CorruptShard, match=r"00000001\.safetensors: its contents do not match"):
        store.read()
    with pytest.raises(CorruptShard, match=r"00000000\.safetensors: its contents do not match"):
        GradientStore.open(tmp_path).top_k(rows([1]), 1)


def test_curvatures_are_checked(tmp_path):
    """Exchanged, or with a changed bit: at load and in verify()."""
    store = several(tmp_path)
    for mark in (1, 2):
        Curvature(
            kind="fisher",
            fingerprint=mark,
            examples=9,
            mean_square=1.0,
            effective_samples=2.0,
            matrix=torch.eye(16).double() * mark,
        ).save(tmp_path / "curvature")
    assert store.verify() == 8
    one, two = sorted((tmp_path / "curvature").iterdir())
    exchange(one, two)
    with pytest.raises(CorruptFile, match="belongs elsewhere"):
        Curvature.load(tmp_path / "curvature", "fisher", fingerprint=1)
    with pytest.raises(CorruptFile, match=f"{one.name}(.|\n)*{two.name}"):
        store.verify()
    exchange(one, two)
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    for check in (store.verify, lambda: Curvature.load(tmp_path / "curvature", "fisher", fingerprint=1)):
        with pytest.raises(CorruptFile, match=f"{one.name}: its contents do not match"):
            check()


@pytest.mark.parametrize(
    "name", ["spec.json", "generation.json", "attempts/00000001.json", "rows/manifests/r00000-a00000001.json"]
)
def test_json_that_changed_is_refused_with_the_file_s_name(tmp_path, name):
    several(tmp_path)
    whole = (tmp_path / name).read_bytes()
    fields = json.loads(whole)
    broken = [whole[:20], b"", b"null", b"[" * 100_000, b"\xff\xfe", b"[]", b'{"a": 1}']
    for key, value in fields.items():
        for other in ({k: v for k, v in fields.items() if k != key}, {**fields, key: None}, {**fields, key: [value]}):
            broken += [json.dumps(other).encode()] if other != fields else []
    for data in broken:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptFile, match=Path(name).name):
            GradientStore.open(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "link", "endless", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        "spec.json",
        "generation.json",
        "attempts/00000001.json",
        "rows/manifests/r00000-a00000001.json",
        "rows/r00000/a00000001/00000000.safetensors",
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, name, kind):
    several(tmp_path / "store")
    path = tmp_path / "store" / name
    path.rename(tmp_path / "moved")
    {
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "moved"),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(CorruptFile, match=f"{path.name} is a link, pipe or folder"):
        GradientStore.open(tmp_path / "store")


@pytest.mark.parametrize("name", ["rows", "rows/r00000", "rows/r00000/a00000001", "rows/manifests", "attempts"])
def test_linked_folders_are_neither_read_nor_written_through(tmp_path, name):
    store = several(tmp_path / "store")
    outside = Path(shutil.move(tmp_path / "store" / name, tmp_path / "outside"))
    (tmp_path / "store" / name).symlink_to(outside)
    (outside / "mine.tmp").write_text("mine")
    with pytest.raises(CorruptFile, match="is a link or a file, where a folder is expected"):
        GradientStore.open(tmp_path / "store")
    with pytest.raises(CorruptFile, match=r"is a link or a file|losses final"):
        store.compact()
    GradientStore.create(tmp_path / "store", spec(), overwrite=True)
    assert (outside / "mine.tmp").read_text() == "mine"
    assert len(list(outside.rglob("*"))) > 1


def test_a_cycle_of_runs_and_a_huge_number_end(tmp_path):
    store = several(tmp_path)
    copy = shard(store, 2, 99_999_999)
    shutil.copy(shard(store, 2, 2), copy)
    with pytest.raises(CorruptShard, match="belongs elsewhere: its sequence is 2, here it is 99999999"):
        GradientStore.open(tmp_path)


def test_a_store_object_that_outlives_a_compaction_says_so(tmp_path):
    """In each file, of the object that compacted and of another; never the numbers of other rows."""
    several(tmp_path, shard_bytes=1)
    first, second = GradientStore.open(tmp_path), GradientStore.open(tmp_path)
    compacted = first.compact(shard_bytes=300)
    for store in (first, second):
        for read in (store.read, store.where(step=2).read, lambda s=store: s.top_k(rows([1]), 1)):
            with pytest.raises(RuntimeError, match=r"was compacted since.*open it again: GradientStore\.open"):
                read()
    assert torch.equal(compacted.read().sketches, rows(range(1, 7)).sketches)
    assert compacted.compact().metadata()["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_store_object_does_not_read_another_store_in_its_place(tmp_path):
    store = several(tmp_path)
    GradientStore.create(tmp_path, spec(), overwrite=True)
    several(tmp_path)
    with pytest.raises(CorruptShard, match="belongs elsewhere: its store"):
        store.read()


def test_compaction_removes_its_own_files_only(tmp_path):
    several(tmp_path)
    shutil.copytree(tmp_path / "rows", tmp_path / "rows_backup")
    (tmp_path / "rows" / "notes.txt").write_text("mine")
    (tmp_path / "rows" / "r00000" / "a00000001" / "notes.txt").write_text("mine")
    (tmp_path / "rows.csv").write_text("mine")
    GradientStore.open(tmp_path).compact()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store.lock") == [
        "attempts",
        "generation.json",
        "rows",
        "rows-2",
        "rows.csv",
        "rows_backup",
        "spec.json",
    ]
    assert len(list((tmp_path / "rows_backup").rglob("*.safetensors"))) == 8
    assert [path.name for path in (tmp_path / "rows").rglob("*") if path.is_file()] == ["notes.txt", "notes.txt"]


def test_a_compaction_that_fails_leaves_no_half_folder(tmp_path, monkeypatch):
    store = several(tmp_path)
    real, calls = os.fsync, iter(range(1000))

    def full(handle):
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OSError, RuntimeError), match="No space left"):
        store.compact(shard_bytes=1)
    monkeypatch.setattr(os, "fsync", real)
    assert sorted(path.name for path in tmp_path.glob("rows*")) == ["rows"]
    assert torch.equal(store.read().sketches, rows(range(1, 7)).sketches)
    assert store.compact().verify() == 6


def test_one_writer_per_rank_and_run(tmp_path):
    store = several(tmp_path)
    run = store.begin_run("fit")
    with store.appender(run) as first:
        with pytest.raises(Busy, match=r"rank 0 of run 3 in .* is being written by another process.*begin another run"):
            store.appender(run)
        with store.appender(run, rank=1) as beside, store.appender(store.begin_run("validate")):
            first.put(rows([1]))
            beside.put(rows([1]))
    with store.appender(run) as again:
        again.put(rows([2]))
    assert GradientStore.open(tmp_path).metadata()["step"].tolist() == [1, 2, 1]


def test_no_compaction_beside_a_writer(tmp_path):
    store = several(tmp_path)
    with store.appender(store.begin_run("fit", parent=2, parent_step=6)) as appender:
        appender.put(rows([7]))
        with pytest.raises(Busy, match=r"rank 0 of run 3 in .* is being written; try again"):
            store.compact()
        with pytest.raises(Busy, match=r"is being written; try again"):
            GradientStore.create(tmp_path, spec(), overwrite=True)
    assert store.compact().metadata()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def _begin_runs(folder, count):
    store = GradientStore.open(folder)
    for _ in range(count):
        with store.appender(store.begin_run("test")) as appender:
            appender.put(rows([1], "test"))


@pytest.mark.slow
def test_a_store_is_whole_while_another_process_begins_runs(tmp_path):
    store = written(tmp_path, rows([1, 2]))
    process = FORKS.Process(target=_begin_runs, args=(tmp_path, 60))
    process.start()
    while process.is_alive():
        assert len(GradientStore.open(tmp_path)) >= 2
        assert store.verify() >= 2
    assert process.exitcode == 0
    assert store.verify() == 62


@pytest.mark.parametrize("kind", ["link", "folder"])
@pytest.mark.parametrize("name", ["store.lock", "rows/r00000/a00000003/writer.lock"])
def test_lock_files_are_not_written_through_links(tmp_path, name, kind):
    store = several(tmp_path / "store")
    run = store.begin_run("fit")
    (tmp_path / "precious").write_text("mine")
    lock = tmp_path / "store" / name
    lock.unlink(missing_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.mkdir() if kind == "folder" else lock.symlink_to(tmp_path / "precious")
    with pytest.raises(CorruptFile, match=f"{lock.name} is a link, pipe or folder"):
        store.appender(run)
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_lock_of_another_user_is_not_passed_over(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "store.lock")

    store = several(tmp_path)
    monkeypatch.setattr(filelock.FileLock, "acquire", denied)
    with pytest.raises(PermissionError):
        store.compact()


def test_a_curvature_is_not_written_through_a_link(tmp_path):
    store = several(tmp_path / "store")
    (tmp_path / "outside").mkdir()
    (tmp_path / "store" / "curvature").symlink_to(tmp_path / "outside")
    matrix = {"matrix": torch.eye(16).double()}
    made = Curvature(kind="fisher", fingerprint=1, examples=9, mean_square=1.0, effective_samples=2.0, **matrix)
    with pytest.raises(CorruptFile, match="curvature is a link"):
        made.save(store.path / "curvature")
    assert not list((tmp_path / "outside").iterdir())


def test_a_curvature_of_another_store_is_refused(tmp_path):
    """Of the same weights, but another sketch perhaps."""
    stores = [several(tmp_path / name) for name in "ab"]
    matrix = {"matrix": torch.eye(16).double()}
    made = Curvature(kind="fisher", fingerprint=1, examples=9, mean_square=1.0, effective_samples=2.0, **matrix)
    for store in stores:
        made.save(store.path / "curvature")
    (file,) = (stores[0].path / "curvature").iterdir()
    shutil.copy(file, stores[1].path / "curvature" / file.name)
    for check in (
        stores[1].verify,
        lambda: Curvature.load(stores[1].path / "curvature", "fisher", fingerprint=1),
    ):
        with pytest.raises(CorruptFile, match="belongs elsewhere: its store"):
            check()
    made.save(tmp_path / "alone")
    assert Curvature.load(tmp_path / "alone", "fisher", fingerprint=1).examples == 9


def test_a_damaged_column_is_refused_at_opening(tmp_path):
    """Also one that would hide all rows of its file, and one of strings."""
    part = rows([2])
    named = SketchedGradients(part.sketches, SKETCH, {**part.columns, "source": ["wikipedia"]})
    store = written(tmp_path, rows([1]), named, rows([3]))
    path = shard(store, 1, 1)
    whole = path.read_bytes()
    for content in (b"wikipedia", (2).to_bytes(8, "little")):
        assert content in whole
        data = bytearray(whole)
        data[whole.index(content) + 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptShard, match=r"00000001\.safetensors: its columns do not match their checksum"):
            GradientStore.open(tmp_path)


@pytest.mark.slow
def test_a_writer_waits_for_a_compaction(tmp_path):
    store = several(tmp_path)
    run = store.begin_run("fit", parent=2, parent_step=6)
    lock = filelock.FileLock(tmp_path / "store.lock")
    with lock:
        with pytest.raises(Busy, match="is being compacted by another process"):
            store.compact()
        process = FORKS.Process(target=_append, args=(tmp_path, run))
        process.start()
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        time.sleep(1.5)
        assert not (tmp_path / "done").exists()
    process.join(timeout=3600)
    assert (tmp_path / "done").read_text() == "waited"
    assert GradientStore.open(tmp_path).metadata()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def _append(folder, run):
    store = GradientStore.open(folder)
    (folder / "started").touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with store.appender(run) as appender:
            appender.put(rows([7]))
    (folder / "done").write_text("waited" if any("waiting for" in str(w.message) for w in said) else "")


def _compact(folder, times):
    for _ in range(times):
        try:
            GradientStore.open(folder).compact(shard_bytes=300)
        except Busy:
            time.sleep(0.01)


@pytest.mark.slow
def test_compactions_at_once_lose_nothing(tmp_path):
    """Two processes and readers beside them."""
    written(tmp_path, rows(range(1, 60)), shard_bytes=1)

    processes = [FORKS.Process(target=_compact, args=(tmp_path, 4)) for _ in range(2)]
    for process in processes:
        process.start()
    opened = 0
    while any(process.is_alive() for process in processes):
        assert len(GradientStore.open(tmp_path)) == 59
        opened += 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = GradientStore.open(tmp_path)
    assert opened
    assert store.verify() == 59
    assert torch.equal(store.read().sketches, rows(range(1, 60)).sketches)


def test_a_beginning_writer_leaves_the_files_of_others_alone(tmp_path):
    """Temporary files of another run are being written."""
    store = several(tmp_path)
    being_written = shard(store, 2, 3).with_suffix(".safetensors.0123.tmp")
    being_written.write_bytes(b"half")
    with store.appender(store.begin_run("validate")):
        assert being_written.exists()
    GradientStore.open(tmp_path)


@pytest.mark.parametrize("system", [no_links, no_folders, lambda m: (no_links(m), no_folders(m))])
def test_other_file_systems(tmp_path, monkeypatch, system):
    """Without hard links, without handles of folders: all of a store's life."""
    system(monkeypatch)
    store = several(tmp_path)
    assert store.compact().verify() == 6
    assert written(tmp_path, rows([7]), parent=2, parent_step=6).metadata()["step"].tolist() == list(range(1, 8))


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, error):
    def unsupported(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    with pytest.warns(UserWarning, match="has no file locks .*nothing keeps other processes out"):
        store = several(tmp_path)
    assert store.verify() == 8


def test_windows_may_refuse_to_replace_or_remove_open_files(tmp_path, monkeypatch):
    """A reader has the file open for a moment, or an old shard for good."""
    store = several(tmp_path)
    replace, refused = os.replace, iter([True, True, False] * 1000)

    def sometimes(*args):
        if next(refused):
            raise PermissionError(errno.EACCES, "Permission denied")
        return replace(*args)

    unlink = Path.unlink

    def in_use(path, **kwargs):
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "in use", str(path))
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "replace", sometimes)
    monkeypatch.setattr(Path, "unlink", in_use)
    compacted = store.compact()
    assert compacted.verify() == 6
    assert torch.equal(store.read().sketches, rows(range(1, 7)).sketches)  # the old files are still there
    monkeypatch.undo()
    assert compacted.compact().verify() == 6
    assert sorted(path.name for path in tmp_path.glob("rows*")) == ["rows-3"]


@pytest.mark.slow
def test_rows_wait_no_longer_than_said(tmp_path):
    """A row that comes shortly before the first one is due does not put that off by another period, to 1.9 periods."""
    store = GradientStore.create(tmp_path, spec())
    with store.appender(store.begin_run("fit"), flush_seconds=5.0) as appender:
        begin = time.monotonic()
        appender.put(rows([1]))
        time.sleep(4.5)
        appender.put(rows([2]))
        while not len(GradientStore.open(tmp_path)) and time.monotonic() - begin < 3600:
            time.sleep(0.01)
        assert time.monotonic() - begin < 1.6 * 5.0


@pytest.mark.parametrize(
    ("found", "selection"),
    [
        ([2, 3], {"step": [2, 3, 99]}),
        ([1, 4], {"example_id": torch.tensor([10, 40])}),
        ([5], {"step": 5, "stage": ["fit", "validate"]}),
        ([1, 2], {"lr": [1 / 2, torch.tensor(1 / 3).item()]}),
        ([6], {"example_id": {60}}),
        ([], {"step": []}),
        ([2], {"finite": True, "step": range(2, 3)}),
    ],
    ids=str,
)
def test_rows_are_selected_by_value_or_by_a_list_of_values(tmp_path, found, selection):
    for source in (several(tmp_path), several(tmp_path / "again").read()):
        assert source.where(**selection).metadata()["step"].tolist() == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("validate",), r"mask of 6 booleans.*got a str.*where\(stage='fit'\)"),
        (([True, False],), r"got torch.bool of shape \(2,\)"),
        ((torch.tensor([0, 1, 0, 0, 0, 0]),), r"got torch.int64 of shape \(6,\)"),
    ],
    ids=str,
)
def test_a_mask_is_one_boolean_per_row(tmp_path, arguments, words):
    for source in (several(tmp_path), several(tmp_path / "again").read()):
        with pytest.raises(ValueError, match=words):
            source.where(*arguments)
        assert len(source.where([True] * 6)) == 6


def test_values_that_a_column_cannot_have_are_refused(tmp_path):
    store = several(tmp_path)
    for selection, words in (
        ({"step": "two"}, "column 'step' has int64, where.. got 'two'"),
        ({"step": 2.5}, "column 'step' has int64"),
        ({"step": 1 << 70}, "column 'step' cannot have"),
        ({"lr": "high"}, "column 'lr' has float32"),
        ({"stage": ["fit", "train"]}, "no stage 'train'"),
    ):
        with pytest.raises(ValueError, match=words):
            store.where(**selection)


def test_strings_and_numbers_leave_for_pandas_arrow_and_numpy(tmp_path):
    """bfloat16, which none of them has, becomes float32 without a change of the numbers."""
    part = rows(range(1, 4))
    own = {"source": ["wiki", "", "wiki"], "example_ids": torch.tensor([[1, 2], [3, -1], [4, 5]])}
    store = written(
        tmp_path / "store", SketchedGradients(part.sketches, SKETCH, {**part.columns, **own}), dtype="bfloat16"
    )
    held = store.read()
    assert held.sketches.dtype == torch.bfloat16
    exact = held.sketches.float().numpy()
    for source in (store, held):
        frame = source.to_pandas()
        assert isinstance(frame, pandas.DataFrame)
        assert frame["stage"].tolist() == ["fit"] * 3
        assert frame["source"].tolist() == ["wiki", "", "wiki"]
        assert frame["example_ids"].tolist() == [[1, 2], [3, -1], [4, 5]]
        assert (torch.tensor(source.__array__()).numpy() == exact).all()
    table = held.to_arrow()
    assert isinstance(table, pyarrow.Table)
    assert table["sketch"].to_pylist() == exact.tolist()
    assert table["step"].to_pylist() == [1, 2, 3]
    assert len(store.where(source="wiki")) == len(held.where(source=["wiki", "books"])) == 2
    store.export("npy", tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) >= ["attempt", "epoch"]


def test_runs_that_disagree_about_a_column_keep_the_store_readable(tmp_path):
    """Strings and numbers become strings, lists of ids of different lengths are filled up."""
    part = rows([1])
    for number, own in enumerate([{"source": ["wiki"]}, {"source": [3]}, {"source": torch.tensor([[1, 2]])}, {}]):
        written(tmp_path, SketchedGradients(part.sketches, SKETCH, {**part.columns, **own}), stage="test")
        store = GradientStore.open(tmp_path)
        assert len(store) == number + 1
        if number == 1:
            assert store.metadata()["source"].tolist() == ["wiki", "3"]
            assert len(store.where(source="3")) == 1
    assert store.metadata()["source"].tolist() == ["wiki", "3", "[1, 2]", ""]


def test_columns_of_one_type_only(tmp_path):
    part = rows([1])
    named = SketchedGradients(part.sketches, SKETCH, {**part.columns, "source": ["wiki"]})
    assert SketchedGradients.cat([part, named]).source.tolist() == ["", "wiki"]
    with pytest.raises(ValueError, match=r"column 'source' has \[None\]"):
        SketchedGradients(part.sketches, SKETCH, {"source": [None]})
    with pytest.raises(ValueError, match="tables of one sketch, got no table"):
        SketchedGradients.cat([])


def test_a_column_of_strings_is_like_an_array_of_strings():
    column = Strings.of(["wiki", "books", "", "wiki"])
    assert list(column) == column.tolist() == np.asarray(column).tolist() == ["wiki", "books", "", "wiki"]
    assert column[1] == "books"
    assert (column == "wiki").tolist() == [True, False, False, True]
    assert (column != ["wiki", "wiki", "", "wiki"]).tolist() == [False, True, False, False]
    assert "books" in column
    assert "none" not in column
    assert column[1:3].tolist() == ["books", ""]
    assert column[torch.tensor([False, True, False, True])].tolist() == ["books", "wiki"]
    frame = pandas.Series(column)
    assert frame.tolist() == column.tolist()
    table = SketchedGradients(torch.eye(4, 16), SKETCH, {"source": column})
    for mask in (column == "wiki", np.asarray(column) == "wiki", frame == "wiki"):
        assert table.where(mask).source.tolist() == ["wiki", "wiki"]
    for values in (frame[:2], frame.unique()[:2], pandas.Index(["books", "wiki"])):
        assert len(table.where(source=values)) == 3


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (torch.tensor([200, 3], dtype=torch.uint8), torch.int64),
        (torch.tensor([60_000, 3], dtype=torch.uint16), torch.int64),
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), torch.float32),
        (np.array([1.5, 2.0], dtype=np.float16), torch.float32),
        ([True, False], torch.bool),
        (np.array([1 << 60, 2]), torch.int64),
    ],
    ids=str,
)
def test_columns_have_a_few_types(tmp_path, given, stored):
    """So that "unknown" is -1 or NaN, whatever type a batch has, and all of them leave for NumPy."""
    table = SketchedGradients(torch.eye(2, 16), SKETCH, {"own": given})
    assert table.own.dtype == stored
    assert table.own.tolist() == given.tolist() if not isinstance(given, list) else given
    written(tmp_path, table)
    store = written(tmp_path, rows([1]), stage="test")
    unknown = store.metadata()["own"][2]
    assert unknown.isnan() if stored.is_floating_point else unknown == (False if stored == torch.bool else -1)
    assert len(store.where(own=given[0])) == 1
    store.to_pandas()


def test_numbers_that_no_column_can_have_are_refused():
    large = np.array([2**63 + 1, 2], dtype=np.uint64)
    for given in (torch.tensor([1j, 2]), torch.from_numpy(large), large):
        with pytest.raises(ValueError, match="column 'own' has "):
            SketchedGradients(torch.eye(2, 16), SKETCH, {"own": given})


def test_names_are_in_order_where_scores_are_summed_by_them():
    sketches = torch.tensor([[3.0], [1.0], [2.0], [0.5]]) * torch.eye(1, 16)
    table = SketchedGradients(sketches, SKETCH, {"example_id": ["c", "a", "b", "a"]})
    query = SketchedGradients(torch.eye(1, 16), SKETCH)
    assert scores(query, table, group="example_id").tolist() == [[1.5, 2.0, 3.0]]
    assert top_k(query, table, 2).example_ids == [["c", "b"]]


def test_steps_are_answers_where_other_rows_have_names(tmp_path):
    part = rows([1, 2, 3])
    unnamed = SketchedGradients(part.sketches, SKETCH, {**part.columns, "example_id": torch.full((3,), -1)})
    named = rows([3], "validate", fingerprint=7)
    written(tmp_path, unnamed)
    written(tmp_path, SketchedGradients(named.sketches, SKETCH, {**named.columns, "example_id": ["x"]}), stage="test")
    fit = GradientStore.open(tmp_path).where(stage="fit")
    assert self_influence(fit).example_ids.tolist() == [1, 2, 3]


def test_measurements_belong_to_the_lineage_of_their_fit(tmp_path):
    """Those of another fit, or of steps that were done again, are not visible; those without a fit always are."""
    written(tmp_path, rows([1, 2, 3]))
    written(tmp_path, rows([2], "validate", fingerprint=5), stage="validate", parent=1)
    written(tmp_path, rows([3], "validate", fingerprint=6), stage="validate", parent=1)
    written(tmp_path, rows([9], "validate", fingerprint=7), stage="validate")
    store = written(tmp_path, rows([3, 4]), parent=1, parent_step=2)
    assert store.where(stage="validate").metadata()["fingerprint"].tolist() == [5, 7]
    fresh = written(tmp_path, rows([1]))
    assert fresh.where(stage="validate").metadata()["fingerprint"].tolist() == [7]
    assert GradientStore.open(tmp_path, lineage=1).where(stage="validate").metadata()["step"].tolist() == [2, 3, 9]
    fresh.compact()
    with pytest.raises(ValueError, match=r"lineage=1 is no fit of the store; its fits are \[6\]"):
        GradientStore.open(tmp_path, lineage=1)


def test_rows_that_could_not_be_written_are_said_at_opening(tmp_path):
    store = several(tmp_path)
    run = dataclasses.replace(read_runs(store.snapshot)[0], incomplete=True)
    run.write(store.snapshot)
    with pytest.warns(UserWarning, match=r"some steps of runs \[1\] have no rows"):
        GradientStore.open(tmp_path)


def test_an_empty_selection_says_so(tmp_path):
    store = several(tmp_path)
    with pytest.raises(ValueError, match="the selection is empty"):
        store.where(step=99).top_k(rows([1]), 1)


def test_a_file_in_place_of_the_folder_is_named(tmp_path, untyped):
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(ValueError, match=r"last\.ckpt is a file"):
        GradientStore.create(tmp_path / "last.ckpt", spec())
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt has no store"):
        GradientStore.open(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"takes the folder of a store, such as writer\.dirpath, got a int"):
        GradientStore.open(3)


def test_arrays_are_copies_where_numpy_asks_for_them(tmp_path):
    held = rows([1, 2])
    copied = np.array(held)
    copied[:] = 0
    assert (held.sketches != 0).any()
    assert np.shares_memory(np.asarray(held), held.sketches.numpy())
    store = written(tmp_path / "store", held)
    with pytest.raises(ValueError, match="copy"):
        store.__array__(copy=False)
    with pytest.raises(ValueError, match="copy"):
        SketchedGradients(held.sketches.bfloat16(), SKETCH).__array__(copy=False)


def test_arrays_are_exported_beside_what_others_have_there(tmp_path):
    """A column of an earlier export that this one has not is removed; nothing else is, and no store is touched."""
    plain = rows([1, 2])
    named = SketchedGradients(plain.sketches, plain.sketch, {**plain.columns, "source": ["a", "b"]})
    first = written(tmp_path / "first", named)
    second = written(tmp_path / "second", rows([3]))
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "embeddings.npy", np.ones(3))
    first.export("npy", tmp_path / "out")
    assert (tmp_path / "out" / "source.npy").exists()
    second.export("npy", tmp_path / "out")
    assert not (tmp_path / "out" / "source.npy").exists()
    assert np.load(tmp_path / "out" / "sketches.npy").shape[0] == 1
    assert np.load(tmp_path / "out" / "embeddings.npy").tolist() == [1, 1, 1]
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "loss.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"has loss\.npy of something else"):
        second.export("npy", tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["loss.npy"]
    with pytest.raises(ValueError, match="is the folder of a store"):
        second.export("npy", tmp_path / "first")
    assert len(GradientStore.open(tmp_path / "first")) == 2


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_an_export_that_fails_leaves_what_was_there(tmp_path, kind):
    store = written(tmp_path / "store", rows([1]))
    store = written(tmp_path / "store", rows([2]), stage="test")
    path = tmp_path / ("out" if kind == "npy" else "out.parquet")
    store.export(kind, path)
    before = {file: file.read_bytes() for file in ([path] if path.is_file() else sorted(path.iterdir()))}
    last = sorted((tmp_path / "store").rglob("*.safetensors"))[-1]
    last.write_bytes(bytes([*last.read_bytes()[:-3], 255, 0, 255]))
    with pytest.raises(CorruptFile):
        GradientStore.open(tmp_path / "store").export(kind, path)
    assert {file: file.read_bytes() for file in before} == before
    assert not list(tmp_path.rglob(".part-*"))
