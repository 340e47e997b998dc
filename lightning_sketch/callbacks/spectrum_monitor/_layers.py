"""The curvature of each layer by itself: the diagonal blocks of the matrix."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.curvature import spectrum
from lightning_sketch.operators import LinearOperator

_MATVECS = 32


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


def groups(layout: Layout, per_layer: bool | Sequence[str]) -> dict[str, list[str]]:
    """Names of parameters by group: those of each pattern, or of each module that holds some itself."""
    if isinstance(per_layer, bool):
        found: dict[str, list[str]] = {}
        for name in layout.names if per_layer else ():
            found.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return found
    return {pattern: [pattern] for pattern in per_layer}


def measure_layers(
    block: Callable[[list[str]], LinearOperator], names: Mapping[str, list[str]], seed: int, tol: float
) -> dict[str, LayerCurvature]:
    """The top eigenvalue and the trace of each group's block; at most 46 products a group."""
    found = {}
    for group, parameters in names.items():
        sp = spectrum(block(parameters), num_matvecs=_MATVECS, dim=1024, seed=seed, top_k=1, bottom_k=0, tol=tol)
        found[group] = LayerCurvature(
            sp.lambda_max, float(sp.residuals[0]), bool(sp.converged[0]), sp.trace, sp.trace_sem, sp.num_products
        )
    return found
