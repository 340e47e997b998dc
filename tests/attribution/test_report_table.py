"""The table of W&B has what the report has: a row for each answer, with texts, pictures and columns."""

import json
from pathlib import Path

import pytest
import torch
from engines import QUERIES, a_store

from lightning_sketch.attribution import report_table, top_k

wandb = pytest.importorskip("wandb")
TEXTS = [f"document {i}" for i in range(400)]


@pytest.fixture
def store(tmp_path):
    return a_store(tmp_path / "store", "float32")


def records(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.data]


def test_it_has_the_scores_of_top_k(store):
    found = records(report_table(QUERIES, store, train=TEXTS, queries_of=["a", "b", "c", "d"], k=3))
    for effect, largest in (("helped", True), ("hurt", False)):
        best = top_k(QUERIES, store, 3, largest=largest, normalize=True)
        for query in range(4):
            own = [row for row in found if row["query"] == query and row["effect"] == effect]
            assert [int(row["example"]) for row in own] == best.example_ids[query].tolist()
            assert [row["score"] for row in own] == best.scores[query].tolist()
            assert [row["rank"] for row in own] == [1, 2, 3]
            assert {row["query text"] for row in own} == {"abcd"[query]}
    source = store.metadata()["source"]
    assert all(row["example text"] == TEXTS[int(row["example"])] for row in found)
    assert all(row["example source"] == source[int(row["example"])] for row in found)


def test_queries_by_token_name_their_token(store):
    columns = {**QUERIES.columns, "example": torch.tensor([0, 0, 0, 1]), "token": torch.tensor([0, 1, 2, 0])}
    queries = type(QUERIES)(QUERIES.sketches, QUERIES.sketch, columns)
    found = records(report_table(queries, store, queries_of=[["the ", "largest ", "planet"], ["Jupiter"]], k=1))
    assert [row["token"] for row in found[::2]] == ["0: the ", "1: largest ", "2: planet", "0: Jupiter"]
    assert {row["query text"] for row in found} == {"the largest planet", "Jupiter"}
    assert "example text" not in found[0]


def test_texts_and_pictures_have_columns_of_their_own(store):
    """A column of W&B is of one kind, and data may be of both."""
    train = [torch.zeros(4, 4) if i % 2 else str(i) for i in range(400)]
    store = store.read()
    store = type(store)(store.sketches, store.sketch, {**store.columns, "image": ["0.png"] * len(store)})
    for row in records(report_table(QUERIES, store, train=train, k=20)):
        image, text = row["example image"], row["example text"]
        odd = int(row["example"]) % 2
        assert text == (None if odd else row["example"])
        assert isinstance(image, wandb.Image if odd else type(None))
        assert row["example column image"] == "0.png"


@pytest.mark.slow
def test_a_run_without_network_holds_it_with_its_pictures(store, tmp_path):
    """What W&B wrote: the table as JSON, and a picture of the right pixels for each example that is shown."""
    from PIL import Image

    images = [torch.full((4, 4), i % 256, dtype=torch.uint8) for i in range(400)]
    found = report_table(QUERIES, store, train=images, k=2)
    artifact = wandb.Artifact("answers", "table")  # as which W&B uploads a table with its pictures
    artifact.add(found, "answers")
    files = {name: entry.local_path for name, entry in artifact.manifest.entries.items()}
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        run.log({"answers": found})
    assert [path.name for path in (tmp_path / "wandb").rglob("*.table.json")]
    table = json.loads(Path(files["answers.table.json"]).read_text())
    place = {name: i for i, name in enumerate(table["columns"])}
    assert len(table["data"]) == 4 * 2 * 2
    for row in table["data"]:
        pixels = Image.open(files[row[place["example image"]]["path"]]).convert("L")
        assert pixels.getpixel((1, 1)) == int(row[place["example"]]) % 256
