"""A spectrum with the moment it was taken: what a monitor logs and says, and what a checkpoint keeps of it."""

import math
from dataclasses import dataclass, fields
from typing import Any

from lightning_sketch.curvature import Spectrum

_RNEG_KNOWN = 0.02
_FEW = ("lambda_max", "lambda_min", "rneg", "rneg_error", "num_outliers", "loss", "seconds")


def nothing_known(name: str, top_k: int, bottom_k: int) -> dict[str, float]:
    """Every key that a monitor logs, with NaN."""
    ranks = [f"top_{i + 1:02d}" for i in range(top_k)] + [f"bottom_{i + 1:02d}" for i in range(bottom_k)]
    keys = [f"{name}/{key}" for key in _FEW] + [f"{name}_eigenvalues/{rank}" for rank in ranks]
    return dict.fromkeys(keys, math.nan)


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
        scalars = nothing_known(name, top_k, bottom_k)
        scalars |= {f"{name}/{key}": value for key, value in few.items()}
        return scalars | {f"{name}_eigenvalues/{key}": value for key, value in ranks.items()}

    def cost(self, name: str, since: float, cadence: str, every: int) -> str:
        """One line for a person: what it cost, beside the seconds `since` the last, and how to make it cost less."""
        line = f"{name}: {self.num_products} products, {self.seconds:.1f} s"
        if self.step == 0:
            return line
        share = self.seconds / since
        line += f", {share:.0%} of the time since the last"
        rarer = math.ceil(10 * share)
        return line if share <= 0.1 else f"{line}; {cadence}={rarer * every} would make it {share / rarer:.0%}"

    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers, as a checkpoint may hold them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
