"""What each logger shows of a measurement, read back from disk."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from marks import slow
from models import Digits, fit
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sketch import SpectrumMonitor
from lightning_sketch.callbacks.spectrum_monitor._scalars import EDGES, SCALARS, Histogram
from lightning_sketch.curvature import load_spectrum
from lightning_sketch.linalg.quadrature import Quadrature


def monitor(**arguments):
    few = {"num_matvecs": 16, "dim": 96, "num_batches": 2, "top_k": 3, "bottom_k": 1, "density_probes": 1}
    return SpectrumMonitor(**{**few, **arguments})


def records(folder):
    """Return the records of an offline W&B run."""
    (run,) = folder.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(inspect, check=True, capture_output=True, text=True, timeout=3600).stdout.splitlines()
    return [json.loads(line) for line in lines]


def of_type(found, kind):
    """Return what the records of one type contain."""
    return [record[kind] for record in found if record.get("type") == kind]


def on_disk(folder):
    """Return the history of an offline W&B run, row by row."""
    return [row["item"] for row in of_type(records(folder), "history")]


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch):
    """W&B gets a histogram and a figure at the step of each measurement, a table at the end, and nothing constant."""
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
def test_what_wandb_shows_without_a_set_up(tmp_path, monkeypatch):
    """Its section has the main curves, over the Trainer's step, and the others hidden; its table of runs extremes."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    watch = monitor(density_probes=0)
    fit(tmp_path, watch, logger=logger)
    logger.experiment.finish()
    found = records(tmp_path)
    charts = {
        key
        for row in of_type(found, "history")
        for key, value in row["item"].items()
        if key.startswith("hessian/") and isinstance(value, int | float | str) and "spectrum." not in key
    }
    declared = {metric["name"]: metric for metric in of_type(found, "metric") if "name" in metric}
    charts = {key for key in charts if not declared[key]["options"].get("hidden")}
    assert charts == {f"hessian/{name}" for name, scalar in SCALARS.items() if not (scalar.details or scalar.needs)}
    assert charts >= {"hessian/lambda_max", "hessian/rneg", "hessian/num_outliers"}
    assert len(charts) <= 12  # of one screen
    assert not any("ritz_values" in key for row in of_type(found, "history") for key in row["item"])
    for key in watch._keys.all_nan():
        assert declared[key]["step_metric"] == "trainer/global_step"
    summary = {}
    for update in of_type(found, "summary"):
        summary |= update["update"]
    values = [m.lambda_max for m in watch.history if m.converged[0]]
    assert summary["hessian/lambda_max"]["max"] == pytest.approx(max(values))
    assert summary["hessian/ritz_values"]["_type"] == "table-file"
    assert summary["hessian/verdict"] == watch.history[-1].verdict
    (settings,) = [c["update"]["hessian_monitor"] for c in of_type(found, "config") if "hessian_monitor" in c["update"]]
    assert (settings["top_k"], settings["curvature"]) == (3, "hessian")


class TwoOptimizers(Digits):
    """Two optimizer steps for each batch, which Lightning logs as one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[k].parameters(), lr=0.01) for k in (0, 5)]

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("train_loss", loss, on_step=True, on_epoch=True)

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("arguments", "model", "options", "steps"),
    [
        ({"at_start": True}, Digits, {}, [0, 8, 16]),
        slow({"every_n_train_steps": 3}, Digits, {}, [3, 6, 9, 12, 15]),
        slow({"every_n_train_steps": 2}, Digits, {"accumulate_grad_batches": 2}, [2, 4, 6, 8]),
        slow({"loss_fn": lambda module, batch: module.loss(batch)}, TwoOptimizers, {}, [8, 16]),
    ],
)
def test_a_step_is_the_same_number_everywhere(tmp_path, arguments, model, options, steps):
    """The number of optimizer steps done: in the history, CSV, TensorBoard, names of files, and the plot."""
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    few = {"num_matvecs": 5, "density_probes": 0, "top_k": 1, "num_batches": 1}
    watch = monitor(**few, **arguments)
    fit(tmp_path, watch, model=model, logger=loggers, log_every_n_steps=1, **options)
    assert [m.step for m in watch.history] == steps
    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["hessian/seconds"]]
    assert [int(row["step"]) for row in ours] == steps
    assert [int(row["epoch"]) for row in ours] == [m.epoch for m in watch.history]
    # a loss of Lightning is that of the batch before the step that is done then
    batches = [int(row["step"]) + 1 for row in rows if row["train_loss_step"]]
    assert set(steps) - {0} <= set(batches)
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert [event.step for event in events.Scalars("hessian/seconds")] == steps
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert names == {f"epoch={m.epoch}-step={m.step}.safetensors" for m in watch.history}
    assert watch.plot().axes[0].lines[0].get_xdata().tolist() == steps


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
    assert {"hessian/lambda_max", "hessian/density_overflow"} <= set().union(*logger.rows)


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
