"""Send a measurement to the Trainer's loggers: scalars to all, more to those that can show it.

Loggers are told apart by the names of their classes, so that none is imported, and both namespaces serve.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.imports import RequirementCache

from lightning_sketch import plots
from lightning_sketch.callbacks.spectrum_monitor._estimator import SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._measurement import EDGES, Histogram, Measurement
from lightning_sketch.curvature import save_spectrum

_HAS_MATPLOTLIB = RequirementCache("matplotlib")


def log_scalars(loggers: Sequence[Any], scalars: Mapping[str, float], step: int) -> None:
    """To every logger."""
    for logger in loggers:
        logger.log_metrics(dict(scalars), step=step)


def log_figures(
    loggers: Sequence[Any], name: str, measurement: Measurement, step: int, density: bool, unique: bool
) -> None:
    """To W&B a histogram and a picture, to TensorBoard a histogram, beside a CSV file everything in safetensors.

    A file of the same step is replaced, as when a fit is resumed from an earlier step; not if `unique`.
    """
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            _to_wandb(logger, name, measurement, step, density)
        elif _is(logger, "TensorBoardLogger") and density:
            _to_tensorboard(logger, name, measurement, step)
        elif _is(logger, "CSVLogger"):
            save_spectrum(measurement, _free(Path(logger.log_dir) / f"{name}_spectra", measurement, unique))


def log_table(loggers: Sequence[Any], name: str, history: Sequence[Measurement]) -> None:
    """To W&B, once: all Ritz values with their residuals, and the density's nodes with their weights."""
    rows = []
    for m in history:
        for value, residual, known in zip(
            m.eigenvalues.tolist(), m.residuals.tolist(), m.converged.tolist(), strict=True
        ):
            rows.append([m.epoch, m.step, "Ritz value", value, residual, known, None])
        if m.quadrature is not None:
            for node, weight in zip(*(part.tolist() for part in m.quadrature), strict=True):
                rows.append([m.epoch, m.step, "density node", node, None, None, weight])
    columns = ["epoch", "step", "kind", "value", "residual", "converged", "weight"]
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            logger.log_table(f"{name}/ritz_values", columns=columns, data=rows)


def _to_wandb(logger: Any, name: str, measurement: Measurement, step: int, density: bool) -> None:
    import wandb

    shown: dict[str, Any] = {}
    if density:
        shares = Histogram.of(measurement.quadrature).shares
        shown[_prefixed(logger, f"{name}/density")] = wandb.Histogram(np_histogram=(shares.tolist(), EDGES.tolist()))
    if _HAS_MATPLOTLIB:
        shown[_prefixed(logger, f"{name}/spectrum")] = wandb.Image(measurement.plot())
    if shown:  # without step=, which is W&B's own count; Lightning's step is a metric of its own there
        logger.experiment.log({**shown, "trainer/global_step": step})


def _to_tensorboard(logger: Any, name: str, measurement: Measurement, step: int) -> None:
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


def _free(folder: Path, measurement: Measurement, unique: bool) -> Path:
    """Where to write; under a new name if nothing may be replaced."""
    stem = f"epoch={measurement.epoch}-step={measurement.step}"
    path, version = folder / f"{stem}.safetensors", 0
    while unique and path.exists():
        version += 1
        path = folder / f"{stem}-v{version}.safetensors"
    return path


def _prefixed(logger: Any, key: str) -> str:
    """The key as the logger itself names its scalars."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{key}" if prefix else key


def _is(logger: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(logger).__mro__)


def over_time(history: Sequence[Measurement], instrument: SpectrumEstimator, name: str):
    """Both ends at each measurement, the edge of stability, and the density if it was asked for."""
    density = [tuple(part.tolist() for part in m.quadrature) for m in history] if instrument.density_probes else None
    return plots.spectrum_over_time(
        time=[m.step for m in history],
        values=[m.eigenvalues.tolist() for m in history],
        errors=[m.residuals.tolist() for m in history],
        converged=[m.converged.tolist() for m in history],
        top_k=instrument.top_k,
        bottom_k=instrument.bottom_k,
        title=f"{name}: eigenvalues while training",
        stable_below=[m.stable_below for m in history],
        density=density,
    )


def by_layer(measurement: Measurement, name: str):
    """The top eigenvalue and the trace of each layer's own block."""
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
