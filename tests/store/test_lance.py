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
    with pytest.raises(ValueError, match="differ in columns \\(another: none, int64\\)"):
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


def test_rows_of_parquet_name_their_neighbors(tmp_path):
    """Those of the largest cosines, from dense algebra, in the form that embedding-atlas documents."""
    from pyarrow import parquet

    wide = examples(range(60))
    wide.sketches[7] = 0  # has no direction
    wide.sketches[9] = torch.nan
    wide.sketches[3] *= 1e30  # whose square is not finite
    store = put(tmp_path / "store", wide, examples(range(60, 100), seed=1), dtype="float32")
    store.export("parquet", tmp_path / "rows.parquet", neighbors=5)
    found = parquet.read_table(tmp_path / "rows.parquet")["neighbors"].to_pylist()
    exact = store.read().sketches.double()
    known = [i for i in range(100) if i not in (7, 9)]
    directions = torch.zeros_like(exact)
    directions[known] = exact[known] / exact[known].norm(dim=1, keepdim=True)
    distances = 1 - directions @ directions.T
    for row, own in enumerate(found):
        ids, said = own["ids"], torch.tensor(own["distances"]).double()
        assert (ids[0], said[0]) == (row, 0)
        assert len(set(ids)) == 5
        assert torch.allclose(said[1:], distances[row, ids[1:]], rtol=0, atol=1e-6)  # float32 of 64 products
        others = torch.cat([distances[row, :row], distances[row, row + 1 :]])
        assert torch.allclose(said[1:], others.sort().values[:4], rtol=0, atol=1e-6)


def test_neighbors_across_blocks_and_of_few_rows(tmp_path, monkeypatch):
    """A store of more than one block has those of one; of three rows each has three, itself among them."""
    from pyarrow import parquet

    store = a_store(tmp_path / "store", "float32")
    store.export("parquet", tmp_path / "whole.parquet", neighbors=7)
    plain = type(store).blocks
    monkeypatch.setattr(type(store), "blocks", lambda self: plain(self, 33))
    monkeypatch.setattr("lightning_sketch.store.export._ROWS", 40)
    store.export("parquet", tmp_path / "parts.parquet", neighbors=7)
    whole, parts = (
        parquet.read_table(tmp_path / f"{name}.parquet")["neighbors"].to_pylist() for name in ("whole", "parts")
    )
    assert [row["ids"] for row in whole] == [row["ids"] for row in parts]
    few = put(tmp_path / "few", examples(range(3)), dtype="float32")
    few.export("parquet", tmp_path / "few.parquet", neighbors=7)
    assert [len(row["ids"]) for row in parquet.read_table(tmp_path / "few.parquet")["neighbors"].to_pylist()] == [3] * 3


def test_neighbors_of_many_small_files_take_two_passes(tmp_path, monkeypatch):
    """One for the rows themselves, one to find their neighbors, where a pass for each file were 20."""
    store, opened = put(tmp_path / "store", *(examples([i]) for i in range(20)), dtype="float32"), []
    plain = type(store)._open_shard
    monkeypatch.setattr(type(store), "_open_shard", lambda self, name: opened.append(name) or plain(self, name))
    store.export("parquet", tmp_path / "rows.parquet", neighbors=3)
    assert len(set(opened)) == 20
    assert len(opened) == 40


def test_wrong_uses_of_neighbors(tmp_path):
    store = put(tmp_path / "store", examples(range(3), neighbors=torch.arange(3)))
    with pytest.raises(ValueError, match="rename it"):
        store.export("parquet", tmp_path / "rows.parquet", neighbors=2)
    with pytest.raises(ValueError, match="need neighbors >= 1, got 0"):
        store.export("parquet", tmp_path / "rows.parquet", neighbors=0)
    with pytest.raises(ValueError, match="neighbors is of 'parquet', got 'npy'"):
        store.export("npy", tmp_path / "rows", neighbors=2)
    assert not (tmp_path / "rows.parquet").exists()


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


