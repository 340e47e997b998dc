"""The base class of sketches: immutable values that are rebuilt from a few integers and can be cut into columns."""

import functools
import operator
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._apply import apply
from lightning_sketch.operators.base import LinearOperator, check_vectors
from lightning_sketch.operators.random import RNG, Key

# All kinds by name; a subclass of `Sketch` that has a `kind` is added when it is defined.
KINDS: dict[str, "type[Sketch]"] = {}


@dataclass(frozen=True)
class Sketch(LinearOperator):
    """A random linear map S: R^n -> R^dim with E[SᵀS] = I. Equal fields, equal map, everywhere.

    To add a kind, define a subclass: a frozen dataclass with a `kind` that no other has, `streams`, `forward` and
    `adjoint`. From then on `make_sketch`, callbacks and stores accept it by that name. A program that reads a
    store with such rows has to define the kind first. The tests in `lightning_sketch.testing.SketchTests` have to pass.

    Args:
        n: The size of the vectors to sketch, e.g. the number of parameters of a model.
        dim: The size of a sketch, at most n.
        seed: The seed of the random map, 0 <= seed < 2^63.

    Attributes:
        kind: The name of the kind, the same for all sketches of a class.
        streams: Whether `columns(a, b)` costs what its range costs; otherwise it costs as much as the whole sketch.

    Raises:
        TypeError: If a field is no integer.
        ValueError: If a field is out of its range.
    """

    n: int
    dim: int
    seed: int = 0

    kind: ClassVar[str]
    streams: ClassVar[bool]

    def __init_subclass__(cls, *, register: bool = True, **options: Any):
        super().__init_subclass__(**options)
        if not register or "kind" not in vars(cls):
            return
        there = KINDS.get(cls.kind)
        if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.__name__} has kind={cls.kind!r}, which {there.__module__}.{there.__qualname__} has already; "
                "give it another one."
            )
        KINDS[cls.kind] = cls

    def __post_init__(self):
        name = type(self).__name__
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} takes an integer {entry.name}, got {value!r}; use int(...).")
            object.__setattr__(self, entry.name, operator.index(value))
        if not 0 < self.dim <= self.n:
            raise ValueError(
                f"{name} needs 0 < dim <= n, got dim={self.dim}, n={self.n}; "
                f"a sketch shrinks, so choose a dim no larger than n."
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"{name} needs 0 <= seed < 2^63, got seed={self.seed}; use abs(seed) % 2**63.")

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (dim, n)."""
        return self.dim, self.n

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... dim"]:
        """Return S x for each vector x along the last axis, in float64 if x is, else in float32."""
        return self.columns(0, self.n).matvec(x)

    def rmatvec(self, y: Float[Tensor, "... dim"]) -> Float[Tensor, "... n"]:
        """Return Sᵀ y for each vector y along the last axis: the exact adjoint of `matvec`."""
        return self.columns(0, self.n).rmatvec(y)

    def columns(self, start: int, stop: int) -> "Columns":
        """Return S restricted to the coordinates [start, stop), an operator of shape (dim, stop - start).

        Over ranges that tile [0, n), the sum of `columns(a, b).matvec(x[a:b])` is `matvec(x)`.

        Raises:
            ValueError: If the range is empty or leaves [0, n).
        """
        return Columns(self, start, stop)

    def spec(self) -> dict[str, Any]:
        """Return the fields as a JSON object; `make_sketch(**sketch.spec()) == sketch`."""
        return {"kind": self.kind, "n": self.n, "dim": self.dim, "seed": self.seed, "rng": RNG}

    @property
    def width(self) -> int:
        """The smallest power of two that is at least dim."""
        return 1 << (self.dim - 1).bit_length()

    def key(self, stream: str) -> Key:
        """Return the key of a named random stream of this sketch."""
        return Key(self.seed, f"{self.kind}/{stream}")

    @abstractmethod
    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """Return S[:, start : start + size] x, for tensors without a graph, of any floating type."""

    def forward_pieces(self, pieces: Sequence[tuple[int, Tensor]]) -> Float[Tensor, "1 dim"]:
        """Return S x for a vector x given by pieces and where they begin, without a graph; the rest of it is zero."""
        if self.streams:
            return cast(Tensor, sum(self.forward(x[None], start) for start, x in pieces))
        dtype = functools.reduce(torch.promote_types, (x.dtype for _, x in pieces), torch.float32)
        whole = pieces[0][1].new_zeros(1, self.n, dtype=dtype)
        for start, x in pieces:
            whole[0, start : start + len(x)] = x
        return self.forward(whole, 0)

    @abstractmethod
    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """Return S[:, start : stop]ᵀ y, for tensors without a graph, of any floating type."""


@dataclass(frozen=True)
class Columns(LinearOperator):
    """The columns [start, stop) of a sketch.

    Args:
        of: The sketch S.
        start: The first column.
        stop: The end of the range.

    Raises:
        ValueError: If the range is empty or leaves [0, n).
    """

    of: Sketch
    start: int
    stop: int

    def __post_init__(self):
        if not 0 <= self.start < self.stop <= self.of.n:
            raise ValueError(
                f"columns needs 0 <= start < stop <= n, got start={self.start}, stop={self.stop}, "
                f"n={self.of.n}; ask for a range inside the sketch."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (dim, stop - start)."""
        return self.of.dim, self.stop - self.start

    def matvec(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return S[:, start : stop] x."""
        check_vectors(x, self.shape[1], f"{self._name}.matvec")
        return apply(self.of, self.start, self.stop, False, x)

    def rmatvec(self, y: Float[Tensor, "... dim"]) -> Float[Tensor, "... size"]:
        """Return S[:, start : stop]ᵀ y."""
        check_vectors(y, self.shape[0], f"{self._name}.rmatvec")
        return apply(self.of, self.start, self.stop, True, y)

    @property
    def _name(self) -> str:
        whole = self.stop - self.start == self.of.n
        return type(self.of).__name__ + ("" if whole else f".columns({self.start}, {self.stop})")
