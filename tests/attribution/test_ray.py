"""Ray's workers give the answers of one process, from a store and from a Lance dataset."""

import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch
from engines import QUERIES, a_store, examples, put

from lightning_sketch.attribution import ray_scores, ray_top_k, scores, top_k
from lightning_sketch.attribution.scores import scorers
from lightning_sketch.store import LanceRows

README = Path(__file__).parents[2] / "README.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'lightning-sketch[ray]'"
    ),
    pytest.mark.skipif(importlib.util.find_spec("lance") is None, reason="needs pylance"),
    pytest.mark.filterwarnings("ignore"),  # of Ray's own packages
]


@pytest.fixture(scope="module", autouse=True)
def _two_workers():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module", params=["store", "folder", "lance", "uri"])
def sources(request, tmp_path_factory):
    """A store of eight files, and what Ray's workers read."""
    folder = tmp_path_factory.mktemp("rows")
    store = a_store(folder / "store")
    if request.param in ("store", "folder"):
        return store, store if request.param == "store" else folder / "store"
    put(folder / "store", examples(range(400, 450), seed=1))
    store.export("lance", folder / "rows.lance")
    again = put(folder / "store", examples(range(450, 500), seed=2))
    again.export("lance", folder / "rows.lance", append=True)
    return again, LanceRows(folder / "rows.lance") if request.param == "lance" else str(folder / "rows.lance")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "cosine"},
        {"weighted": True},
        {"method": "influence", "curvature": "margin", "damping": [1.0, 9.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [None, "example_id"])
def test_scores(sources, options, group):
    store, source = sources
    torch.testing.assert_close(
        ray_scores(QUERIES, source, group=group, **options), scores(QUERIES, store, group=group, **options)
    )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"method": "influence", "curvature": "fisher", "damping": 1.0}], ids=str
)
def test_top_k(sources, options, largest):
    store, source = sources
    found = ray_top_k(QUERIES, source, 7, largest=largest, **options)
    expected = top_k(QUERIES, store, 7, largest=largest, **options)
    assert torch.equal(found.example_ids, expected.example_ids)
    torch.testing.assert_close(found.scores, expected.scores)
    assert (found.unit, repr(found)) == (expected.unit, repr(expected))
    if expected.reliability is not None:
        torch.testing.assert_close(found.reliability, expected.reliability)


def test_examples_with_several_rows_are_summed(tmp_path):
    """Those of epochs of training, in files of their own."""
    parts = [examples(range(40), seed, stage="fit", step=torch.full((40,), seed)) for seed in range(1, 5)]
    store = put(tmp_path / "store", *parts, stage="fit")
    found, expected = ray_top_k(QUERIES, store, 5), top_k(QUERIES, store, 5)
    assert torch.equal(found.example_ids, expected.example_ids)
    torch.testing.assert_close(found.scores, expected.scores)


def test_errors_are_those_of_one_process(tmp_path):
    store = a_store(tmp_path / "store")
    with pytest.raises(ValueError, match="is not known"):
        ray_scores(QUERIES, store, method="dots")
    with pytest.raises(ValueError, match="k >= 1"):
        ray_top_k(QUERIES, store, 0)
    with pytest.raises(ValueError, match="workers read files"):
        ray_top_k(QUERIES, examples(range(5)))
    with pytest.raises(FileNotFoundError, match="has no Lance dataset"):
        ray_top_k(QUERIES, tmp_path / "nothing")


@pytest.mark.parametrize("files", [1, 40])
def test_what_is_sent_to_a_worker_grows_with_its_rows_alone(tmp_path, files):
    """48 bytes a row: where it is, its id and factors; no sketches, columns, queries, or names of other files."""
    rows = 12_000
    parts = [examples(range(start, start + rows // files)) for start in range(0, rows, rows // files)]
    store = put(tmp_path / "store", *parts)
    store.export("lance", tmp_path / "rows.lance")
    for source in (store, LanceRows(tmp_path / "rows.lance")):
        (scorer,) = scorers(QUERIES, source, "dot", "ggn")
        sent = [(len(part), len(pickle.dumps((part, ids)))) for part, ids in scorer.split(1000)]
        assert sum(count for count, _ in sent) == rows
        assert max(size - 48 * count for count, size in sent) < 8192


def test_the_readme(tmp_path):
    """What it says of more rows than one process reads."""
    (block,) = re.findall(
        r"```python\n(from lightning_sketch.attribution import ray_.*?)```", README.read_text(), re.DOTALL
    )
    store = a_store(tmp_path / "store")
    own = {"store": store, "queries": QUERIES}
    exec(block.replace("s3://bucket", str(tmp_path)).replace("best = ray_", "all_best = ray_"), own)
    assert torch.equal(own["best"].example_ids, top_k(QUERIES, store.where(source="wiki"), k=10).example_ids)
    assert torch.equal(own["all_best"].example_ids, top_k(QUERIES, store, k=10).example_ids)


def test_workers_warn_of_odd_rows(tmp_path):
    rows = examples(range(60))
    rows.sketches[::3] = 0
    store = put(tmp_path / "store", rows)
    with pytest.warns(UserWarning, match="20 of 60 rows that were scored are zero"):
        ray_top_k(QUERIES, store)