def test_many_fragments_of_many_rows_are_read_in_linear_time(uri, tmp_path, monkeypatch):
    """A batch is compared with the ids around it alone, not with all ids."""
    monkeypatch.setattr("lightning_sketch.store.lance_export._ROWS_PER_FRAGMENT", 100)
    store = a_store(tmp_path / "store")
    store.export("lance", uri)
    compared, isin = [], np.isin

    def counted(own, ids, **options):
        compared.append(len(ids))
        return isin(own, ids, **options)

    monkeypatch.setattr(np, "isin", counted)
    rows = LanceRows(uri)
    assert len(rows.dataset.get_fragments()) == 4
    torch.testing.assert_close(scores(QUERIES, rows), scores(QUERIES, store))
    assert sum(compared) == len(store)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_the_recall_that_is_printed_is_that_of_the_answers(uri, tmp_path, size, capsys):
    """Also of rows so small that Lance's own distances, which are differences from 1, are all alike."""
    rows = examples(range(2000))
    small = SketchedGradients(rows.sketches * size, SKETCH, rows.columns)
    put(tmp_path / "store", small, dtype="float32").export("lance", uri)
    queries = SketchedGradients(QUERIES.sketches * size, SKETCH, QUERIES.columns)
    indexed, recall = build_index(LanceRows(uri), partitions=1, queries=queries)
    vectors = queries.sketches.double() @ small.sketches.double().T
    best = vectors.topk(10).indices
    direct = [
        table["example_id"].to_pylist()
        for query in queries.sketches.numpy()
        for table in [
            indexed.dataset.to_table(["example_id"], nearest={"column": "sketch", "q": query, "k": 10, "metric": "dot"})
        ]
    ]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(direct, best.tolist(), strict=True)]
    assert recall == pytest.approx(np.mean(shares))
    assert ("IVF_FLAT" in capsys.readouterr().out.split(";", 1)[1]) == (recall < 0.9)


def test_an_index_answers_for_whole_examples_and_refuses_weights(uri, tmp_path):
    parts = examples([i // 2 for i in range(400)], part=torch.arange(400) % 2)
    store = put(tmp_path / "store", parts)
    store.export("lance", uri)
    rows, _ = build_index(LanceRows(uri), index="IVF_FLAT", partitions=1)
    exact = scores(QUERIES, store, group="example_id")
    found = top_k(QUERIES, rows, 3, approximate=True)
    torch.testing.assert_close(found.scores, exact.gather(1, found.example_ids))
    with pytest.raises(ValueError, match="knows no weights"):
        top_k(QUERIES, rows, 3, approximate=True, weighted=True)
    assert top_k(QUERIES, rows, 10**9, approximate=True, group=None).scores.shape == (4, 400)


def test_an_index_finds_the_best_of_what_was_selected(uri, tmp_path):
    """Rows of other weights, or that a mask leaves out, do not take the places."""
    large = examples(range(200), seed=1, fingerprint=8)
    large = SketchedGradients(100 * large.sketches, SKETCH, large.columns)
    store = put(tmp_path / "store", examples(range(400)), large, dtype="float32")
    store.export("lance", uri)
    rows, _ = build_index(LanceRows(uri), index="IVF_FLAT", partitions=1)
    few = torch.zeros(600, dtype=torch.bool)
    few[5:400:20] = True
    for chosen, same in ((rows, store), (rows.where(few), store.where(few))):
        found, best = top_k(QUERIES, chosen, 5, approximate=True), top_k(QUERIES, same, 5)
        assert torch.equal(found.example_ids, best.example_ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"index": "IVF_PQ"}, "256 rows or more"),
        ({"index": "HNSW"}, "use one of"),
        ({"metric": "l2"}, "use one of"),
        ({"partitions": 0}, "partitions >= 1"),
        ({"k": 0}, "k >= 1"),
    ],
    ids=str,
)
def test_an_index_that_cannot_be_built_leaves_the_one_there_is(uri, tmp_path, options, words, untyped):
    put(tmp_path / "store", examples(range(100))).export("lance", uri)
    rows, _ = build_index(LanceRows(uri), index="IVF_FLAT", partitions=1)
    with pytest.raises(ValueError, match=words):
        build_index(rows, **options)
    assert len(top_k(QUERIES, LanceRows(uri), 3, approximate=True).example_ids) == 4


