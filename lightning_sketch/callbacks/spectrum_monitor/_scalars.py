"""The numbers that are logged of a measurement, under which keys."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks.spectrum_monitor._estimator import SpectrumEstimator, _layer_groups
from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement
from lightning_sketch.curvature import CriticalLearningRate
from lightning_sketch.linalg.quadrature import Quadrature

_MAX_RNEG_ERROR = 0.02  # above it `rneg` is logged as NaN

# The edges of the histogram's bins: -10⁴ ... -10⁻⁶, 10⁻⁶ ... 10⁴, eight to a decade, with one bin around zero.
_SMALLEST, _LARGEST, _PER_DECADE = -6, 4, 8  # powers of ten
_POSITIVE = 10 ** torch.arange(_SMALLEST, _LARGEST + 0.5 / _PER_DECADE, 1 / _PER_DECADE, dtype=torch.float64)
EDGES = torch.cat([-_POSITIVE.flip(0), _POSITIVE])


class Histogram(NamedTuple):
    """Histogram of all eigenvalues, in the bins between `EDGES`.

    Attributes:
        shares: The share of the eigenvalues in each bin, (len(EDGES) - 1,), float64; the two outermost bins include
            what lies beyond the edges.
        overflow: The share of the eigenvalues beyond the edges.
    """

    shares: Float[Tensor, " bins"]
    overflow: float

    @classmethod
    def of(cls, quadrature: Quadrature) -> "Histogram":
        """Count the weights of the nodes in each bin, without smoothing."""
        nodes, weights = quadrature
        inside = nodes.clamp(EDGES[0], EDGES[-1])
        bins = torch.bucketize(inside, EDGES[1:-1])
        shares = torch.zeros(len(EDGES) - 1, dtype=torch.float64).index_add(0, bins, weights)
        return cls(shares, float(weights[inside != nodes].sum()))


class Scalar(NamedTuple):
    """A number that is logged of every measurement.

    Attributes:
        of: (measurement, top_k) -> its value; NaN where it is not known.
        details: Whether W&B draws it only where a person asks for it.
        summary: The aggregates that W&B shows in its table of runs; only the last value if empty.
        needs: What must be measured for it: the density, or the error over batches; nothing if empty.
    """

    of: Callable[[Measurement, int], float]
    details: bool = False
    summary: str = ""
    needs: Literal["", "density", "batches"] = ""


def _converged(measurement: Measurement, rank: int) -> float:
    """Return the eigenvalue of this rank; NaN if it has not converged."""
    return float(measurement.eigenvalues[rank]) if measurement.converged[rank] else math.nan


def _of_last_step(measurement: Measurement, value: Callable[[CriticalLearningRate], float]) -> float:
    """Return what the last step says about the rate; NaN if it was not downhill, and so says nothing."""
    critical = measurement.critical
    return value(critical) if critical is not None and critical.factor != 0 else math.nan


def _sharpness_lr(measurement: Measurement) -> float:
    """Return lambda_max times the learning rate, for SGD, whose edge of stability is a number of it; else NaN."""
    comparable = math.isfinite(measurement.stable_below) and not measurement.preconditioned
    return _converged(measurement, 0) * measurement.lr if comparable else math.nan


SCALARS: dict[str, Scalar] = {
    "lambda_max": Scalar(lambda m, _: _converged(m, 0), summary="last,max"),
    "lambda_min": Scalar(lambda m, _: _converged(m, -1), summary="last,min"),
    "rneg": Scalar(lambda m, _: m.rneg if m.rneg_error <= _MAX_RNEG_ERROR else math.nan, summary="last,max"),
    "num_outliers": Scalar(lambda m, _: m.num_outliers()),
    "stability_ratio": Scalar(lambda m, _: _converged(m, 0) / m.stable_below, summary="last,max"),
    "critical_learning_rate": Scalar(lambda m, _: _of_last_step(m, lambda c: c.learning_rate)),
    "critical_sharpness": Scalar(lambda m, _: _of_last_step(m, lambda c: c.sharpness), summary="last,max"),
    "critical_exact": Scalar(lambda m, _: _of_last_step(m, lambda c: float(not c.at_least)), details=True),
    "sharpness_lr": Scalar(lambda m, _: _sharpness_lr(m), summary="last,max"),
    "trace": Scalar(lambda m, _: m.trace),
    "rneg_error": Scalar(lambda m, _: m.rneg_error, details=True),
    "num_outliers_exact": Scalar(lambda m, _: not m.num_outliers().at_least, details=True),
    "trace_sem": Scalar(lambda m, _: m.trace_sem, details=True),
    "frobenius_norm": Scalar(lambda m, _: m.frobenius_norm, details=True),
    "gradient_in_top_k": Scalar(lambda m, k: m.gradient_in_top(k), details=True),
    "gradient_in_outliers": Scalar(lambda m, _: m.gradient_in_outliers, details=True),
    "overlap": Scalar(lambda m, _: m.overlap_with_last, details=True),
    "loss": Scalar(lambda m, _: m.loss, details=True, summary="last,min"),
    "seconds": Scalar(lambda m, _: m.seconds, details=True, summary="mean"),
    "negative_mass": Scalar(lambda m, _: m.negative_mass, details=True, needs="density"),
    "effective_rank": Scalar(lambda m, _: m.effective_rank, details=True, needs="density"),
    "density_overflow": Scalar(
        lambda m, _: math.nan if m.quadrature is None else Histogram.of(m.quadrature).overflow,
        details=True,
        needs="density",
    ),
    "data_error": Scalar(lambda m, _: m.data_error, needs="batches"),
    "data_bias": Scalar(lambda m, _: m.data_bias, details=True, needs="batches"),
}


@dataclass(frozen=True)
class Keys:
    """The log keys of a monitor, the same for every measurement.

    Attributes:
        name: The prefix of the keys.
        top_k: The number of largest eigenvalues that are logged.
        bottom_k: The number of smallest eigenvalues that are logged.
        density: Whether the scalars of the density are logged too.
        batches: Whether those of the error over batches are.
        layers: The names of the layers whose blocks are measured too.
    """

    name: str
    top_k: int
    bottom_k: int
    density: bool = False
    batches: bool = False
    layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, estimator: SpectrumEstimator, layout: Layout | None = None) -> "Keys":
        """Return the keys of what is estimated; those of layers only if the layout of the parameters is known."""
        layers = tuple(_layer_groups(layout, estimator.per_layer)) if layout else ()
        density = estimator.density_probes > 0
        return cls(name, estimator.top_k, estimator.bottom_k, density, estimator.over_batches, layers)

    @property
    def scalars(self) -> dict[str, Scalar]:
        """The scalars that are logged, by key."""
        return {
            f"{self.name}/{name}": scalar
            for name, scalar in SCALARS.items()
            if {"": True, "density": self.density, "batches": self.batches}[scalar.needs]
        }

    @property
    def _of_layers(self) -> tuple[str, ...]:
        return ("lambda_max", "trace", "negative_mass") if self.density else ("lambda_max", "trace")

    def all_nan(self) -> dict[str, float]:
        """Return every key with the value NaN."""
        ranks = [f"top_{i + 1:02d}" for i in range(self.top_k)] + [f"bottom_{i + 1:02d}" for i in range(self.bottom_k)]
        keys = [*self.scalars, *(f"{self.name}_eigenvalues/{rank}" for rank in ranks)]
        keys += [f"{self.name}_layers/{layer}/{key}" for layer in self.layers for key in self._of_layers]
        return dict.fromkeys(keys, math.nan)

    def values(self, measurement: Measurement) -> dict[str, float]:
        """Return the numbers to be logged; NaN if an eigenvalue has not converged or an error is too large."""
        found = self.all_nan()
        found |= {key: float(scalar.of(measurement, self.top_k)) for key, scalar in self.scalars.items()}
        ritz = measurement.eigenvalues.where(measurement.converged, math.nan)
        for end, values in (("top", ritz[: self.top_k]), ("bottom", ritz.flip(0)[: self.bottom_k])):
            for i, value in enumerate(values.tolist()):
                found[f"{self.name}_eigenvalues/{end}_{i + 1:02d}"] = value
        for layer, curvature in measurement.layers.items():
            for key in self._of_layers:
                known = key != "lambda_max" or curvature.converged
                found[f"{self.name}_layers/{layer}/{key}"] = getattr(curvature, key) if known else math.nan
        return found
