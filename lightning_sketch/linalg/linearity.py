"""How far an operator is from linear and from symmetric, measured by three products."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import NOT_FINITE
from lightning_sketch.linalg.lanczos import dot
from lightning_sketch.operators.base import LinearOperator

_REFUSED = 0.05
_ASYMMETRIC = 30  # times the defect of linearity; both are rounding where all is well


class Defect(NamedTuple):
    """How far an operator is from linear and from symmetric; both are rounding if it is."""

    linearity: float
    """||A(u + v) - A u - A v|| over the largest of the three."""
    symmetry: float
    """|uᵀA v - vᵀA u| over ||A u|| + ||A v||, for unit vectors."""


def defect(operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> Defect:
    """Both defects from three products. Batches that change between products and live dropout show in the first."""
    rest = operator.matvec(u + v)
    sizes, crossed = [dot(rest, rest) ** 0.5], []
    for x, other in ((u, v), (v, u)):
        image = operator.matvec(x)
        sizes.append(dot(image, image) ** 0.5)
        crossed.append(dot(image, other) / (dot(other, other) ** 0.5 or 1.0))
        rest -= image
        del image  # one vector fewer during the next product
    linearity, asymmetry = dot(rest, rest) ** 0.5, abs(crossed[0] - crossed[1])
    return Defect(linearity / max(sizes) if linearity else 0.0, asymmetry / (sizes[1] + sizes[2]) if asymmetry else 0.0)


def checked_defect(
    operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"], random: bool = False
) -> float:
    """How far the operator is from linear on u and v; refused above 0.05, as is one far less symmetric than linear.

    `random`: u and v are independent, so that uᵀA v is smaller than ||A v|| by √n, and with it what is asymmetric.
    """
    linearity, symmetry = defect(operator, u, v)
    symmetry *= len(u) ** 0.5 if random else 1
    if not linearity < float("inf"):
        raise ValueError(NOT_FINITE)
    if linearity > _REFUSED:
        raise ValueError(
            f"the operator is not linear: A(u + v) differs from A u + A v by {linearity:.1%}. A loss that changes "
            "between calls does this: live dropout, batches that are drawn anew at each pass. Fix the batches and use "
            "mode='eval'."
        )
    if symmetry > _ASYMMETRIC * max(linearity, 1e-5):
        raise ValueError(
            f"the operator is not symmetric: uᵀA v and vᵀA u differ by {symmetry:.1%}. A custom autograd function "
            "whose backward cannot be differentiated itself does this (a fused kernel); write it with plain "
            "operations, or mark it with once_differentiable to have it named."
        )
    return linearity
