"""The repr of each result fits on a screen and says what the result is."""

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import Diagonal
from models import Digits, fit, loader

from lightning_sketch import (
    GGN,
    BlockSRHT,
    EmpiricalFisher,
    GradientSketchWriter,
    GradientStore,
    Hessian,
    SpectrumMonitor,
    spectrum,
)
from lightning_sketch.attribution import Calibration, Influence, SelfInfluence, SketchedGradients, TopK
from lightning_sketch.attribution.curvature import CurvatureSum
from lightning_sketch.autodiff import Layout
from lightning_sketch.curvature import Spectrum
from lightning_sketch.linalg.eigenvectors import EigenPairs
from lightning_sketch.linalg.krylov import Krylov, SketchedRun
from lightning_sketch.subspace import IntrinsicDimensionResult


class Stream:
    """Batches that are read again and again, and have no length."""

    def __iter__(self):
        yield next(iter(loader()))


class Validated(Digits):
    def validation_step(self, batch, batch_idx):
        pass


def loss(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def search():
    """Return the result of forty runs, of which those from dim 64 on reach the target."""
    dims = [1 << k for k in range(1, 11) for _ in range(4)]
    columns = {"kind": ["fit"] * 40, "dim": dims, "seed": [0, 1, 2, 3] * 10, "scale": [1.0] * 40, "steps": [100] * 40}
    columns |= {"value": [1 - 5 / dim for dim in dims], "status": ["done"] * 40, "checkpoint": [None] * 40}
    return IntrinsicDimensionResult(columns, "val_acc", mode="max", threshold=0.9, n=4096, baseline=1.0, start=0.1)


def deep_layout():
    module = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(12)))
    return Layout.of(module)


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
    operator = Diagonal(torch.arange(1.0, 301.0, dtype=torch.float64))
    measured = spectrum(operator, top_k=13, bottom_k=0, num_matvecs=150, dim=1100, density_probes=12)
    total = CurvatureSum(32)
    total.add(torch.randn(100, 1, 32, generator=torch.Generator().manual_seed(0)))
    curvature = total.curvature("margin")
    batches, tried = [next(iter(loader()))] * 4, tuple(0.1 * 10 ** (i / 4) for i in range(-4, 3))
    return {
        "krylov": measured.krylov,
        "run": measured.krylov.runs[0],
        "pairs": measured.eigenvectors(operator, 13),
        "index": store.rows,
        "spec": store.spec,
        "layout": deep_layout(),
        "search": search(),
        "calibration": Calibration(0.1, 0.1, tried, tuple(i / 70 for i in range(7))),
        "curvature": curvature,
        "influence": Influence(curvature, tried),
        "hessian": Hessian(loss, model, batches),
        "ggn": GGN(model, batches),
        "fisher": EmpiricalFisher(loss, model, Stream()),
        "store": store,
        "rows": rows,
        "queries": queries,
        "top": rows.top_k(queries, 10),
        "self": rows.self_influence(method="dot"),
        "measurement": monitor.history[-1],
        "spectrum": spectrum(s.T @ s, top_k=2, bottom_k=0),
    }


WORDS = {
    "krylov": ["Krylov: 13 runs of ", ", ... products", "vectors kept whole"],
    "run": ["SketchedRun of ", "vectors of 300 numbers"],
    "pairs": ["EigenPairs: 13 eigenvectors of size 300 (float64)", "values 300, 299, 298, 297, 296, ...", "residuals "],
    "index": ["StoredRows: 264 rows in ", " files", "fit 8, validate 256", "loss"],
    "spec": [
        "StoreSpec: bfloat16 by BlockSRHT(",
        "gradient of the example's own loss",
        "Layout of 698 numbers in 6 parameters",
    ],
    "layout": ["parameters: 0.self_attn.in_proj_weight (24, 8), ", ", ..."],
    "search": ["64 of 4,096 reaches val_acc 0.9, ", "by 40 runs", "0.1 at the start, 1 after full training", ", ..., "],
    "calibration": ["damping 0.1 (automatic 0.1)", "LDS: 0.000 at 0.01, "],
    "curvature": ["Curvature: margin of 100 examples, 32 x 32", "trace ", " effective examples"],
    "influence": ["Influence: margin of 100 examples, damping 0.01 to 0.316 (c = "],
    "hessian": ["Hessian of 698 parameters over 4 batches, hvp='auto'"],
    "ggn": ["GGN of 698 parameters over 4 batches"],
    "fisher": ["EmpiricalFisher of 698 parameters over batches"],
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
    assert len(text) <= 1000


def test_empty_results_have_one_too():
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = SketchedGradients(torch.zeros(0, 4), BlockSRHT(9, 4))
    assert repr(rows) == "SketchedGradients: 0 rows of 4 numbers (float32) by BlockSRHT(n=9, dim=4, seed=0)"
    assert repr(Krylov(0, None)) == "Krylov: 0 runs of no products, seed 0, vectors kept whole"
    assert repr(SketchedRun([])) == "SketchedRun of 0 products, 0 vectors of 0 numbers"
    assert repr(Layout((), ())) == "Layout of 0 numbers in 0 parameters: "
    pairs = EigenPairs(torch.zeros(0), torch.zeros(0, 7), torch.zeros(0))
    assert repr(pairs) == "EigenPairs: 0 eigenvectors of size 7 (float32)\n    values \n    residuals "
    assert repr(TopK(torch.zeros(0, 3), nothing.view(0, 3))) == "TopK of 0 queries, k=3: example (score)"
    assert repr(SelfInfluence(torch.zeros(0), nothing)) == "SelfInfluence of 0, largest: "


def test_a_spectrum_explains_its_question_marks_where_it_has_some():
    values = torch.tensor([3.0, 1.0])
    for residual, marked in ((0.0, False), (0.5, True)):
        shown = repr(Spectrum(values, torch.tensor([0.0, residual]), tol=1e-2, linearity_defect=0.0, num_products=2))
        assert ("1?" in shown) is ("? marks what has not converged" in shown) is marked, shown
