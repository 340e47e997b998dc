"""A Lance dataset has the visible rows of a store, each once, and answers as the store does."""

import pickle

import numpy as np
import pytest
import torch
from engines import QUERIES, SKETCH, a_store, examples, put

from lightning_sketch import GradientStore
from lightning_sketch.attribution import row_curvature, scores, self_influence, top_k
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store import LanceRows, RowSource, SketchedGradients, StoreSpec, build_index

lance = pytest.importorskip("lance", reason="needs pylance: pip install 'lightning-sketch[lance]'")


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "rows.lance")


def exported(store, uri, **options):
    store.export("lance", uri, **options)
    return LanceRows(uri)


def same(one, other):
    """Whether two sources have the same rows in the same order."""
    columns, theirs = one.metadata(), other.metadata()
    assert columns.keys() == theirs.keys()
    for name, column in columns.items():
        if isinstance(column, torch.Tensor):
            assert torch.equal(column.nan_to_num(), theirs[name].nan_to_num()), name
        else:
            assert column.tolist() == theirs[name].tolist(), name
    assert torch.equal(one.read().sketches.float(), other.read().sketches.float())
    return True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_come_back_bit_for_bit(tmp_path, uri, dtype):
    """In float32, or with the numbers and scales of a store in float16."""
    store = a_store(tmp_path / "store", dtype)
    rows = exported(store, uri)
    assert isinstance(rows, RowSource)
    assert rows.sketch == SKETCH
    assert same(rows, store)
    assert [len(block) for block in rows.blocks(30)][:2] == [30, 20] or max(map(len, rows.blocks(30))) <= 30


def test_half_of_the_bytes_at_2_to_the_minus_11_of_the_largest_number(tmp_path, uri):
    store = a_store(tmp_path / "store", "float32")
    rows, exact = exported(store, uri, dtype="float16").read().sketches, store.read().sketches
    assert ((rows - exact).abs() <= 2**-11 * exact.abs().amax(1, keepdim=True)).all()
    with pytest.raises(ValueError, match="dtype='float32' was asked for"):
        store.export("lance", uri, append=True, dtype="float32")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "cosine"},
        {"method": "influence", "curvature": "margin", "damping": 1.0},
        {"weighted": True, "group": "example_id"},
    ],
    ids=str,
)
def test_scores_are_those_of_the_store(tmp_path, uri, options):
    store = a_store(tmp_path / "store")
    rows = exported(store, uri)
    assert torch.equal(scores(QUERIES, rows, **options), scores(QUERIES, store, **options))
    mine, theirs = top_k(QUERIES, rows, 7, **options), top_k(QUERIES, store, 7, **options)
    assert torch.equal(mine.scores, theirs.scores)
    assert torch.equal(mine.example_ids, theirs.example_ids)
    assert torch.equal(self_influence(rows, method="dot").scores, self_influence(store, method="dot").scores)


@pytest.mark.parametrize(
    "equal",
    [{"source": "it's"}, {"source": ["wiki", ""]}, {"example_id": [3, 390]}, {"stage": "validate"}, {"even": True},
     {"source": "wiki", "even": False}, {"stage": 1}, {"lr": 0.5}],
    ids=str,
)  # fmt: skip
def test_selections_are_those_of_the_store(tmp_path, uri, equal):
    """By Lance, or by a mask where it would compare otherwise."""
    store = a_store(tmp_path / "store")
    rows = exported(store, uri)
    by_lance = LanceRows(uri).where(**equal)
    assert same(by_lance, store.where(**equal)) if len(by_lance) else not len(store.where(**equal))
    assert ("rows" in vars(rows)) is False
    assert len(rows) == 400
    assert len(rows.where(**equal)) == len(by_lance)  # now that columns are in memory
    keep = torch.arange(len(rows)) % 7 == 0
    assert same(LanceRows(uri).where(even=True).where(keep[: len(store.where(even=True))]),
                store.where(even=True).where(keep[: len(store.where(even=True))]))  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"no": 1}, "no column 'no'"), ({"stage": "training"}, "no stage"), ({"source": 3}, "has strings"),
     ({"example_id": "x"}, "has int64")],
)  # fmt: skip
def test_wrong_selections_are_refused_as_by_a_store(tmp_path, uri, wrong, words):
    store = a_store(tmp_path / "store")
    rows = exported(store, uri)
    with pytest.raises(ValueError, match=words) as of_store:
        store.where(**wrong)
    with pytest.raises(ValueError, match=words) as of_lance:
        rows.where(**wrong)
    assert str(of_lance.value) == str(of_store.value)


