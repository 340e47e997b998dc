"""Solves (A + lambda I) x = q with a curvature matrix A and a damping lambda that is never zero.

A as a matrix        by its eigenvectors, computed once for all dampings; above dim 1024, where eigenvectors take
                     minutes, by a Cholesky factor for each damping
A = Rᵀ R, R small    (q - Rᵀ (R Rᵀ + lambda I)⁻¹ R q) / lambda: a system of as many equations as there are rows

The automatic damping is large enough that the noise of the curvature is not inverted:

    lambda = max(0.01 e, kappa b² / tr A),    e = tr A² / tr A

e      an energy-weighted mean eigenvalue; unlike tr A / dim it does not depend on the size of the sketch
b²     expected squared error of A from a random half of the examples, see `curvature`
kappa  0.3; 0.1 for the empirical Fisher

In units of e: c = lambda / e = max(0.01, kappa v) with v = b² / tr A². A large v, or few effective examples, means that
a few examples carry the curvature; how far they move a retrained model cannot be known then from one model, and
`calibrate` measures it.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.attribution.curvature import Curvature

# A number, "auto", or several numbers for a sweep.
Damping = float | int | Literal["auto"] | Sequence[float]

_EIGENVECTORS_UP_TO = 1024
_FLOOR = 0.01
_NOISY, _FEW = 0.1, 0.1


class Influence:
    """The inverse of a damped curvature, (A + lambda I)⁻¹, as a function of vectors.

    Args:
        curvature: The curvature matrix A.
        damping: The damping lambda > 0; "auto" for the rule of the module `attribution.influence`; several for a sweep.

    Attributes:
        damping: The damping in use, or a tuple of several.
        noise: The relative noise of the curvature, v.
        effective_samples: The effective number of examples that carry the curvature.

    Raises:
        ValueError: if a damping is not positive, since noise would be inverted then.

    Warns:
        UserWarning: if "auto" is a guess, since few examples carry the curvature.

    >>> from lightning_sketch.attribution.curvature import CurvatureSum
    >>> total = CurvatureSum(2)
    >>> total.add(torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]))
    >>> inverse = Influence(total.curvature("fisher"), damping=1.0)
    >>> inverse(torch.tensor([[3.0, 1.0]]))
    tensor([[1., 1.]], dtype=torch.float64)
    >>> print(inverse)
    fisher of 2 examples, damping 1 (c = 0.5, v = 0.5, 1.0 effective examples)
    """

    def __init__(self, curvature: Curvature, damping: Damping = "auto"):
        self.curvature, measured = curvature, _Measures.of(curvature)
        self.noise, self.effective_samples, self._scale = measured.noise, measured.effective_samples, measured.scale
        if isinstance(damping, str):
            if damping != "auto":
                raise ValueError(f"damping={damping!r} is not known; use 'auto', a number, or several numbers.")
            damping = automatic(curvature)
            if measured.doubtful:
                warnings.warn(
                    f"few examples carry the curvature: v = {self.noise:.2g}, {self.effective_samples:.0f} effective "
                    f"of {curvature.examples} examples. The automatic damping {damping:.3g} is a guess; calibrate(...) "
                    "measures it with short trainings.",
                    stacklevel=2,
                )
        self.damping: float | tuple[float, ...] = (
            float(damping) if isinstance(damping, float | int) else tuple(map(float, damping))
        )
        wrong = [value for value in self._dampings if not 0 < value < float("inf")]
        if wrong or not self._dampings:
            raise ValueError(
                f"damping is a positive number, got {damping!r}; without damping the noise of the curvature would be "
                f"inverted. For comparison, 'auto' is {automatic(curvature):.3g} here."
            )

    @property
    def relative_damping(self) -> float | tuple[float, ...]:
        """The damping relative to the curvature, c = lambda / e, comparable between models and sketches."""
        relative = tuple(value / self._scale for value in self._dampings)
        return relative if isinstance(self.damping, tuple) else relative[0]

    def __call__(self, vectors: Float[Tensor, "q dim"]) -> Float[Tensor, "*dampings q dim"]:
        """Return (A + lambda I)⁻¹ times each row, in float64; several dampings are along a new first axis.

        Raises:
            ValueError: if a damping is so small that it is lost in rounding.
        """
        solved = torch.stack([self._solve(vectors.double(), value) for value in self._dampings])
        return solved if isinstance(self.damping, tuple) else solved[0]

    def __str__(self) -> str:
        ends = (min(self._dampings), max(self._dampings)) if len(self._dampings) > 1 else self._dampings
        damping, c = (" to ".join(f"{value / unit:.3g}" for value in ends) for unit in (1, self._scale))
        return (
            f"{self.curvature.kind} of {self.curvature.examples} examples, damping {damping} (c = {c}, "
            f"v = {self.noise:.3g}, {self.effective_samples:.1f} effective examples)"
        )

    def __repr__(self) -> str:
        return f"Influence: {self}"

    def log(self) -> None:
        """Log the curvature and the damping in use; a second time the same is not logged."""
        _log_once(str(self))

    @property
    def _dampings(self) -> tuple[float, ...]:
        """The dampings as a tuple."""
        return self.damping if isinstance(self.damping, tuple) else (self.damping,)

    @cached_property
    def _symmetric(self) -> Float[Tensor, "m m"]:
        """The matrix A, or R Rᵀ if A is stored by its root."""
        root = self.curvature.root
        return self.curvature.dense() if root is None else root @ root.T

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues, none of them negative, and the eigenvectors of `_symmetric`."""
        values, vectors = torch.linalg.eigh(self._symmetric)
        return values.clamp(min=0), vectors

    def _solve(self, vectors: Float[Tensor, "q dim"], damping: float) -> Float[Tensor, "q dim"]:
        """Return (A + lambda I)⁻¹ times each row."""
        root = self.curvature.root
        if root is None:
            return self._solve_symmetric(vectors, damping)
        return (vectors - self._solve_symmetric(vectors @ root.T, damping) @ root) / damping

    def _solve_symmetric(self, vectors: Float[Tensor, "q m"], damping: float) -> Float[Tensor, "q m"]:
        """Return (M + lambda I)⁻¹ times each row, where M is `_symmetric`."""
        if len(self._symmetric) <= _EIGENVECTORS_UP_TO:
            values, basis = self._eigen
            return (vectors @ basis / (values + damping)) @ basis.T
        damped = self._symmetric.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise ValueError(
                f"damping={damping:.3g} is lost in rounding beside the curvature; 'auto' is "
                f"{automatic(self.curvature):.3g}."
            )
        return torch.cholesky_solve(vectors.T, factor).T


