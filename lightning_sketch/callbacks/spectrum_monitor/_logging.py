"""Functions that send measurements to the Trainer's loggers, and that draw figures of a history.

Loggers are recognized by class name, so that none is imported and those of both namespaces work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.imports import RequirementCache

from lightning_sketch import plots
from lightning_sketch.callbacks.spectrum_monitor._estimator import SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._measurement import EDGES, Histogram, Measurement
from lightning_sketch.curvature import save_spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HAS_MATPLOTLIB = RequirementCache("matplotlib")


def log_figures(
    loggers: Sequence[Any], name: str, measurement: Measurement, step: int, density: bool, unique: bool
) -> None:
    """Log a histogram and a figure to W&B, a histogram to TensorBoard, and safetensors files beside a CSV file.

    Args:
        loggers: The Trainer's loggers.
        name: The prefix of the keys, and the name of the folder.
        measurement: What is logged.
        step: The step at which it is logged.
        density: Whether the measurement has a density.
        unique: True to keep an existing file of the same step and write under a new name; False to overwrite it, as
            when a fit resumes from an earlier step.
    """
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            _to_wandb(logger, name, measurement, step, density)
        elif _is(logger, "TensorBoardLogger") and density:
            _to_tensorboard(logger, name, measurement, step)
        elif _is(logger, "CSVLogger"):
            save_spectrum(measurement, _file_path(Path(logger.log_dir) / f"{name}_spectra", measurement, unique))


def log_table(loggers: Sequence[Any], name: str, history: Sequence[Measurement]) -> None:
    """Log a table to W&B of all Ritz values with their residuals, and of the density's nodes with their weights."""
    rows = []
    for m in history:
        for value, residual, converged in zip(
            m.eigenvalues.tolist(), m.residuals.tolist(), m.converged.tolist(), strict=True
        ):
            rows.append([m.epoch, m.step, "Ritz value", value, residual, converged, None])
        if m.quadrature is not None:
            for node, weight in zip(*(part.tolist() for part in m.quadrature), strict=True):
                rows.append([m.epoch, m.step, "density node", node, None, None, weight])
    columns = ["epoch", "step", "kind", "value", "residual", "converged", "weight"]
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            logger.log_table(f"{name}/ritz_values", columns=columns, data=rows)


def _to_wandb(logger: Any, name: str, measurement: Measurement, step: int, density: bool) -> None:
    """Log the histogram and the figure of a measurement to W&B."""
    import wandb

    shown: dict[str, Any] = {}
    if density and measurement.quadrature is not None:
        shares = Histogram.of(measurement.quadrature).shares
        shown[_prefixed(logger, f"{name}/density")] = wandb.Histogram(np_histogram=(shares.numpy(), EDGES.numpy()))
    if _HAS_MATPLOTLIB:
        shown[_prefixed(logger, f"{name}/spectrum")] = wandb.Image(measurement.plot())
    if shown:  # not step=, which W&B counts itself; Lightning logs its step as this metric
        logger.experiment.log({**shown, "trainer/global_step": step})


def _to_tensorboard(logger: Any, name: str, measurement: Measurement, step: int) -> None:
    """Log the histogram of a measurement to TensorBoard."""
    if measurement.quadrature is None:
        return
    nodes, weights = measurement.quadrature
    logger.experiment.add_histogram_raw(
        _prefixed(logger, f"{name}/density"),
        min=float(nodes.min()),
        max=float(nodes.max()),
        num=1.0,
        sum=float(weights @ nodes),
        sum_squares=float(weights @ nodes**2),
        bucket_limits=EDGES[1:].tolist(),
        bucket_counts=Histogram.of(measurement.quadrature).shares.tolist(),
        global_step=step,
    )


def _file_path(folder: Path, measurement: Measurement, unique: bool) -> Path:
    """Return the path of a measurement's file; if `unique`, a name that is not taken."""
    stem = f"epoch={measurement.epoch}-step={measurement.step}"
    path, version = folder / f"{stem}.safetensors", 0
    while unique and path.exists():
        version += 1
        path = folder / f"{stem}-v{version}.safetensors"
    return path


def _prefixed(logger: Any, key: str) -> str:
    """Return the key with the prefix that the logger gives its scalars."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{key}" if prefix else key


def _is(logger: Any, name: str) -> bool:
    """Return whether a logger is of the class of this name, or of a subclass."""
    return any(kind.__name__ == name for kind in type(logger).__mro__)


def over_time(history: Sequence[Measurement], estimator: SpectrumEstimator, name: str) -> "Figure":
    """Draw the largest and smallest eigenvalues of each measurement, the edge of stability, and the density, if any."""
    density = None
    if estimator.density_probes:
        quadratures = [m.quadrature for m in history if m.quadrature is not None]
        density = [(q.nodes.tolist(), q.weights.tolist()) for q in quadratures]
    return plots.spectrum_over_time(
        time=[m.step for m in history],
        values=[m.eigenvalues.tolist() for m in history],
        errors=[m.residuals.tolist() for m in history],
        converged=[m.converged.tolist() for m in history],
        top_k=estimator.top_k,
        bottom_k=estimator.bottom_k,
        title=f"{name}: eigenvalues while training",
        stable_below=[m.stable_below for m in history],
        density=density,
    )


def by_layer(measurement: Measurement, name: str) -> "Figure":
    """Draw the top eigenvalue and the trace of each layer's own block."""
    layers = measurement.layers.values()
    return plots.layers(
        names=list(measurement.layers),
        top=[layer.lambda_max for layer in layers],
        top_errors=[layer.residual for layer in layers],
        converged=[layer.converged for layer in layers],
        traces=[layer.trace for layer in layers],
        trace_errors=[layer.trace_sem for layer in layers],
        title=f"{name} by layer, step {measurement.step}",
    )