def test_what_is_new_is_added_and_what_is_replaced_goes(tmp_path, uri):
    """A second run measures 50 examples again and 50 more: the former replace rows of the first run."""
    rows = exported(a_store(tmp_path / "store"), uri)
    again = put(tmp_path / "store", examples(range(100, 150), seed=1), examples(range(400, 450), seed=2))
    assert len(again) == 450
    assert len(LanceRows(uri)) == 400
    found = exported(again, uri, append=True)
    assert len(found) == 450 == found.dataset.count_rows()
    mine, theirs = scores(QUERIES, found, group="example_id"), scores(QUERIES, again, group="example_id")
    assert torch.equal(mine, theirs)
    assert len(rows.read()) == 400  # reads its version
    before = found.dataset.version
    assert exported(again, uri, append=True).version == before  # nothing to do


def test_rows_of_steps_that_were_done_again_go(tmp_path, uri):
    """A fit of ten steps, resumed from its fourth."""

    def steps(first, last, seed):
        count = range(first, last + 1)
        return examples([-1] * len(count), seed, stage="fit", step=torch.tensor(list(count)))

    store = put(tmp_path / "store", steps(1, 10, 0), stage="fit")
    exported(store, uri)
    store = put(tmp_path / "store", steps(5, 8, 1), stage="fit", parent=1, parent_step=4)
    assert same(exported(store, uri, append=True), store)


def test_compaction_changes_no_row(tmp_path, uri):
    store = a_store(tmp_path / "store")
    exported(store, uri)
    assert same(exported(store.compact(), uri, append=True), GradientStore.open(tmp_path / "store"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["append", "delete", "tag"])
def test_an_export_that_is_killed_is_not_seen_and_can_be_repeated(tmp_path, uri, monkeypatch, when):
    before = exported(a_store(tmp_path / "store"), uri).read()
    again = put(tmp_path / "store", examples(range(100, 150), seed=1), examples(range(400, 450), seed=2))
    dataset = lance.LanceDataset

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if when == "append":  # after its commit
            write = lance.write_dataset

            def write_and_die(*args, **kwargs):
                write(*args, **kwargs)
                raise Killed

            patch.setattr(lance, "write_dataset", write_and_die)
        else:
            patch.setattr(dataset, "delete", killed) if when == "delete" else patch.setattr(dataset, "tags", killed)
        with pytest.raises((Killed, AttributeError)):
            again.export("lance", uri, append=True)
    assert torch.equal(LanceRows(uri).read().sketches, before.sketches)
    found = exported(again, uri, append=True)
    assert found.dataset.count_rows() == len(found) == 450
    assert torch.equal(scores(QUERIES, found, group="example_id"), scores(QUERIES, again, group="example_id"))


def test_a_selection_is_added_and_removes_nothing(tmp_path, uri):
    store = a_store(tmp_path / "store")
    exported(store.where(even=True), uri)
    assert len(exported(store.where(source="wiki"), uri, append=True)) == len(store.where(even=True)) + 67
    assert len(exported(store, uri, append=True)) == 400
    assert len(exported(store.where(even=True), uri, append=True)) == 400


def test_rows_that_were_replaced_meanwhile_are_refused(tmp_path, uri):
    store = a_store(tmp_path / "store")
    exported(store, uri)
    put(tmp_path / "store", examples(range(100, 150), seed=1))
    with pytest.raises(ValueError, match="open the store again"):
        store.export("lance", uri, append=True)


def test_rows_of_several_stores(tmp_path, uri):
    """Those of one are not removed by an export of another."""
    exported(a_store(tmp_path / "one"), uri)
    other = put(tmp_path / "two", examples(range(1000, 1050), seed=5))
    assert len(exported(other, uri, append=True)) == 450


def test_what_does_not_fit_is_refused(tmp_path, uri):
    store = a_store(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="has no Lance dataset"):
        LanceRows(uri)
    exported(store, uri)
    with pytest.raises(ValueError, match="append=True"):
        store.export("lance", uri)
    with pytest.raises(ValueError, match="are of 'lance'"):
        store.export("npy", tmp_path / "out", append=True)
    with pytest.raises(ValueError, match="no rows to export"):
        store.where(example_id=12345).export("lance", str(tmp_path / "none"))
    sketch = BlockSRHT(SKETCH.n, 64, seed=4)
    other = GradientStore.create(tmp_path / "other", StoreSpec.of(sketch, store.spec.parameters))
    with other.appender(other.begin_run("validate")) as appender:
        appender.put(SketchedGradients(torch.ones(1, 64), sketch))
    with pytest.raises(ValueError, match="export to another uri"):
        GradientStore.open(tmp_path / "other").export("lance", uri, append=True)
    more = put(tmp_path / "store", examples([999], seed=1, another=torch.tensor([1])))
    with pytest.raises(ValueError, match="differ in columns \\(another\\)"):
        more.export("lance", uri, append=True)
    import pyarrow as pa

    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match="another program"):
        store.export("lance", str(tmp_path / "foreign"), append=True)
    with pytest.raises(ValueError, match="no rows that an export has completed"):
        LanceRows(tmp_path / "foreign")