@cache
def _log_once(text: str) -> None:
    """Log a text, unless it was logged before."""
    log = logging.getLogger("lightning_sketch")
    if not log.hasHandlers():  # logging is not configured: print to stderr, as Lightning does
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    log.info(text)


@dataclass(frozen=True)
class _Measures:
    """The numbers that determine the automatic damping.

    Args:
        scale: The energy-weighted mean eigenvalue, e.
        noise: The relative noise, v.
        effective_samples: The effective number of examples that carry the curvature.
        examples: The number of examples.
    """

    scale: float
    noise: float
    effective_samples: float
    examples: int

    @classmethod
    def of(cls, curvature: Curvature) -> "_Measures":
        """Compute them from the scalars of a curvature."""
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
    """Return the automatic damping, by the rule of this module.

    >>> import torch
    >>> from lightning_sketch.attribution.curvature import CurvatureSum
    >>> total = CurvatureSum(2)
    >>> total.add(torch.eye(2)[:, None])  # A = I / 2, e = 1/2, b² = (1 - 1/2) / 2, so lambda = 0.3 b²
    >>> round(automatic(total.curvature("ggn")), 6)
    0.075
    """
    measured, kappa = _Measures.of(curvature), 0.1 if curvature.kind == "fisher" else 0.3
    return max(_FLOOR, kappa * measured.noise) * measured.scale
