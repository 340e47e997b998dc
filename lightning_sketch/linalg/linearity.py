"""How far an operator is from linear and from symmetric, measured by three products."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import NOT_FINITE
from lightning_sketch.linalg.lanczos import dot
from lightning_sketch.operators.base import LinearOperator

_REFUSED = 0.05  # largest accepted defect of linearity
_ASYMMETRIC = 30  # largest accepted defect of symmetry, in units of the defect of linearity


class Defect(NamedTuple):
    """How far an operator is from linear and from symmetric; both numbers are rounding errors if it is both.

    Attributes:
        linearity: ||A(u + v) - A u - A v|| over the largest of the three norms.
        symmetry: |uᵀA v - vᵀA u| over ||A u|| + ||A v||, for unit vectors.
    """

    linearity: float
    symmetry: float


def defect(operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> Defect:
    """Return both defects, from three products; batches and dropout that change between products show in the first."""
    rest = operator.matvec(u + v)
    sizes, crossed = [dot(rest, rest) ** 0.5], []
    for x, other in ((u, v), (v, u)):
        image = operator.matvec(x)
        sizes.append(dot(image, image) ** 0.5)
        crossed.append(dot(image, other) / (dot(other, other) ** 0.5 or 1.0))
        rest -= image
        del image  # frees one vector during the next product
    linearity, asymmetry = dot(rest, rest) ** 0.5, abs(crossed[0] - crossed[1])
    return Defect(linearity / max(sizes) if linearity else 0.0, asymmetry / (sizes[1] + sizes[2]) if asymmetry else 0.0)


def checked_defect(
    operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"], random: bool = False
) -> float:
    """Return the defect of linearity of an operator on u and v, or refuse the operator.

    Args:
        operator: A square operator.
        u: A vector of length one.
        v: another.
        random: Whether u and v are independent random vectors. Then uᵀA v is smaller than ||A v|| by a factor √n, as
            is its asymmetry, which is multiplied by √n before it is judged.

    Raises:
        ValueError: If a product is not finite, the defect of linearity is above 0.05, or the operator is far less
            symmetric than linear.
    """
    linearity, symmetry = defect(operator, u, v)
    symmetry *= len(u) ** 0.5 if random else 1
    if not linearity < float("inf"):
        raise ValueError(NOT_FINITE)
    if linearity > _REFUSED:
        raise ValueError(
            f"the operator is not linear: A(u + v) differs from A u + A v by {linearity:.1%}. Something changes "
            "between its products, such as batches that are drawn again at each pass, or it is computed in low "
            "precision; pass a list of fixed batches, or use float32."
        )
    if symmetry > _ASYMMETRIC * max(linearity, 1e-5):
        raise ValueError(
            f"the operator is not symmetric: uᵀA v and vᵀA u differ by {symmetry:.2%}. The Jacobian "
            "of a gradient is symmetric, unless a backward pass computes something else, such as a hook or function "
            "that changes the gradient, or a stopped gradient; of other operators take the symmetric part."
        )
    return linearity