def test_a_source_goes_to_another_process(tmp_path, uri):
    rows = exported(a_store(tmp_path / "store"), uri).where(source="wiki")
    assert same(pickle.loads(pickle.dumps(rows)), rows)


@pytest.mark.parametrize("kind", ["IVF_FLAT", "IVF_RQ"])
@pytest.mark.parametrize("largest", [True, False])
def test_an_index_finds_examples_with_exact_scores(tmp_path, uri, capsys, kind, largest):
    """Of two cells one query visits both, so that with whole sketches nothing is missed."""
    store = a_store(tmp_path / "store")
    rows, recall = build_index(exported(store, uri), index=kind, partitions=2)
    assert "of the 10 best" in capsys.readouterr().out
    found = top_k(QUERIES, rows, 5, largest=largest, approximate=True)
    exact = top_k(QUERIES, store, 5, largest=largest)
    truth = dict(enumerate(scores(QUERIES, store).unbind()))
    for i, ids in enumerate(found.example_ids):
        torch.testing.assert_close(found.scores[i], truth[i][ids], rtol=1e-5, atol=1e-5)
    if kind == "IVF_FLAT":
        assert recall == 1
        assert torch.equal(found.example_ids, exact.example_ids)
    assert len(exported(store, uri, append=True)) == 400


def test_the_last_index_is_the_only_one(tmp_path, uri):
    """Of several, Lance would take the first, and for another metric none."""
    store = a_store(tmp_path / "store")
    rows, _ = build_index(exported(store, uri), partitions=2)
    rows, _ = build_index(rows, metric="cosine", index="IVF_FLAT", partitions=2)
    found = top_k(QUERIES, rows, 5, method="cosine", approximate=True)
    assert torch.equal(found.example_ids, top_k(QUERIES, store, 5, method="cosine").example_ids)
    with pytest.raises(ValueError, match="no index for 'dot'"):
        top_k(QUERIES, rows, 5, approximate=True)


def test_influence_by_an_index(tmp_path, uri):
    """The curvature is in the query, whose largest products the index finds."""
    store = a_store(tmp_path / "store")
    rows, _ = build_index(exported(store, uri), index="IVF_FLAT", partitions=2)
    options = {"method": "influence", "curvature": row_curvature(store, "fisher")}
    found, exact = top_k(QUERIES, rows, 5, approximate=True, **options), top_k(QUERIES, store, 5, **options)
    assert torch.equal(found.example_ids, exact.example_ids)


def test_an_index_is_asked_for_what_it_has(tmp_path, uri):
    store = a_store(tmp_path / "store")
    rows, _ = build_index(exported(store, uri), index="IVF_FLAT", partitions=2)
    with pytest.raises(ValueError, match="no index for 'cosine'"):
        top_k(QUERIES, rows, method="cosine", approximate=True)
    with pytest.raises(ValueError, match="one Lance dataset"):
        top_k(QUERIES, store, approximate=True)
    with pytest.raises(ValueError, match="leave approximate=True out"):
        top_k(QUERIES, rows, method="influence", curvature="fisher", normalize=True, approximate=True)
    with pytest.raises(ValueError, match="without where"):
        build_index(rows.where(even=True))
    half = exported(store, uri + "16", dtype="float16")
    with pytest.raises(ValueError, match="metric='cosine'"):
        build_index(half)


def test_parquet(tmp_path):
    from pyarrow import parquet

    store = a_store(tmp_path / "store")
    store.export("parquet", tmp_path / "out" / "rows.parquet")
    table = parquet.read_table(tmp_path / "out" / "rows.parquet")
    assert table["source"].to_pylist() == store.metadata()["source"].tolist()
    sketches = np.stack(table["sketch"].to_numpy())
    assert np.array_equal(sketches, store.read().sketches.float().numpy())
    assert table["stage"].unique().to_pylist() == ["validate"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_leave_for_numpy_arrow_and_pandas(uri, tmp_path, dtype):
    store = a_store(tmp_path / "store", dtype)
    store.export("lance", uri)
    rows, kept = LanceRows(uri), store.where(source="wiki")
    assert np.asarray(rows).dtype == np.float32
    assert (np.asarray(rows) == np.asarray(store)).all()
    assert rows.to_pandas().equals(store.to_pandas())
    found, expected = rows.where(source="wiki").to_arrow(), kept.to_arrow()
    assert found.schema == expected.schema
    assert str(found.to_pydict()) == str(expected.to_pydict())  # as text, in which NaN is equal to NaN
