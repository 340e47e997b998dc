"""What each logger shows of a measurement, read back from disk."""

import json
import subprocess
import sys

import pytest
import torch
from models import fit
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sketch import SpectrumMonitor
from lightning_sketch.callbacks.spectrum_monitor._scalars import EDGES, Histogram
from lightning_sketch.curvature import load_spectrum
from lightning_sketch.linalg.quadrature import Quadrature


def monitor(**arguments):
    few = {"num_matvecs": 16, "dim": 96, "num_batches": 2, "top_k": 3, "bottom_k": 1, "density_probes": 1}
    return SpectrumMonitor(**{**few, **arguments})


def on_disk(folder):
    """Return the history of an offline W&B run, row by row."""
    (run,) = folder.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(inspect, check=True, capture_output=True, text=True, timeout=3600).stdout.splitlines()
    return [r["history"]["item"] for r in map(json.loads, lines) if r.get("type") == "history"]


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch):
    """W&B gets a histogram and a figure at the step of each measurement, and a table at the end."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    watch = monitor()
    fit(tmp_path, watch, logger=logger)
    logger.experiment.finish()
    rows = on_disk(tmp_path)
    scalars = [row for row in rows if "hessian/lambda_max" in row]
    found = [float(row["hessian/lambda_max"]) for row in scalars]
    assert found == pytest.approx([float(m.eigenvalues.where(m.converged, torch.nan)[0]) for m in watch.history])
    assert [int(row["trainer/global_step"]) for row in scalars] == [8, 16]
    assert "hessian_eigenvalues/top_01" in scalars[0]
    densities = [row for row in rows if any(key.startswith("hessian/density.") for key in row)]
    assert [int(row["trainer/global_step"]) for row in densities] == [8, 16]
    for row, m in zip(densities, watch.history, strict=True):
        assert row["hessian/density._type"] == "histogram"
        assert row["hessian/density.bins"] == pytest.approx(EDGES.tolist())
        assert row["hessian/density.values"] == pytest.approx(Histogram.of(m.quadrature).shares.tolist())
        assert row["hessian/spectrum._type"] == "image-file"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/hessian/spectrum*.png"))) == 2
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/hessian/ritz_values*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["epoch", "step", "kind", "value", "residual", "converged", "weight"]
    values = [row[3] for row in table["data"] if row[1] == 16 and row[2] == "Ritz value"]
    assert values == pytest.approx(watch.history[-1].eigenvalues.tolist())
    assert sum(row[6] for row in table["data"] if row[1] == 8 and row[2] == "density node") == pytest.approx(1)


@pytest.mark.slow
def test_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    watch = monitor()
    fit(tmp_path, watch, logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    found = events.Histograms("hessian/density")
    assert [event.step for event in found] == [8, 16]
    for event, m in zip(found, watch.history, strict=True):
        nodes, weights = m.quadrature
        assert event.histogram_value.sum == pytest.approx(float(nodes @ weights))
        assert sum(event.histogram_value.bucket) == pytest.approx(1)
        assert event.histogram_value.max == pytest.approx(float(nodes.max()))


@pytest.mark.slow
def test_everything_is_saved_beside_a_csv_file(tmp_path):
    """The files include the sketched Krylov vectors, from which eigenvectors can be computed."""
    logger = CSVLogger(tmp_path)
    watch = monitor()
    fit(tmp_path, watch, logger=logger)
    for m in watch.history:
        saved = load_spectrum(f"{logger.log_dir}/hessian_spectra/epoch={m.epoch}-step={m.step}.safetensors")
        assert torch.equal(saved.eigenvalues, m.eigenvalues)
        assert saved.sketch == m.sketch
        assert torch.equal(saved.quadrature.weights, m.quadrature.weights)
        assert saved.vectors.shape == saved.krylov.runs[0].columns[0].shape + m.eigenvalues.shape
        assert m.krylov is None  # in memory the history stays small


@pytest.mark.slow
def test_any_other_logger_gets_the_scalars(tmp_path):
    class Plain(Logger):
        name, version = "plain", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append(metrics)

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    logger = Plain()
    fit(tmp_path, monitor(), logger=logger)
    assert {"hessian/lambda_max", "hessian_details/density_overflow"} <= set().union(*logger.rows)


def test_a_histogram_of_nodes():
    """Weights are counted in the bin of their node: beyond the edges in the outermost, at zero in the middle."""
    nodes = torch.tensor([-1e9, -2.0, 0.0, 1e-9, 3.0, 1e7], dtype=torch.float64)
    shares, overflow = Histogram.of(Quadrature(nodes, torch.tensor([1.0, 2, 3, 4, 5, 6]).double() / 21))
    shares = (shares * 21).round().int()
    assert overflow == pytest.approx(7 / 21)
    assert (shares[0], shares[-1], shares[len(shares) // 2]) == (1, 6, 7)
    for node, share in ((-2.0, 2), (3.0, 5)):
        assert shares[int(torch.searchsorted(EDGES, node)) - 1] == share
    assert len(shares) <= 512  # W&B shows no more
