"""The share of a vector in the space of the top eigenvectors, and the overlap of two such spaces.

    f = ||P g||² / ||g||²,     P the orthogonal projection onto span(x_1 ... x_k)

It is estimated from sketches alone, in two ways:

    proj    ||Qᵀ S g||² / ||S g||², Q an orthonormal basis of S x_1 ... S x_k; the k / dim that it finds by chance in
            any vector is subtracted
    dot     ||R⁻ᵀ Cᵀ Vᵀ g||² / ||g||², with x_i = V c_i, whose products with g are exact; only the lengths and angles
            of the x_i come from the sketch, by S X = Q R; relative error about √(2 / dim)

proj is more accurate for a large share, dot for a small one.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 0.2  # shares below this are taken from dot


class Share(float):
    """A share between 0 and 1, together with the share that a random direction would have.

    Args:
        value: The share; NaN if unknown.
        chance: The expected share of a random direction, k / n.

    >>> share = Share(0.5, chance=0.01)
    >>> share.chance, share > share.chance
    (0.01, True)
    """

    chance: float

    def __new__(cls, value: float, chance: float) -> "Share":
        """Make a float with the attribute `chance`."""
        share = super().__new__(cls, value)
        share.chance = chance
        return share


def shares(vectors: Float[Tensor, "dim r"], sketched: Float[Tensor, " dim"], exact: bool) -> Float[Tensor, " r"]:
    """Return the shares of a vector in the spaces of the first 1, 2, ..., r eigenvectors, by proj.

    Args:
        vectors: S x_i as columns.
        sketched: S g.
        exact: Whether S is the identity, so that nothing is found by chance.
    """
    q, _ = torch.linalg.qr(vectors.double())
    found = ((q.T @ sketched) ** 2).cumsum(0) / (sketched @ sketched)
    return found if exact else _without_chance(found, torch.arange(1, len(found) + 1), len(vectors))


def shares_by_dots(
    vectors: Float[Tensor, "dim r"],
    coefficients: Float[Tensor, "m r"],
    dots: Float[Tensor, " m"],
    norm: float,
) -> Float[Tensor, " r"]:
    """Return the shares of a vector in the spaces of the first 1, 2, ..., r eigenvectors, by dot.

    Args:
        vectors: S x_i as columns.
        coefficients: c_i as columns.
        dots: Vᵀ g.
        norm: ||g||.
    """
    _, r = torch.linalg.qr(vectors)
    onto = torch.linalg.solve_triangular(r.T, (coefficients.T @ dots)[:, None], upper=False)[:, 0]
    return (onto**2).cumsum(0) / norm**2


def better_of(proj: Float[Tensor, " r"], dot: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Return the share by dot where it is small, else the share by proj."""
    return torch.where(proj < _SMALL, dot, proj)


def overlap(a: Float[Tensor, "dim k"], b: Float[Tensor, "dim k"], exact: bool) -> float:
    """Return the mean squared cosine of the angles between the column spaces of a and b, 0 to 1."""
    (qa, _), (qb, _) = torch.linalg.qr(a.double()), torch.linalg.qr(b.double())
    k = a.shape[1]
    found = (qa.T @ qb).square().sum() / k
    return float(found if exact else _without_chance(found, torch.tensor(k), len(a)))


def _without_chance(share: Tensor, k: Tensor, dim: int) -> Tensor:
    """Subtract the share k / dim that the sketch of any vector has in a space of k dimensions."""
    chance = k / dim
    return ((share - chance) / (1 - chance)).clamp(0, 1) if math.prod(share.shape) else share
