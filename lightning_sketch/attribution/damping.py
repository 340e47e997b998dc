"""How much damping, when nobody says: enough that the noise of the curvature is not inverted.

    lambda = max(0.01 e, kappa b² / tr A),    e = tr A² / tr A

e      an energy-weighted mean eigenvalue; unlike tr A / dim it does not depend on the size of the sketch
b²     what A of a random half of the examples is expected to be off by, see `curvature`
kappa  0.3; 0.1 for the empirical Fisher

In units of e: c = lambda / e = max(0.01, kappa v) with v = b² / tr A². A large v, or few effective examples, means that
a few examples carry the curvature; how far they move a retrained model then cannot be known from one model:
`calibrate` measures it.
"""

from dataclasses import dataclass

from lightning_sketch.attribution.curvature import Curvature

FLOOR = 0.01
_NOISY, _FEW = 0.1, 0.1


@dataclass(frozen=True)
class Measures:
    """What damping is made of: e, v, and how many examples carry the curvature, of how many."""

    scale: float
    noise: float
    effective_samples: float
    examples: int

    @classmethod
    def of(cls, curvature: Curvature) -> "Measures":
        """From the scalars that were kept while the curvature was summed."""
        return cls(
            curvature.trace_of_square / curvature.trace,
            curvature.half_noise / curvature.trace_of_square,
            curvature.effective_samples,
            curvature.examples,
        )

    @property
    def doubtful(self) -> bool:
        """Whether few examples carry the curvature, so that an automatic damping is a guess."""
        return self.noise > _NOISY or self.effective_samples < _FEW * self.examples


def automatic(curvature: Curvature) -> float:
    """Lambda by the rule of this module.

    >>> import torch
    >>> from lightning_sketch.attribution.curvature import CurvatureSum
    >>> total = CurvatureSum(2)
    >>> total.add(torch.eye(2)[:, None])  # A = I / 2, e = 1/2, b² = (1 - 1/2) / 2, so lambda = 0.3 b²
    >>> round(automatic(total.curvature("ggn")), 6)
    0.075
    """
    measured, kappa = Measures.of(curvature), 0.1 if curvature.kind == "fisher" else 0.3
    return max(FLOOR, kappa * measured.noise) * measured.scale
