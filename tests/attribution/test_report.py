"""A report is one file that shows each query's examples with the scores of `top_k`; a browser finds its way in it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from engines import QUERIES, a_store, examples, put

from lightning_sketch.attribution import top_k
from lightning_sketch.store import SketchedGradients

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
TEXTS = [f"document {i} says <b>&amp;</b> </script><script>alert({i})</script>" for i in range(400)]


def data_of(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found[1])


@pytest.fixture
def store(tmp_path):
    return a_store(tmp_path / "store", "float32")


@pytest.mark.parametrize("normalize", [True, False])
def test_it_has_the_scores_of_top_k(store, tmp_path, normalize):
    """Those that help on one side and those that hurt on the other, by their signs, with text and columns."""
    path = store.report(tmp_path / "a/report.html", QUERIES, train=TEXTS, k=5, normalize=normalize)
    data = data_of(path)
    for largest, side in ((True, "helped"), (False, "hurt")):
        best = top_k(QUERIES, store, 5, largest=largest, normalize=normalize)
        for query, ids, scores in zip(data["queries"], best.example_ids, best.scores, strict=True):
            found = query["answers"][0][side]
            assert [int(id) for id, _ in found] == ids.tolist()
            assert [score for _, score in found] == scores.tolist()
            assert all((score > 0) == largest for _, score in found)
    columns = store.metadata()
    for id, example in data["examples"].items():
        assert example["content"] == TEXTS[int(id)]
        assert example["facts"]["source"] == columns["source"][int(id)]
        assert example["facts"]["prob_true"] == pytest.approx(float(columns["prob_true"][int(id)]))


def test_it_says_how_many_rows_are_compared(tmp_path):
    put(tmp_path / "store", examples(range(5)))
    store = put(tmp_path / "store", examples(range(7), fingerprint=8))
    assert data_of(store.report(tmp_path / "page.html", QUERIES))["about"].startswith("5 of 12 rows, ")
    own = store.where(fingerprint=7)
    assert data_of(own.report(tmp_path / "page.html", QUERIES))["about"].startswith("5 rows, ")


def test_what_is_shown_needs_no_network_and_cannot_leave_its_place(store, tmp_path):
    text = store.report(tmp_path / "report.html", QUERIES, train=TEXTS).read_text()
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", text)
    assert text.count("</script>") == 2


def test_tokens_of_queries_are_as_many_as_their_rows(store, tmp_path):
    columns = {**QUERIES.columns, "example": torch.tensor([0, 0, 0, 1]), "token": torch.tensor([0, 1, 2, 0])}
    queries = type(QUERIES)(QUERIES.sketches, QUERIES.sketch, columns)
    with pytest.raises(ValueError, match=r"query 0 has rows up to token 2, and queries_of\[0\] has 2 tokens"):
        store.report(tmp_path / "report.html", queries, queries_of=[["a", "b"], ["c"]])


def test_what_is_for_the_library_alone_is_not_shown(tmp_path):
    """Neither ids that are unknown, nor the numbers of loaders and runs; a user's own columns are."""
    unknown = torch.full((9, 3), -1)
    store = put(tmp_path / "store", examples(range(9), example_ids=unknown, dataloader=torch.zeros(9).long()))
    data = data_of(store.report(tmp_path / "report.html", QUERIES))
    assert {name for example in data["examples"].values() for name in example["facts"]} == {
        "stage", "prob_true", "weight", "source", "even",
    }  # fmt: skip


def test_images_are_pictures_of_any_layout(store, tmp_path):
    from PIL import Image

    images = [
        torch.rand(8, 8),
        torch.rand(1, 8, 8),
        torch.rand(3, 8, 8),
        np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8),
    ]
    train = {i: (images[i % 4], torch.tensor(i)) for i in range(399)} | {399: Image.new("L", (8, 8))}
    data = data_of(store.report(tmp_path / "report.html", QUERIES, train=train, queries_of=images))
    shown = [example["content"]["image"] for example in data["examples"].values()]
    shown += [query["content"]["image"] for query in data["queries"]]
    assert all(uri.startswith("data:image/png;base64,iVBOR") for uri in shown)


def by_token():
    """Two queries, of three tokens each, of which the first has no row."""
    rows = examples(range(4), seed=99)
    columns = {**rows.columns, "token": [1, 2, 1, 2], "example": [0, 0, 1, 1], "loss": [1.0, 2.0, 3.0, 4.0]}
    return SketchedGradients(rows.sketches, rows.sketch, columns)


def test_queries_by_token_are_texts(store, tmp_path):
    words = [["The ", "largest ", "planet"], ["A ", "small ", "moon"]]
    data = data_of(store.report(tmp_path / "report.html", by_token(), train=TEXTS, queries_of=words, k=3))
    assert [query["tokens"] for query in data["queries"]] == words
    assert [[answer["token"] for answer in query["answers"]] for query in data["queries"]] == [[1, 2], [1, 2]]
    best = top_k(by_token(), store, 3, normalize=True)
    found = [answer["helped"] for query in data["queries"] for answer in query["answers"]]
    assert [[int(id) for id, _ in each] for each in found] == best.example_ids.tolist()


def test_what_does_not_fit_is_refused_and_nothing_is_written(store, tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="queries_of has 3 entries for 4 queries"):
        store.report(path, QUERIES, queries_of=["a", "b", "c"])
    with pytest.raises(KeyError, match="train has no example"):
        store.report(path, QUERIES, train=TEXTS[:2])
    with pytest.raises(ValueError, match="an image has the shape"):
        store.report(path, QUERIES, train=[torch.zeros(5, 8, 8)] * 400)
    assert not path.exists()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("size", [(1200, 800), (390, 844)], ids=["desk", "phone"])
def test_it_is_read_by_clicking(store, tmp_path, size):
    """Choosing a query, a word of it, filtering and sorting; on a phone nothing is wider than the screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    words = [["The ", "largest ", "planet"], ["A ", "small ", "moon"]]
    path = store.report(tmp_path / "report.html", by_token(), train=TEXTS, queries_of=words, k=3)
    best = [f"document {i} " for i in top_k(by_token(), store, 3, normalize=True).example_ids[:, 0]]
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, wrong = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True))), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(path.as_uri())

        def first():
            return page.inner_text(".plus .example .content >> nth=0")

        assert first().startswith(best[0])
        page.click("text=planet >> nth=1")  # the word, beside the list of queries
        assert first().startswith(best[1])
        page.click("nav button >> nth=1")
        assert first().startswith(best[2])
        page.fill("#search", "moon")
        assert page.locator("nav button").count() == 1
        page.fill("#search", "")
        page.select_option("#order", "loss")
        assert page.locator("nav button >> nth=0").inner_text().startswith("A small")  # a mean loss of 3.5
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert not wrong
        browser.close()
