"""A spectrum measured during training, with what is logged of it and what a checkpoint stores."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.callbacks._optimizers import Stability
from lightning_sketch.curvature import Spectrum
from lightning_sketch.curvature.serialization import from_plain, to_plain
from lightning_sketch.linalg.quadrature import Quadrature

_MAX_RNEG_ERROR = 0.02  # above it `rneg` is logged as NaN
_SCALARS = (
    "lambda_max",
    "lambda_min",
    "rneg",
    "rneg_error",
    "num_outliers",
    "loss",
    "seconds",
    "trace",
    "trace_sem",
    "gradient_in_top_k",
    "gradient_in_outliers",
    "gradient_chance",
    "overlap",
    "sharpness_lr",
)
_DENSITY_SCALARS = ("negative_mass", "effective_rank", "density_overflow")

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


@dataclass(frozen=True)
class LayerCurvature:
    """Curvature of one layer: the diagonal block of the matrix for its parameters.

    Attributes:
        lambda_max: The largest eigenvalue of the block, in loss per squared parameter.
        residual: The bound on its error: some eigenvalue of the block lies within this distance.
        converged: Whether the residual is within the tolerance.
        trace: The trace of the block.
        trace_sem: The standard error of the trace.
        num_products: The number of products that were taken.
    """

    lambda_max: float
    residual: float
    converged: bool
    trace: float
    trace_sem: float
    num_products: int

    def scalars(self) -> dict[str, float]:
        """Return the numbers to be logged; NaN for an eigenvalue that has not converged."""
        return {"lambda_max": self.lambda_max if self.converged else math.nan, "trace": self.trace}


@dataclass(frozen=True)
class Keys:
    """The log keys of a monitor, the same for every measurement.

    Attributes:
        name: The prefix of the keys.
        top_k: The number of largest eigenvalues that are logged.
        bottom_k: The number of smallest eigenvalues that are logged.
        density: Whether the scalars of the density are logged too.
    """

    name: str
    top_k: int
    bottom_k: int
    density: bool = False

    def all_nan(self) -> dict[str, float]:
        """Return every key with the value NaN."""
        ranks = [f"top_{i + 1:02d}" for i in range(self.top_k)] + [f"bottom_{i + 1:02d}" for i in range(self.bottom_k)]
        keys = [f"{self.name}/{key}" for key in (*_SCALARS, *(_DENSITY_SCALARS if self.density else ()))]
        return dict.fromkeys(keys + [f"{self.name}_eigenvalues/{rank}" for rank in ranks], math.nan)


@dataclass(frozen=True, eq=False)
class Measurement(Spectrum):
    """A spectrum measured during training.

    Attributes:
        epoch: The epoch in which it was measured, from 0.
        step: The number of optimizer steps before it.
        loss: The mean loss over the probe batches, in evaluation mode.
        seconds: The time that the measurement took, layers included.
        lr: The learning rate of the optimizer, NaN if parameters have different ones.
        stable_below: The edge of stability, in loss per squared parameter: SGD with momentum β diverges along
            eigenvectors with eigenvalues above 2 (1 + β) / lr. NaN for other optimizers.
        overlap_with_last: The mean squared cosine between the top_k eigenvectors now and at the last measurement, from
            0 to 1; NaN at the first.
        layers: The curvature of each layer's own block, by name; empty unless `per_layer` is set.

    The attributes of `Spectrum` (eigenvalues, residuals, trace, ...) are there too.
    """

    _: KW_ONLY
    epoch: int
    step: int
    loss: float
    seconds: float
    lr: float = math.nan
    stable_below: float = math.nan
    overlap_with_last: float = math.nan
    layers: dict[str, LayerCurvature] = field(default_factory=dict)

    def __repr__(self) -> str:
        when = f"epoch {self.epoch}, step {self.step}, loss {self.loss:.4g}, {self.seconds:.1f} s"
        return f"Measurement: {when}; {self._described()}"

    def state(self) -> dict[str, Any]:
        """Return tensors and plain numbers for a checkpoint, with eigenvectors only if they are sketched."""
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        return to_plain(self) | {"layers": layers} | ({"vectors": None} if self.sketch is None else {})

    @staticmethod
    def of_state(state: dict[str, Any]) -> "Measurement":
        """Restore a measurement from what `state` returned."""
        layers = {name: LayerCurvature(**layer) for name, layer in state["layers"].items()}
        restored = from_plain(state | {"layers": layers}, Measurement)
        assert isinstance(restored, Measurement)
        return restored

    def after(self, earlier: Sequence["Measurement"], now: Stability, k: int) -> "Measurement":
        """Return a copy with the stability, and the overlap of the top k eigenvectors with the last earlier ones."""
        overlap, last = math.nan, earlier[-1] if earlier else self
        if (
            earlier
            and last.vectors is not None
            and (last.n, last.sketch, last.method) == (self.n, self.sketch, self.method)
        ):
            overlap = float(self.overlap(last, k))
        return replace(self, lr=now.lr, stable_below=now.below, overlap_with_last=overlap)

    def for_history(self, k: int) -> "Measurement":
        """Return a copy without Krylov vectors and with only k sketched eigenvectors, as a history stores it."""
        vectors = None if self.vectors is None or not k else self.vectors[:, :k].float()
        return replace(self, krylov=None, coefficients=None, vectors=vectors)

    def scalars(self, keys: Keys) -> dict[str, float]:
        """Return the numbers to be logged; NaN if an eigenvalue has not converged or an error is too large."""
        converged = self.eigenvalues.where(self.converged, math.nan)
        outliers, in_top = self.num_outliers(), self.gradient_in_top(keys.top_k)
        found = {
            "lambda_max": float(converged[0]),
            "lambda_min": float(converged[-1]),
            "rneg": self.rneg if self.rneg_error <= _MAX_RNEG_ERROR else math.nan,
            "rneg_error": self.rneg_error,
            "num_outliers": math.nan if outliers.at_least else float(outliers),
            "loss": self.loss,
            "seconds": self.seconds,
            "trace": self.trace,
            "trace_sem": self.trace_sem,
            "gradient_in_top_k": float(in_top),
            "gradient_in_outliers": float(self.gradient_in_outliers),
            "gradient_chance": in_top.chance,
            "overlap": float(self.overlap_with_last),
            "sharpness_lr": float(converged[0]) * self.lr,
        }
        if keys.density and self.quadrature is not None:
            found |= {
                "negative_mass": self.negative_mass,
                "effective_rank": self.effective_rank,
                "density_overflow": Histogram.of(self.quadrature).overflow,
            }
        ranks = {f"top_{i + 1:02d}": float(v) for i, v in enumerate(converged[: keys.top_k])}
        ranks |= {f"bottom_{i + 1:02d}": float(v) for i, v in enumerate(converged.flip(0)[: keys.bottom_k])}
        scalars = keys.all_nan() | {f"{keys.name}/{key}": value for key, value in found.items()}
        scalars |= {f"{keys.name}_eigenvalues/{key}": value for key, value in ranks.items()}
        for layer, curvature in self.layers.items():
            for key, value in curvature.scalars().items():
                scalars[f"{keys.name}_layers/{layer}/{key}"] = value
        return scalars

    def cost(self, name: str, since: float, cadence: str, every: int) -> str:
        """Describe the cost of the measurement in one line, and how to reduce it if it was over 10 %.

        Args:
            name: The name of the monitor.
            since: Seconds between the end of the last measurement and the start of this one; inf if unknown.
            cadence: The argument of the monitor that sets how often it measures.
            every: The value of that argument.
        """
        line = f"{name}: {self.num_products} products, {self.seconds:.1f} s"
        if self.step == 0 or since == math.inf:
            return line
        share = self.seconds / since
        line += f", {share:.0%} of the time since the last"
        factor = math.ceil(10 * share)
        return line if share <= 0.1 else f"{line}; {cadence}={factor * every} would make it {share / factor:.0%}"
