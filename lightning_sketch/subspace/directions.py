"""The random directions along which the weights move, nested so that their number can be doubled.

    θ = θ₀ + Dᵀ w          D = scale · √(max_dim / dim) · (the first dim rows of Π S)

S     a sketch R^n -> R^max_dim, E[SᵀS] = I; the identity if dim = n and no max_dim is given
Π     a random permutation of its outputs; the identity if no max_dim is given, which then is dim
D     R^n -> R^dim, E[DᵀD] = scale² I for every dim: a step of Adam on w has length scale · lr √n in θ, whatever dim is

Without Π a prefix would not be random enough: the first dim rows of a Hadamard matrix repeat with period dim, so
that a vector with two entries at that distance would be mapped to zero in half of the draws.
"""

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.linalg.lanczos import extreme_ritz_values
from lightning_sketch.operators import make_sketch
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.random import Key, words
from lightning_sketch.operators.sketch import Sketch


@dataclass(frozen=True)
class Directions(LinearOperator):
    """The matrix D: R^n -> R^dim, whose rows are the directions.

    Args:
        sketch: S, with max_dim outputs.
        dim: The number of outputs in use.
        nested: Whether the outputs in use are chosen at random, so that dim can be doubled; otherwise all are in use,
            in the sketch's order.
        scale: The factor that all of them are multiplied by.
    """

    sketch: Sketch
    dim: int
    nested: bool = False
    scale: float = 1.0

    @classmethod
    def of(cls, kind: str, n: int, dim: int, seed: int, max_dim: int | None = None, scale: float = 1.0) -> "Directions":
        """Make the directions of a kind of sketch; for dim = n without max_dim, the n coordinate axes.

        Args:
            kind: The kind of sketch.
            n: The number of weights.
            dim: The number of directions in use.
            seed: The seed of the sketch and of Π.
            max_dim: The number up to which `dim` can be doubled; None if it stays.
            scale: The factor that all of them are multiplied by.

        Raises:
            ValueError: Unless 0 < dim <= max_dim <= n; if the kind is unknown.
        """
        largest = dim if max_dim is None else max_dim
        if not 0 < dim <= largest <= n:
            asked = f"dim={dim}" if max_dim is None else f"dim={dim}, max_dim={max_dim}"
            raise ValueError(
                f"a subspace of n={n} parameters needs 0 < dim <= {'n' if max_dim is None else 'max_dim <= n'}, "
                f"got {asked}; dim=n trains all of them."
            )
        nested = max_dim is not None
        sketch = make_sketch(kind, n=n, dim=largest, seed=seed)
        return cls(Identity(n, n, seed=seed) if dim == n and not nested else sketch, dim, nested, scale)

    def doubled(self) -> "Directions":
        """Return directions with twice the dim, at most max_dim; the first ones are these, up to their scale."""
        return replace(self, dim=min(2 * self.dim, self.sketch.dim))

    @property
    def shape(self) -> tuple[int, int]:
        """The pair (dim, n)."""
        return self.dim, self.sketch.n

    def spec(self) -> dict[str, int | str | bool]:
        """Return what determines the directions, except their scale and the number in use, as values that JSON has."""
        return {**self.sketch.spec(), "nested": self.nested}

    def restrict(self, y: Float[Tensor, "... max_dim"]) -> Float[Tensor, "... dim"]:
        """Return D x for y = S x."""
        y = y[..., self._order(y.device)] if self.nested else y
        return y if self._factor == 1 else y * self._factor

    def expand(self, w: Float[Tensor, "... dim"]) -> Float[Tensor, "... max_dim"]:
        """Return the vector y with Sᵀ y = Dᵀ w."""
        w = w if self._factor == 1 else w * self._factor
        if not self.nested:
            return w
        return w.new_zeros(*w.shape[:-1], self.sketch.dim).index_copy(-1, self._order(w.device), w)

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... dim"]:
        """Compute D x."""
        return self.restrict(self.sketch.matvec(x))

    def rmatvec(self, y: Float[Tensor, "... dim"]) -> Float[Tensor, "... n"]:
        """Compute Dᵀ y."""
        return self.sketch.rmatvec(self.expand(y))

    def condition(self, products: int = 30) -> float:
        """Estimate the condition number of D from below: √(λ_max / λ_min) of D Dᵀ.

        It says how much the length of a step in θ depends on the direction of a step in w. The estimate is from the
        extreme Ritz values of a Krylov space, in float64.

        Args:
            products: The largest number of products with D Dᵀ; the estimate is exact if dim <= products.
        """
        low, high = extreme_ritz_values(self @ self.T, products, dtype=torch.float64)
        return float((high / max(low, 1e-300)) ** 0.5)

    @property
    def _factor(self) -> float:
        return self.scale * (self.sketch.dim / self.dim) ** 0.5

    def _order(self, device: torch.device) -> Int[Tensor, " dim"]:
        return _permutation(self.sketch.seed, self.sketch.dim, device)[: self.dim]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, size: int, device: torch.device) -> Int[Tensor, " size"]:
    """Return the order that sorts independent random words, no two of which are equal."""
    return words(Key(seed, "subspace/order"), 0, size, device).argsort()


@dataclass(frozen=True)
class Identity(Sketch, register=False):
    """The identity matrix S = I, as a sketch with dim = n.

    Args:
        n: The size of the vectors.
        dim: The same number.
        seed: Not used, but part of the description of the directions.

    >>> Identity(n=3, dim=3).matvec(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1., 2., 3.])
    """

    kind = "identity"
    streams = False

    def __post_init__(self):
        super().__post_init__()
        if self.dim != self.n:
            raise ValueError(f"Identity needs dim = n, got dim={self.dim}, n={self.n}.")

    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """Return x at the columns from `start` on, and zeros elsewhere."""
        out = x.new_zeros(len(x), self.dim, dtype=torch.promote_types(x.dtype, torch.float32))
        out[:, start : start + x.shape[1]] = x
        return out

    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """Return the columns of y from `start` to `stop`."""
        return y[:, start:stop].to(torch.promote_types(y.dtype, torch.float32), copy=True)
