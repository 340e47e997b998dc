"""How far an operator is from linear and from symmetric, measured by three products of a pair of vectors."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import NOT_FINITE
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.operators.base import LinearOperator, UnaryOperator

_REFUSED = 0.05  # largest accepted defect of linearity
_ASYMMETRIC = 30  # largest accepted defect of symmetry, in units of the defect of linearity


class Defect(NamedTuple):
    """How far an operator is from linear and from symmetric; only rounding errors if it is both.

    Attributes:
        linearity: ||A(u + v) - A u - A v|| over the largest of the three norms.
        symmetry: |uᵀA v - vᵀA u| over ||A u|| + ||A v||, for unit vectors.
        known: The errors of the three products that the operator itself knows of, over the same norm.
    """

    linearity: float
    symmetry: float
    known: float = 0.0


def defect(operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> Defect:
    """Return both defects, from three products; batches and dropout that change between products show in the first."""
    space, rest = operator.space, operator.matvec(u + v)
    sizes, crossed, known = [space.norm(rest)], [], _last_error(operator)
    for x, other in ((u, v), (v, u)):
        image = operator.matvec(x)
        known += _last_error(operator)
        sizes.append(space.norm(image))
        crossed.append(space.dot(image, other) / (space.norm(other) or 1.0))
        rest -= image
        del image  # frees one vector during the next product
    return _defect(space.norm(rest), abs(crossed[0] - crossed[1]), sizes, known)


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
    return _judged(found._replace(symmetry=found.symmetry * operator.space.n**0.5) if random else found)


@dataclass(eq=False)
class Watched(UnaryOperator):
    """An operator that is checked on the first vectors it multiplies, by three products more.

    Its first vector, which is random, is compared with another random one: two products more. The third and the fourth,
    Krylov vectors of a run, are compared with each other: one more. The products with its own vectors are used again.

    Args:
        of: A square operator A.
        seed: The seed of the other random vector.

    Attributes:
        defect: The largest defect of linearity so far.
        num_products: The number of further products.

    A product raises ValueError as `checked_defect` does.
    """

    of: LinearOperator
    seed: int = 0
    defect: float = field(default=0.0, init=False)
    num_products: int = field(default=0, init=False)
    _error: Tensor | None = field(default=None, init=False)
    _multiplied: int = field(default=0, init=False)
    _third: tuple[Tensor, Tensor, float] | None = field(default=None, init=False)  # v, A v and its error

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return A x for each vector x along the last axis."""
        image = self.of.matvec(x)
        self._error = self.of.last_error()
        self._multiplied += 1
        if self._multiplied == 1:
            other = start_vector(self.of, self.seed, name="defect", dtype=x.dtype)
            self._compare(x, image, other, None, _length(self.of, self._error))
        elif self._multiplied == 3:
            self._third = x.clone(), image.clone(), _length(self.of, self._error)
        elif self._multiplied == 4 and self._third is not None:
            u, of_u, error = self._third
            self._compare(u, of_u, x, image, error + _length(self.of, self._error))
            self._third = None
        return image

    def last_error(self) -> Tensor | None:
        """Return the error of the last product that was asked for, without those that check it."""
        return self._error

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ y for each vector y along the last axis."""
        return self.of.rmatvec(y)

    def _compare(self, u: Tensor, of_u: Tensor, v: Tensor, of_v: Tensor | None, known: float) -> None:
        """Compare A(u + v) with A u + A v, whose products have known errors; without A v, both are random."""
        space, rest = self.space, self.of.matvec(u + v)
        known += _last_error(self.of)
        sizes = [space.norm(rest), space.norm(of_u)]
        random = of_v is None
        if of_v is None:
            of_v = self.of.matvec(v)
            known += _last_error(self.of)
        sizes.append(space.norm(of_v))
        lengths = [space.norm(x) or 1.0 for x in (u, v)]
        asymmetry = abs(space.dot(of_u, v) / lengths[1] - space.dot(of_v, u) / lengths[0])
        rest = rest.sub_(of_u).sub_(of_v)
        self.num_products += 1 + random
        found = _defect(space.norm(rest), asymmetry * (space.n**0.5 if random else 1), sizes, known)
        self.defect = max(self.defect, _judged(found))


def _last_error(operator: LinearOperator) -> float:
    """Return about how large the error of an operator's last product is."""
    return _length(operator, operator.last_error())


def _length(operator: LinearOperator, error: Tensor | None) -> float:
    return 0.0 if error is None else operator.space.norm(error)


def _defect(linearity: float, asymmetry: float, sizes: list[float], known: float) -> Defect:
    """Return defects relative to the sizes of A(u + v), A u and A v."""
    return Defect(
        linearity / max(sizes) if linearity else 0.0,
        asymmetry / (sizes[1] + sizes[2]) if asymmetry else 0.0,
        known / max(sizes) if known else 0.0,
    )


def _judged(found: Defect) -> float:
    """Return the defect of linearity beyond known errors, or refuse an operator that is not linear or not symmetric."""
    whole, symmetry, known = found
    if not whole < float("inf"):
        raise ValueError(NOT_FINITE)
    linearity = max(whole - known, 0.0)
    if linearity > _REFUSED:
        raise ValueError(
            f"the operator is not linear: A(u + v) differs from A u + A v by {linearity:.1%}. Something changes "
            "between its products, such as batches that are drawn again at each pass, or it is computed in low "
            "precision; pass a list of fixed batches, or use float32."
        )
    if symmetry > _ASYMMETRIC * max(whole, known, 1e-5):
        raise ValueError(
            f"the operator is not symmetric: uᵀA v and vᵀA u differ by {symmetry:.2%}. The Jacobian "
            "of a gradient is symmetric, unless a backward pass computes something else, such as a hook or function "
            "that changes the gradient, or a stopped gradient; of other operators take the symmetric part."
        )
    return linearity
