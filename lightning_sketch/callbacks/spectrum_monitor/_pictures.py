"""Pictures of measurements."""

from collections.abc import Sequence

from lightning_sketch import plots
from lightning_sketch.callbacks.spectrum_monitor._instrument import Instrument
from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement


def over_time(history: Sequence[Measurement], instrument: Instrument, name: str):
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
