"""A spectrum with the moment it was taken: what a monitor logs and says, and what a checkpoint keeps of it."""

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

_RNEG_KNOWN = 0.02
_FEW = ("lambda_max", "lambda_min", "rneg", "rneg_error", "num_outliers", "loss", "seconds")
_MORE = (
    "trace",
    "trace_sem",
    "gradient_in_top_k",
    "gradient_in_outliers",
    "gradient_chance",
    "overlap",
    "sharpness_lr",
)
_OF_DENSITY = ("negative_mass", "effective_rank", "density_overflow")


_SMALLEST, _LARGEST, _PER_DECADE = -6, 4, 8  # powers of ten

_POSITIVE = 10 ** torch.arange(_SMALLEST, _LARGEST + 0.5 / _PER_DECADE, 1 / _PER_DECADE, dtype=torch.float64)
EDGES = torch.cat([-_POSITIVE.flip(0), _POSITIVE])
"""-10⁴ ... -10⁻⁶, 10⁻⁶ ... 10⁴, eight to a decade; what lies between the two halves is one bin around zero."""


class Histogram(NamedTuple):
    """Shares of all eigenvalues in the bins between EDGES; the outermost two hold what lies beyond as well."""

    shares: Float[Tensor, " bins"]
    overflow: float
    """The share that lies beyond the edges."""

    @classmethod
    def of(cls, quadrature: Quadrature) -> "Histogram":
        """From nodes and weights, without smoothing."""
        nodes, weights = quadrature
        inside = nodes.clamp(EDGES[0], EDGES[-1])
        bins = torch.bucketize(inside, EDGES[1:-1])
        shares = torch.zeros(len(EDGES) - 1, dtype=torch.float64).index_add(0, bins, weights)
        return cls(shares, float(weights[inside != nodes].sum()))


@dataclass(frozen=True)
class LayerCurvature:
    """Of one diagonal block."""

    lambda_max: float
    """Largest eigenvalue of the block."""
    residual: float
    converged: bool
    trace: float
    trace_sem: float
    num_products: int

    def scalars(self) -> dict[str, float]:
        """What goes to the loggers: NaN where the number may not be believed."""
        return {"lambda_max": self.lambda_max if self.converged else math.nan, "trace": self.trace}


@dataclass(frozen=True)
class Keys:
    """What a monitor logs, always the same: a prefix, and how many ranks."""

    name: str
    top_k: int
    bottom_k: int
    density: bool = False

    def nothing_known(self) -> dict[str, float]:
        """Every key, with NaN."""
        ranks = [f"top_{i + 1:02d}" for i in range(self.top_k)] + [f"bottom_{i + 1:02d}" for i in range(self.bottom_k)]
        keys = [f"{self.name}/{key}" for key in (*_FEW, *_MORE, *(_OF_DENSITY if self.density else ()))]
        return dict.fromkeys(keys + [f"{self.name}_eigenvalues/{rank}" for rank in ranks], math.nan)


@dataclass(frozen=True, eq=False)
class Measurement(Spectrum):
    """A spectrum, and when it was taken."""

    _: KW_ONLY
    epoch: int
    step: int
    """Optimizer steps done."""
    loss: float
    """Mean loss over the batches measured on, in evaluation mode."""
    seconds: float
    lr: float = math.nan
    """The optimizer's learning rate, where all parameters have the same."""
    stable_below: float = math.nan
    """Edge of stability: plain SGD with momentum β grows along eigenvectors above 2 (1 + β) / lr."""
    overlap_with_last: float = math.nan
    """Mean squared cosine between the top_k eigenvectors now and at the last measurement."""
    layers: dict[str, LayerCurvature] = field(default_factory=dict)

    def __repr__(self) -> str:
        moment = f"epoch {self.epoch}, step {self.step}, loss {self.loss:.4g}, {self.seconds:.1f} s"
        return f"Measurement: {moment}; {self._described()}"

    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers, as a checkpoint may hold them; no vectors but sketched ones."""
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        return to_plain(self) | {"layers": layers} | ({"vectors": None} if self.sketch is None else {})

    @staticmethod
    def of_state(state: dict[str, Any]) -> "Measurement":
        """The inverse of `state`."""
        layers = {name: LayerCurvature(**layer) for name, layer in state["layers"].items()}
        return from_plain(state | {"layers": layers}, Measurement)

    def after(self, earlier: Sequence["Measurement"], now: Stability, k: int) -> "Measurement":
        """With what the Trainer knows of stability, and the overlap of the k top eigenvectors with the last ones."""
        overlap, last = math.nan, earlier[-1] if earlier else self
        if (
            earlier
            and last.vectors is not None
            and (last.n, last.sketch, last.method) == (self.n, self.sketch, self.method)
        ):
            overlap = float(self.overlap(last, k))
        return replace(self, lr=now.lr, stable_below=now.below, overlap_with_last=overlap)

    def kept(self, k: int) -> "Measurement":
        """Without the Krylov vectors, and with k sketched eigenvectors: what stays in a history."""
        vectors = None if self.vectors is None or not k else self.vectors[:, :k].float()
        return replace(self, krylov=None, coefficients=None, vectors=vectors)

    def scalars(self, keys: Keys) -> dict[str, float]:
        """What goes to the loggers: NaN where the number may not be believed."""
        believed = self.eigenvalues.where(self.converged, math.nan)
        outliers, in_top = self.num_outliers(), self.gradient_in_top(keys.top_k)
        few = {
            "lambda_max": float(believed[0]),
            "lambda_min": float(believed[-1]),
            "rneg": self.rneg if self.rneg_error <= _RNEG_KNOWN else math.nan,
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
            "sharpness_lr": float(believed[0]) * self.lr,
        }
        if keys.density:
            few |= {
                "negative_mass": self.negative_mass,
                "effective_rank": self.effective_rank,
                "density_overflow": Histogram.of(self.quadrature).overflow,
            }
        ranks = {f"top_{i + 1:02d}": float(v) for i, v in enumerate(believed[: keys.top_k])}
        ranks |= {f"bottom_{i + 1:02d}": float(v) for i, v in enumerate(believed.flip(0)[: keys.bottom_k])}
        scalars = keys.nothing_known() | {f"{keys.name}/{key}": value for key, value in few.items()}
        scalars |= {f"{keys.name}_eigenvalues/{key}": value for key, value in ranks.items()}
        for layer, curvature in self.layers.items():
            for key, value in curvature.scalars().items():
                scalars[f"{keys.name}_layers/{layer}/{key}"] = value
        return scalars

    def cost(self, name: str, since: float, cadence: str, every: int) -> str:
        """One line for a person: what it cost, beside the seconds `since` the last, and how to make it cost less."""
        line = f"{name}: {self.num_products} products, {self.seconds:.1f} s"
        if self.step == 0 or since == math.inf:
            return line
        share = self.seconds / since
        line += f", {share:.0%} of the time since the last"
        rarer = math.ceil(10 * share)
        return line if share <= 0.1 else f"{line}; {cadence}={rarer * every} would make it {share / rarer:.0%}"