def test_columns_of_other_types_are_refused(uri, tmp_path):
    """Where Lance would convert, "7" and "007" became one example, and rows without an id an example "-1"."""
    put(tmp_path / "numbers", examples(range(5))).export("lance", uri)
    named = examples(range(3))
    named = SketchedGradients(named.sketches, SKETCH, {**named.columns, "example_id": ["7", "8", "007"]})
    with pytest.raises(ValueError, match="example_id: int64, string"):
        put(tmp_path / "names", named).export("lance", uri, append=True)
    assert LanceRows(uri).metadata()["example_id"].tolist() == list(range(5))


@pytest.mark.parametrize("name", ["sketch", "scale", "file", "place", "a.b", "_rowid", "a`b"])
def test_columns_that_have_another_use_are_refused(uri, tmp_path, name):
    store = put(tmp_path / "store", examples(range(5), **{name: torch.arange(5)}))
    with pytest.raises(ValueError, match="cannot have the columns"):
        store.export("lance", uri)


def test_a_column_of_ones_own_with_the_name_scale_scales_nothing(tmp_path):
    rows = examples(range(40), scale=torch.full((40,), 3.0))
    store = put(tmp_path / "store", rows, dtype="float32")
    assert torch.equal(store.read().sketches, rows.sketches)


def test_an_export_never_hides_what_another_has_completed(uri, tmp_path, monkeypatch):
    """B begins and ends between A's writing and A's tag: the later version has the rows of both."""
    one, two = put(tmp_path / "a", examples(range(10))), put(tmp_path / "b", examples(range(100, 110), seed=1))
    one.export("lance", uri)
    one = put(tmp_path / "a", examples(range(10, 20), seed=2))
    write = lance.write_dataset

    def between(*arguments, **options):
        monkeypatch.setattr(lance, "write_dataset", write)
        written = write(*arguments, **options)
        two.export("lance", uri, append=True)
        return written

    monkeypatch.setattr(lance, "write_dataset", between)
    one.export("lance", uri, append=True)
    assert sorted(LanceRows(uri).metadata()["example_id"].tolist()) == [*range(20), *range(100, 110)]


def test_the_optimizers_are_those_of_all_exports(uri, tmp_path):
    put(tmp_path / "a", examples(range(3), stage="fit"), stage="fit", optimizer="SGD").export("lance", uri)
    put(tmp_path / "b", examples(range(3), stage="fit"), stage="fit", optimizer="AdamW").export(
        "lance", uri, append=True
    )
    assert LanceRows(uri).optimizers == {"SGD", "AdamW"}


def test_an_iterator_selects_before_columns_were_read(uri, tmp_path):
    put(tmp_path / "store", examples(range(40))).export("lance", uri)
    assert len(LanceRows(uri).where(example_id=(i for i in (3, 5)))) == 2
    empty = LanceRows(uri).where(source="nowhere")
    assert empty.read().columns.keys() == LanceRows(uri).read().columns.keys()
    with pytest.raises(ValueError, match="batch_rows >= 1"):
        next(LanceRows(uri).blocks(0))


def test_fragments_that_lance_has_compacted_keep_each_sketch_with_its_columns(uri, tmp_path):
    for run in range(4):
        store = put(tmp_path / "store", examples(range(run * 50, run * 50 + 50), seed=run))
        store.export("lance", uri, append=run > 0)
        if run == 2:
            lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=100)
    found, expected = LanceRows(uri).read(), store.read()
    order = found.example_id.argsort()
    assert torch.equal(found.example_id[order], expected.example_id)
    assert torch.equal(found.sketches[order], expected.sketches.float())
