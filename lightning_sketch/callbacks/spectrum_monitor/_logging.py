"""Functions that send measurements to the Trainer's loggers, and that draw figures of a history.

Loggers are recognized by class name, so that none is imported and those of both namespaces work.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_sketch import plots
from lightning_sketch._lightning import Trainer
from lightning_sketch._private import required
from lightning_sketch.callbacks.spectrum_monitor._estimator import SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement
from lightning_sketch.callbacks.spectrum_monitor._scalars import EDGES, Histogram, Keys
from lightning_sketch.curvature import save_spectrum
from lightning_sketch.linalg.quadrature import Quadrature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HAS_MATPLOTLIB = RequirementCache("matplotlib")


def declare(trainer: Trainer, keys: Keys, estimator: SpectrumEstimator) -> None:
    """Tell W&B the step and the summary of each metric, and the arguments of the monitor, before it logs.

    Args:
        trainer: The Trainer whose loggers are told, on rank zero.
        keys: The log keys.
        estimator: The arguments of the monitor, which become a part of the run's configuration.
    """
    loggers: Sequence[Any] = trainer.loggers if trainer.is_global_zero else ()
    for logger in loggers:
        if not _is(logger, "WandbLogger"):
            continue
        run, synced = logger.experiment, required(logger, "_wandb_init").get("sync_tensorboard")
        step = "global_step" if synced else "trainer/global_step"
        for key in keys.all_nan():
            scalar = keys.scalars.get(key)
            summary = {"summary": scalar.summary} if scalar and scalar.summary else {}
            hidden = bool(scalar and scalar.details)
            run.define_metric(_prefixed(logger, key), step_metric=step, step_sync=True, hidden=hidden, **summary)
        plain = {k: v for k, v in vars(estimator).items() if isinstance(v, str | int | float | list)}
        run.config.update({f"{keys.name}_monitor": plain}, allow_val_change=True)


def tell_callbacks(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Set the values that other callbacks can monitor."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})


def log_figures(
    loggers: Sequence[Any], name: str, measurement: Measurement, density: bool, on_error: Literal["warn", "raise"]
) -> None:
    """Log a histogram and a figure to W&B, a histogram to TensorBoard, and safetensors files beside a CSV file.

    A file of the same step is replaced, as when a fit resumes from an earlier step; not by an evaluation.

    Args:
        loggers: The Trainer's loggers.
        name: The prefix of the keys, and the name of the folder.
        measurement: What is logged.
        density: Whether the measurement has a density.
        on_error: Whether a failure is a warning or is raised.
    """
    for logger in loggers:
        try:
            if _is(logger, "WandbLogger"):
                _to_wandb(logger, name, measurement, density)
            elif _is(logger, "TensorBoardLogger") and density:
                _to_tensorboard(logger, name, measurement)
            elif _is(logger, "CSVLogger"):
                save_spectrum(measurement, _file_path(Path(logger.log_dir) / f"{name}_spectra", measurement))
        except Exception as error:  # a full disk, or a logger of another version
            if on_error == "raise":
                raise
            kind = type(logger).__name__
            warnings.warn(f"{name}: no pictures or files of {kind} at step {measurement.step}: {error}", stacklevel=3)


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
    columns: list[str | int] = ["epoch", "step", "kind", "value", "residual", "converged", "weight"]
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            import wandb

            # in the history it would be a metric for each of its numbers of rows and columns
            table = wandb.Table(columns=columns, data=rows)
            logger.experiment.summary[_prefixed(logger, f"{name}/ritz_values")] = table


def _to_wandb(logger: Any, name: str, measurement: Measurement, density: bool) -> None:
    """Log the histogram and the figure of a measurement to W&B."""
    import wandb

    shown: dict[str, Any] = {}
    for key, quadrature in _densities(name, measurement, density):
        shares = Histogram.of(quadrature).shares
        shown[_prefixed(logger, key)] = wandb.Histogram(np_histogram=(shares.numpy(), EDGES.numpy()))
    if measurement.batch_lambda_max is not None:
        tops = measurement.batch_lambda_max[measurement.batch_lambda_max.isfinite()]
        shown[_prefixed(logger, f"{name}/lambda_max_of_batches")] = wandb.Histogram(tops.tolist())
    if _HAS_MATPLOTLIB:
        shown[_prefixed(logger, f"{name}/spectrum")] = wandb.Image(measurement.plot(name))
    if measurement.verdict:
        logger.experiment.summary[_prefixed(logger, f"{name}/verdict")] = measurement.verdict
    if shown:  # not step=, which W&B counts itself; Lightning logs its step as this metric
        logger.experiment.log({**shown, "trainer/global_step": measurement.step})


def _to_tensorboard(logger: Any, name: str, measurement: Measurement) -> None:
    """Log the histograms of a measurement to TensorBoard."""
    for key, quadrature in _densities(name, measurement, density=True):
        nodes, weights = quadrature
        logger.experiment.add_histogram_raw(
            _prefixed(logger, key),
            min=float(nodes.min()),
            max=float(nodes.max()),
            num=1.0,
            sum=float(weights @ nodes),
            sum_squares=float(weights @ nodes**2),
            bucket_limits=EDGES[1:].tolist(),
            bucket_counts=Histogram.of(quadrature).shares.tolist(),
            global_step=measurement.step,
        )


def _densities(name: str, measurement: Measurement, density: bool) -> Iterator[tuple[str, Quadrature]]:
    """Yield the key and the density of the whole spectrum, and of each layer's, if they were estimated."""
    if density and measurement.quadrature is not None:
        yield f"{name}/density", measurement.quadrature
    for layer, curvature in measurement.layers.items():
        if curvature.quadrature is not None:
            yield f"{name}_layers/{layer}/density", curvature.quadrature


def _file_path(folder: Path, measurement: Measurement) -> Path:
    """Return the path of a measurement's file; of an evaluation, one that is not taken."""
    stem = f"epoch={measurement.epoch}-step={measurement.step}"
    path, version = folder / f"{stem}.safetensors", 0
    while measurement.stage != "fit" and path.exists():
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
        epochs=[m.epoch for m in history],
        values=[m.eigenvalues.tolist() for m in history],
        errors=[m.residuals.tolist() for m in history],
        converged=[m.converged.tolist() for m in history],
        top_k=estimator.top_k,
        bottom_k=estimator.bottom_k,
        title=f"Eigenvalues during training ({name})",
        stable_below=[m.stable_below for m in history],
        density=density,
        unit=history[-1].unit,
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
        title=f"{name} by layer, epoch {measurement.epoch}, step {measurement.step}",
        unit=measurement.unit,
    )
