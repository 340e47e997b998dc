"""The repr of each result fits on a screen and says what the result is."""

import pytest
import torch
from models import Digits, fit, loader

from lightning_sketch import BlockSRHT, GradientSketchWriter, GradientStore, SpectrumMonitor, spectrum
from lightning_sketch.attribution import SelfInfluence, SketchedGradients, TopK


class Validated(Digits):
    def validation_step(self, batch, batch_idx):
        pass


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of a fit with both callbacks, and of queries to its store."""
    folder = tmp_path_factory.mktemp("reprs")
    writer, monitor = GradientSketchWriter(folder / "store", dim=32, index_key="hash"), SpectrumMonitor(top_k=3)
    model = fit(folder, writer, monitor, model=Validated, data=loader(batch_size=64))
    model.trainer.validate(model, loader(shuffle=False), verbose=False)
    store = GradientStore.open(writer.dirpath)
    rows = store.where(stage="validate")
    queries = rows.sketch_gradients(model, [next(iter(loader()))])
    s = BlockSRHT(n=64, dim=8)
    return {
        "store": store,
        "rows": rows,
        "queries": queries,
        "top": rows.top_k(queries, 10),
        "self": rows.self_influence(method="dot"),
        "measurement": monitor.history[-1],
        "spectrum": spectrum(s.T @ s, top_k=2, bottom_k=0),
    }


WORDS = {
    "store": ["GradientStore in ", "264 rows of 32 numbers (bfloat16) by BlockSRHT(", "fit 8, validate 256", "example"],
    "rows": ["256 rows", "validate 256"],
    "queries": ["SketchedGradients: 32 rows", "(float32)"],
    "top": ["TopK of 32 queries, k=10", "query 0: ", ", ..."],
    "self": ["SelfInfluence of 256, largest: "],
    "measurement": ["Measurement: epoch ", "Ritz values converged", "trace"],
    "spectrum": ["Spectrum: ", "of an operator of size 64", "largest 8, 8"],
}


@pytest.mark.parametrize("name", WORDS)
def test_it_says_what_it_is_in_ten_lines(results, name):
    text = repr(results[name])
    assert all(word in text for word in WORDS[name]), text
    lines = text.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 200


def test_empty_results_have_one_too():
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = SketchedGradients(torch.zeros(0, 4), BlockSRHT(9, 4))
    assert repr(rows) == "SketchedGradients: 0 rows of 4 numbers (float32) by BlockSRHT(n=9, dim=4, seed=0)"
    assert repr(TopK(torch.zeros(0, 3), nothing.view(0, 3))) == "TopK of 0 queries, k=3: example (score)"
    assert repr(SelfInfluence(torch.zeros(0), nothing)) == "SelfInfluence of 0, largest: "
