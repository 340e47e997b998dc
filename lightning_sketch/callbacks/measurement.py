"""A spectrum with the moment it was taken: what a monitor logs, and what a checkpoint keeps of it."""

import math
from dataclasses import dataclass, fields
from typing import Any

from lightning_sketch.curvature import Spectrum

_RNEG_KNOWN = 0.02


@dataclass(frozen=True, eq=False)
class Measurement(Spectrum):
    """A spectrum, and when it was taken."""

    epoch: int
    step: int
    """Optimizer steps done."""
    loss: float
    """Mean loss over the batches measured on, in evaluation mode."""
    seconds: float

    def scalars(self, name: str, top_k: int, bottom_k: int) -> dict[str, float]:
        """What goes to the loggers: NaN where the number may not be believed."""
        believed = self.eigenvalues.where(self.converged, math.nan)
        outliers = self.num_outliers()
        few = {
            "lambda_max": float(believed[0]),
            "lambda_min": float(believed[-1]),
            "rneg": self.rneg if self.rneg_error <= _RNEG_KNOWN else math.nan,
            "rneg_error": self.rneg_error,
            "num_outliers": math.nan if outliers.at_least else float(outliers),
            "loss": self.loss,
            "seconds": self.seconds,
        }
        ranks = {f"top_{i + 1:02d}": float(v) for i, v in enumerate(believed[:top_k])}
        ranks |= {f"bottom_{i + 1:02d}": float(v) for i, v in enumerate(believed.flip(0)[:bottom_k])}
        return {f"{name}/{key}": value for key, value in few.items()} | {
            f"{name}_eigenvalues/{key}": value for key, value in ranks.items()
        }

    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers, as a checkpoint may hold them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
