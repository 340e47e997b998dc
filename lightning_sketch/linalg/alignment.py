"""How much of a vector lies in the space of the top eigenvectors, and how far two such spaces overlap.

    f = ||P g||² / ||g||²,     P the orthogonal projection onto span(x_1 ... x_k)

from sketches alone, in two ways:

    proj    ||Qᵀ S g||² / ||S g||², Q orthonormal for S x_1 ... S x_k; chance puts k / dim in, which is taken out
    dot     with x_i = V c_i exact and only their lengths and angles from the sketch: S X = Q R,
            ||R⁻ᵀ Cᵀ Vᵀ g||² / ||g||²; relative error about √(2 / dim)

proj is best for a large share, dot for a small one.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 0.2


class Share(float):
    """A part of one, next to what chance would give: k / n for a random direction."""

    chance: float

    def __new__(cls, value: float, chance: float):
        """`value`, where a random direction has `chance`."""
        share = super().__new__(cls, value)
        share.chance = chance
        return share


def shares(vectors: Float[Tensor, "dim r"], sketched: Float[Tensor, " dim"], exact: bool) -> Float[Tensor, " r"]:
    """proj: the shares in the first 1, 2, ..., r eigenvectors."""
    q, _ = torch.linalg.qr(vectors.double())
    found = ((q.T @ sketched) ** 2).cumsum(0) / (sketched @ sketched)
    return found if exact else without_chance(found, torch.arange(1, len(found) + 1), len(vectors))


def shares_by_dots(
    vectors: Float[Tensor, "dim r"],
    coefficients: Float[Tensor, "m r"],
    dots: Float[Tensor, " m"],
    norm: float,
) -> Float[Tensor, " r"]:
    """dot: the same from dots = Vᵀ g and norm = ||g||."""
    _, r = torch.linalg.qr(vectors)
    onto = torch.linalg.solve_triangular(r.T, (coefficients.T @ dots)[:, None], upper=False)[:, 0]
    return (onto**2).cumsum(0) / norm**2


def better_of(proj: Float[Tensor, " r"], dot: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Dot where the share is small, else proj."""
    return torch.where(proj < _SMALL, dot, proj)


def overlap(a: Float[Tensor, "dim k"], b: Float[Tensor, "dim k"], exact: bool) -> float:
    """Mean squared cosine of the angles between two spaces, 0 to 1."""
    (qa, _), (qb, _) = torch.linalg.qr(a.double()), torch.linalg.qr(b.double())
    k = a.shape[1]
    found = (qa.T @ qb).square().sum() / k
    return float(found if exact else without_chance(found, torch.tensor(k), len(a)))


def without_chance(share: Tensor, k: Tensor, dim: int) -> Tensor:
    """Take out the k / dim that a sketch of anything has in a space of k dimensions."""
    chance = k / dim
    return ((share - chance) / (1 - chance)).clamp(0, 1) if math.prod(share.shape) else share
