"""Of examples at the same weights: what is written in parts adds up, what is measured again replaces, on disk too."""

import itertools

import pytest
import torch
from test_row_store import SKETCH, written

from lightning_sketch.attribution import GradientStore, scored_rows, scores, self_influence, top_k
from lightning_sketch.store import STAGES, SketchedGradients
from lightning_sketch.store.index import equal_rows


def measured(ids, seed=0, stage="validate", fingerprint=7, **columns):
    """Rows of examples at a checkpoint."""
    sketches = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(seed))
    known = {"example_id": ids, "stage": STAGES.index(stage), "fingerprint": fingerprint, "step": 3} | columns
    full = {k: v if isinstance(v, list) else [v] * len(ids) for k, v in known.items()}
    return SketchedGradients(sketches, SKETCH, full)


QUERY = SketchedGradients(
    torch.randn(2, 16, generator=torch.Generator().manual_seed(9)), SKETCH, {"fingerprint": [7, 7]}
)


def seen(store):
    metadata = store.metadata()
    return list(zip(metadata["example_id"].tolist(), metadata["attempt"].tolist(), strict=True))


def jobs(path, *parts, stage="validate"):
    for part in parts:
        store = written(path, part, stage=stage)
    return store


@pytest.mark.parametrize("names", [False, True])
def test_two_jobs_that_share_a_data_set_are_one(tmp_path, names):
    """As one job that does it all: in scores, in top_k, and after compaction."""

    def ids(numbers):
        return [f"page {i}" for i in numbers] if names else list(numbers)

    whole = measured(ids(range(12)), seed=1)
    halves = [
        SketchedGradients(whole.sketches[part], SKETCH, {k: v[part] for k, v in whole.columns.items()})
        for part in (slice(0, 5), slice(5, 12))
    ]
    one, two = jobs(tmp_path / "one", whole), jobs(tmp_path / "two", *halves)
    for how in (lambda: two, two.compact):
        store = how()
        assert store.verify() == 12
        torch.testing.assert_close(store.scores(QUERY), one.scores(QUERY))
        found, true = store.top_k(QUERY, 4), one.top_k(QUERY, 4)
        assert (found.example_ids == true.example_ids) if names else torch.equal(found.example_ids, true.example_ids)


def test_an_example_that_is_measured_again_counts_by_its_last_row(tmp_path):
    """A short second pass, as limit_val_batches=1 makes it, hides its own examples only."""
    store = jobs(tmp_path, measured(list(range(6)), 1), measured([1, 3], 2))
    expected = [(0, 1), (2, 1), (4, 1), (5, 1), (1, 2), (3, 2)]
    assert seen(store) == expected
    assert torch.equal(store.where(example_id=[1, 3]).read().sketches, measured([1, 3], 2).sketches)
    store = store.compact()
    assert seen(store) == expected
    assert store.verify() == 6


def test_what_makes_an_example_another_one(tmp_path):
    """Another stage, loader or fingerprint; weights that are not known are never the same."""
    parts = [
        measured([1, 2], 1),
        measured([1, 2], 2, dataloader=1),
        measured([1, 2], 3, fingerprint=8),
        measured([1, 2], 4, fingerprint=0),
        measured([1, 2], 5, fingerprint=0),
    ]
    store = jobs(tmp_path, *parts)
    assert len(store) == 10
    store = written(tmp_path, measured([1, 2], 6, stage="test"), stage="test")
    assert len(store) == 12
    assert len(jobs(tmp_path, measured([2], 7)).compact()) == 12
    assert (2, 7) in seen(GradientStore.open(tmp_path))
    assert (2, 1) not in seen(GradientStore.open(tmp_path))


@pytest.mark.parametrize("known", list(itertools.product([True, False], repeat=3)))
def test_examples_without_ids_replace_what_was_there(tmp_path, known):
    """They cannot be told apart: such a run hides all before it, and any later run hides it."""
    parts = [measured([10 * i, 10 * i + 1] if own else [-1, -1], i) for i, own in enumerate(known)]
    store = jobs(tmp_path, *parts)
    last = max((i for i in range(3) if not known[i]), default=-1)
    visible = [i + 1 for i in range(3) if (i > last and known[i]) or (i == last == 2)]
    assert sorted({run for _, run in seen(store)}) == visible
    assert sorted({run for _, run in seen(store.compact())}) == visible


@pytest.mark.filterwarnings("error")
def test_rows_of_training_steps_add_up_over_epochs(tmp_path):
    """An example is at other weights each time, and drawn twice in a batch it acts twice."""
    part = measured([1, 2, 1, 2, 2], 1, stage="fit", fingerprint=[4, 4, 5, 5, 5], step=[1, 1, 2, 2, 2], lr=0.5)
    store = written(tmp_path, part)
    assert len(store) == 5
    found = store.self_influence()
    norms = 0.5 * part.sketches.square().sum(1)
    torch.testing.assert_close(found.scores, torch.stack([norms[[0, 2]].sum(), norms[[1, 3, 4]].sum()]))


def test_an_example_that_a_sampler_draws_three_times_counts_once(tmp_path):
    """In one run, on disk and in memory, in every answer, and it is said."""
    rows = measured([5, 6, 5, 8, 5], 1)
    rows = SketchedGradients(torch.cat([rows.sketches[:4], rows.sketches[:1]]), SKETCH, rows.columns)
    once = rows.where(torch.tensor([False, True, False, True, True]))
    for source in (rows, written(tmp_path, rows, stage="validate")):
        said = pytest.warns(UserWarning, match="2 of 5 rows repeat an example at the same weights")
        with said:
            torch.testing.assert_close(scores(QUERY, source), scores(QUERY, once))
        with said:
            assert scored_rows(QUERY, source).tolist() == [1, 3, 4]
        with said:
            torch.testing.assert_close(top_k(QUERY, source, 3).scores, top_k(QUERY, once, 3).scores)
        with said:
            torch.testing.assert_close(
                self_influence(source, method="dot").scores, self_influence(once, method="dot").scores
            )
        options = {"method": "influence", "curvature": "fisher", "damping": 0.1}
        with said:
            torch.testing.assert_close(scores(QUERY, source, **options), scores(QUERY, once, **options))
    store = GradientStore.open(tmp_path)
    with pytest.warns(UserWarning, match="repeat an example"):
        positions = store.scored_rows(QUERY)
    assert store.metadata()["example_id"][positions].tolist() == [6, 8, 5]


def test_rows_of_checkpoints_add_up_over_checkpoints():
    parts = [measured([1, 2, 3], f, fingerprint=f, lr=0.1, step=f) for f in (4, 5)]
    found = self_influence(SketchedGradients.cat(parts))
    torch.testing.assert_close(found.scores, sum(0.1 * part.sketches.square().sum(1) for part in parts))


def test_equal_rows_of_a_table_have_equal_numbers():
    table = torch.randint(0, 3, (4, 200), generator=torch.Generator().manual_seed(0)) * (1 << 61)
    true = torch.unique(table, dim=1, return_inverse=True)[1]
    found = equal_rows(*table)
    assert len(found.unique()) == len(true.unique())
    assert ((found[:, None] == found) == (true[:, None] == true)).all()
