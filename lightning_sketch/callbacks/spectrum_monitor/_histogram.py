"""The density of a spectrum in bins that never change, so that a logger can draw its history as a heat map."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.quadrature import Quadrature

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
