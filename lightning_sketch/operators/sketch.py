"""What all sketches share: they are values, can be cut into columns, and rebuilt from a few integers."""

import operator
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._apply import apply
from lightning_sketch.operators.base import LinearOperator, check_vectors
from lightning_sketch.operators.random import RNG, Key

KINDS: dict[str, "type[Sketch]"] = {}
"""All kinds by name, one's own among them: a subclass of `Sketch` that has a `kind` is known from its definition on."""


@dataclass(frozen=True)
class Sketch(LinearOperator):
    """A random linear map S: R^n -> R^dim with E[SᵀS] = I. Equal fields, equal map, everywhere.

    A kind of one's own is a subclass, a frozen dataclass with a `kind` that no other has, `streams`, `forward` and
    `adjoint`: from its definition on `make_sketch`, callbacks and stores know it by that name. A program that reads a
    store of it has to define it first. `lightning_sketch.testing.SketchTests` are the tests that it has to pass.

    Args:
        n: size of the vectors to sketch, e.g. the number of parameters of a model.
        dim: size of a sketch, at most n.
        seed: 0 <= seed < 2^63.

    Raises:
        TypeError: if a field is no integer.
        ValueError: if a field is out of its range.
    """

    n: int
    dim: int
    seed: int = 0

    kind: ClassVar[str]
    streams: ClassVar[bool]
    """Whether `columns(a, b)` costs what its range costs; otherwise it costs what all of S costs."""

    def __init_subclass__(cls, register: bool = True, **options):
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
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} takes an integer {field.name}, got {value!r}; use int(...).")
            object.__setattr__(self, field.name, operator.index(value))
        if not 0 < self.dim <= self.n:
            raise ValueError(
                f"{name} needs 0 < dim <= n, got dim={self.dim}, n={self.n}; "
                f"a sketch shrinks, so choose a dim no larger than n."
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"{name} needs 0 <= seed < 2^63, got seed={self.seed}; use abs(seed) % 2**63.")

    @property
    def shape(self) -> tuple[int, int]:
        """(dim, n)."""
        return self.dim, self.n

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... dim"]:
        """S x for each vector along the last axis; float64 if x is, else float32."""
        return self.columns(0, self.n).matvec(x)

    def rmatvec(self, y: Float[Tensor, "... dim"]) -> Float[Tensor, "... n"]:
        """Sᵀ y for each vector along the last axis: the exact adjoint of `matvec`."""
        return self.columns(0, self.n).rmatvec(y)

    def columns(self, start: int, stop: int) -> "Columns":
        """S restricted to the coordinates [start, stop), as an operator of shape (dim, stop - start).

        Over ranges that tile [0, n), the sum of `columns(a, b).matvec(x[a:b])` is `matvec(x)`.
        """
        return Columns(self, start, stop)

    def spec(self) -> dict[str, int | str]:
        """Return the map in JSON: `make_sketch(**sketch.spec()) == sketch`."""
        return {"kind": self.kind, "n": self.n, "dim": self.dim, "seed": self.seed, "rng": RNG}

    @property
    def width(self) -> int:
        """The power of two at or above dim."""
        return 1 << (self.dim - 1).bit_length()

    def key(self, stream: str) -> Key:
        """Return the key of one of this sketch's own random streams."""
        return Key(self.seed, f"{self.kind}/{stream}")

    @abstractmethod
    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """S[:, start : start + size] x, on plain tensors of any floating type."""

    @abstractmethod
    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """S[:, start : stop]ᵀ y, on plain tensors of any floating type."""


@dataclass(frozen=True)
class Columns(LinearOperator):
    """The columns [start, stop) of a sketch.

    Raises:
        ValueError: if the range is empty or leaves [0, n).
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
        """(dim, stop - start)."""
        return self.of.dim, self.stop - self.start

    def matvec(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """S[:, start : stop] x."""
        check_vectors(x, self.shape[1], f"{self._name}.matvec")
        return apply(self.of, self.start, self.stop, False, x)

    def rmatvec(self, y: Float[Tensor, "... dim"]) -> Float[Tensor, "... size"]:
        """S[:, start : stop]ᵀ y."""
        check_vectors(y, self.shape[0], f"{self._name}.rmatvec")
        return apply(self.of, self.start, self.stop, True, y)

    @property
    def _name(self) -> str:
        whole = self.stop - self.start == self.of.n
        return type(self.of).__name__ + ("" if whole else f".columns({self.start}, {self.stop})")
