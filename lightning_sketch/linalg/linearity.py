"""How far an operator is from linear and from symmetric, measured by three products."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import NOT_FINITE
from lightning_sketch.linalg.lanczos import dot
from lightning_sketch.operators.base import LinearOperator, UnaryOperator

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
    found = defect(operator, u, v)
    return _judged(found._replace(symmetry=found.symmetry * len(u) ** 0.5) if random else found)


@dataclass(eq=False)
class Watched(UnaryOperator):
    """An operator that is checked on the first vectors it multiplies, by one more product for each pair of them.

    Its own products A u and A v are used again, and A(u + v) is compared with them. Memory: two vectors until then.

    Args:
        of: A square operator A.
        pairs: The number of pairs to check.

    Attributes:
        defect: The largest defect of linearity so far.
        num_products: The number of further products.

    A product raises ValueError as `checked_defect` does.
    """

    of: LinearOperator
    pairs: int = 2
    defect: float = field(default=0.0, init=False)
    num_products: int = field(default=0, init=False)
    _open: tuple[Tensor, Tensor] | None = field(default=None, init=False)  # u and A u of a pair

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return A x for each vector x along the last axis."""
        image = self.of.matvec(x)
        if x.ndim == 1 and self.num_products < self.pairs:
            if self._open is None:
                self._open = x.clone(), image.clone()
            else:
                self._compare(*self._open, x, image)
                self._open = None
        return image

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ y for each vector y along the last axis."""
        return self.of.rmatvec(y)

    def _compare(self, u: Tensor, of_u: Tensor, v: Tensor, of_v: Tensor) -> None:
        sizes = [dot(image, image) ** 0.5 for image in (of_u, of_v)]
        lengths = [dot(x, x) ** 0.5 or 1.0 for x in (u, v)]
        asymmetry = abs(dot(of_u, v) / lengths[1] - dot(of_v, u) / lengths[0])
        of_both = self.of.matvec(u.add_(v))
        largest = max(*sizes, dot(of_both, of_both) ** 0.5)
        rest = of_u.add_(of_v).sub_(of_both)
        size = dot(rest, rest) ** 0.5
        self.num_products += 1
        linearity = size / largest if size else 0.0
        self.defect = max(self.defect, _judged(Defect(linearity, asymmetry / sum(sizes) if asymmetry else 0.0)))


def _judged(found: Defect) -> float:
    """Return the defect of linearity, or refuse an operator that is not linear or not symmetric."""
    linearity, symmetry = found
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
