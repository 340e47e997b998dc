"""What is printed about a measurement is true at the first one, with layers, and where outliers cannot be counted."""

import re

import pytest
import torch
from models import fit

from lightning_sketch import SpectrumMonitor
from lightning_sketch.callbacks.spectrum_monitor import Measurement
from lightning_sketch.callbacks.spectrum_monitor._console import Console
from lightning_sketch.callbacks.spectrum_monitor._measurement import LayerCurvature
from lightning_sketch.callbacks.spectrum_monitor._scalars import Keys


def measured(values=(8.0, 1.0), **fields):
    layer = LayerCurvature(1.0, 0.0, True, 1.0, 0.1, 13)
    known = {
        "tol": 0.01,
        "linearity_defect": 0.0,
        "num_products": 40,
        "epoch": 1,
        "step": 7,
        "loss": 0.5,
        "seconds": 3.0,
    }
    values = torch.tensor(values, dtype=torch.float64)
    return Measurement(values, fields.pop("residuals", 0 * values), **{**known, "layers": {"a": layer}, **fields})


def test_the_cost_of_the_first_measurement_is_that_since_training_started():
    console = Console("hessian", "every_n_epochs", 2, 3)
    line = console.cost(measured(), 0.5)
    assert line.startswith("53 products (13 of them of single layers), 3.0 s, after 0.5 s of training; every_n_epochs=")
    console.resume()
    line = console.cost(measured(), 6.0)
    assert line.endswith("3.0 s, 50% of the time since the last; every_n_epochs=10 would make it 10% of the time")
    assert console.cost(measured(), 300.0).endswith("3.0 s, 1% of the time since the last")
    assert "3.0 s, 20 times as long as the training since the last; " in console.cost(measured(), 0.15)
    assert console.cost(measured(stage="validate"), 6.0).endswith("3.0 s")


def test_a_fit_prints_the_products_of_layers_and_no_share_of_what_was_not(tmp_path, caplog):
    watch = SpectrumMonitor(num_matvecs=8, dim=48, num_batches=1, top_k=2, bottom_k=1, per_layer=["net.0.*", "net.5.*"])
    with caplog.at_level("INFO"):
        fit(tmp_path, watch)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("hessian: ") and "products" in r.msg]
    for line, m in zip(lines, watch.history, strict=True):
        total = m.num_products + sum(layer.num_products for layer in m.layers.values())
        assert line.startswith(f"hessian: {total} products")
    assert re.search(r" s, after \d+\.\d s of training", lines[0])
    assert "since the last" in lines[1]


@pytest.mark.parametrize(
    ("values", "residuals", "count", "exact", "said"),
    [
        ((9.0, 5.0, 0.5), (0.0, 0.0, 0.0), 2, 1, None),
        ((9.0, 8.0, 7.0), (0.0, 0.0, 0.0), 3, 0, r"all 3 eigenvalues that converged are outliers .* raise top_k\."),
        (
            (9.0, 8.0, 7.0),
            (0.0, 5.0, 5.0),
            1,
            0,
            r"the only eigenvalue that converged is an outlier .* raise num_matvecs\.",
        ),
        ((9.0, 8.0, 7.0), (5.0, 5.0, 5.0), 0, 0, r"no eigenvalue has converged; raise num_matvecs\."),
    ],
)
def test_the_number_of_outliers_is_a_bound_that_says_so(values, residuals, count, exact, said):
    m = measured(values, residuals=torch.tensor(residuals, dtype=torch.float64))
    logged = Keys("hessian", 3, 0).values(m)
    assert (logged["hessian/num_outliers"], logged["hessian/num_outliers_exact"]) == (count, exact)
    if said:
        assert re.search(said, Console("hessian", "every_n_epochs", 1, 3).outliers(m))


def test_a_bound_of_outliers_is_explained_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(
            tmp_path, SpectrumMonitor(num_matvecs=4, dim=48, num_batches=1, top_k=1, bottom_k=0, tol=1e-9), max_epochs=3
        )
    assert caplog.text.count("num_outliers is a lower bound") == 1
