"""After any interruptions and resumes, each step of a lineage has its rows exactly once."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import some
from test_row_store import rows, spec, written

from lightning_sketch.attribution import GradientStore
from lightning_sketch.store.format import CorruptShard


def steps(store):
    return store.metadata()["step"].tolist()


def runs_of(store):
    return store.metadata()["attempt"].tolist()


def test_a_resume_supersedes_what_came_after_its_checkpoint(tmp_path):
    written(tmp_path, rows(range(1, 8)))
    store = written(tmp_path, rows(range(5, 10)), parent=1, parent_step=4)
    assert steps(store) == list(range(1, 10))
    assert runs_of(store) == [1] * 4 + [2] * 5
    assert steps(GradientStore.open(tmp_path, lineage=1)) == list(range(1, 8))


def test_a_second_resume_from_an_older_checkpoint(tmp_path):
    written(tmp_path, rows(range(1, 8)))
    written(tmp_path, rows(range(5, 10)), parent=1, parent_step=4)
    store = written(tmp_path, rows(range(3, 6)), parent=1, parent_step=2)
    assert runs_of(store) == [1, 1, 3, 3, 3]
    assert runs_of(GradientStore.open(tmp_path, lineage=2)) == [1] * 4 + [2] * 5


def test_a_run_without_rows_of_its_own_is_resumed(tmp_path):
    """The second run resumes at step 4 and writes nothing before it is itself resumed at step 4."""
    written(tmp_path, rows(range(1, 8)))
    written(tmp_path, parent=1, parent_step=4)
    store = written(tmp_path, rows([5, 6]), parent=2, parent_step=4)
    assert steps(store) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", some(range(20), range(5)))
def test_any_tree_of_runs(tmp_path, seed):
    """Against lineages built by hand: each step comes from the last run of the lineage that did it."""
    draw = random.Random(seed)
    done = {}  # run -> the run that did each step, as a list
    for number in range(1, 9):
        parent = draw.choice([None, *done])
        at = 0 if parent is None else draw.randint(0, len(done[parent]))
        lineage = [] if parent is None else done[parent][:at]
        made = draw.randint(0, 6)
        parts = [rows([at + i]) for i in range(1, made + 1)]
        written(tmp_path, *parts, parent=parent, parent_step=None if parent is None else at)
        done[number] = lineage + [number] * made
    for number, lineage in done.items():
        store = GradientStore.open(tmp_path, lineage=number)
        found = dict(zip(steps(store), runs_of(store), strict=True))
        assert len(store) == len(lineage)
        assert [found[i + 1] for i in range(len(lineage))] == lineage


def test_ranks_may_change_in_number(tmp_path):
    """Two processes, then one, then three."""
    store = GradientStore.create(tmp_path, spec())
    first = store.begin_run("fit", world_size=2)
    for rank in range(2):
        with store.appender(first, rank) as appender:
            appender.put(rows(range(1, 6)))
    second = store.begin_run("fit", parent=1, parent_step=3)
    with store.appender(second) as appender:
        appender.put(rows(range(4, 6)))
    third = store.begin_run("fit", parent=2, parent_step=4, world_size=3)
    for rank in range(3):
        with store.appender(third, rank) as appender:
            appender.put(rows([5]))
    assert sorted(steps(GradientStore.open(tmp_path))) == [1, 1, 2, 2, 3, 3, 4, 5, 5, 5]


def test_of_a_checkpoint_measured_twice_the_later_rows_are_visible(tmp_path):
    """The later run of one stage at the same weights is visible; other weights, stages and the fit are unaffected."""
    written(tmp_path, rows([1, 2]))
    written(tmp_path, rows([2, 2], "validate", fingerprint=7), stage="validate")
    written(tmp_path, rows([2], "test", fingerprint=7), stage="test")
    written(tmp_path, rows([9], "validate", fingerprint=8), stage="validate")
    store = written(tmp_path, rows([2, 2, 2], "validate", fingerprint=7), stage="validate")
    assert runs_of(store) == [1, 1, 3, 4, 5, 5, 5]
    assert store.where(stage="validate", fingerprint=7).metadata()["attempt"].unique().tolist() == [5]


def test_unknown_weights_are_not_taken_for_equal(tmp_path):
    written(tmp_path, rows([1], "validate"), stage="validate")
    store = written(tmp_path, rows([1], "validate"), stage="validate")
    assert runs_of(store) == [1, 2]
    with pytest.raises(ValueError, match="lineage=2 is no fit of the store; its fits are"):
        GradientStore.open(tmp_path, lineage=2)


@pytest.mark.parametrize("lineage", ["newest", True, False, 1.0, None])
def test_an_unknown_lineage_is_refused_in_words(tmp_path, lineage, untyped):
    written(tmp_path, rows([1]))
    with pytest.raises(ValueError, match=f"lineage={lineage!r} is not known; use 'latest'"):
        GradientStore.open(tmp_path, lineage=lineage)


@pytest.mark.parametrize("number", [np.int64(1), torch.tensor(1)])
def test_the_number_of_a_fit_may_be_any_integer(tmp_path, number):
    written(tmp_path, rows([1, 2]))
    written(tmp_path, rows([1, 2, 3]))
    assert runs_of(GradientStore.open(tmp_path, lineage=number)) == [1, 1]


def test_compaction_refuses_a_changed_bit(tmp_path):
    store = written(tmp_path, rows([1, 2, 3]))
    path = Path(store.shards()[0].partition("#")[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="do not match its checksum"):
        store.compact()


def test_queries_are_stored_apart_and_follow_their_fit(tmp_path):
    written(tmp_path, rows([1, 2, 3]), rows([2], "queries"), rows([3, 3], "queries"))
    store = written(tmp_path, rows([3]), rows([3], "queries"), parent=1, parent_step=2)
    assert steps(store) == [1, 2, 3]
    assert {step: len(q) for step, q in store.queries().items()} == {2: 1, 3: 1}
    assert torch.equal(store.queries()[2].sketches, rows([2]).sketches)
    assert store.queries()[3].metadata()["attempt"].tolist() == [2]


def test_compaction_keeps_exactly_the_visible_rows(tmp_path):
    written(tmp_path, *(rows([s]) for s in range(1, 8)), rows([3], "queries"), dtype="float16")
    written(tmp_path, rows([9], "validate", fingerprint=8), stage="validate", dtype="float16")
    before = written(tmp_path, *(rows([s]) for s in (5, 6)), parent=1, parent_step=4, dtype="float16")
    old, queries = before.read(), before.queries()
    assert len(before.shards()) == 7
    assert before.verify() == 11
    after = before.compact()
    assert after.verify() == 8  # four and two steps, the query, the checkpoint
    assert len(after.shards()) == 3
    for name, column in old.metadata().items():
        torch.testing.assert_close(after.metadata()[name], column, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(after.read().sketches, old.sketches)
    assert torch.equal(after.queries()[3].sketches, queries[3].sketches)
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows-2"]
    with pytest.raises(ValueError, match=r"resumes run 1 at step 6.* kept only the first 4"):
        after.begin_run("fit", parent=1, parent_step=6)
    again = written(tmp_path, rows([6, 7]), parent=3, parent_step=5, dtype="float16")
    assert steps(again.where(stage="fit")) == [1, 2, 3, 4, 5, 6, 7]
