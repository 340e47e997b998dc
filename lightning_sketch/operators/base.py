"""The base class of all linear maps of this package, and the maps that `.T`, `@`, `+`, `-` and `*` make of them."""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.space import VectorSpace


class LinearOperator(ABC):
    """A linear map A: R^n -> R^m that is never stored as a matrix.

    A subclass defines `shape`, `matvec` and `rmatvec`.

    Attributes:
        dtype: The type of the vectors that the package makes for this map: start vectors, columns of the identity.
        device: The device of those vectors.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The output size m and the input size n, as (m, n)."""

    @abstractmethod
    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A x for each vector x along the last axis."""

    @abstractmethod
    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ y for each vector y along the last axis."""

    @property
    def space(self) -> VectorSpace:
        """The vectors that this map takes; under shards this process has a part of each."""
        return VectorSpace(self.shape[1], self.dtype, self.device)

    def last_error(self) -> Float[Tensor, " m"] | None:
        """Return a vector about as long as the error of the last product; None if that is rounding."""
        return None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Share work between all products taken inside this context.

        The caller promises not to change inside what the map depends on, such as the parameters of a module.
        """
        yield

    @property
    def T(self) -> "LinearOperator":
        """The adjoint, Aᵀ."""
        return Transposed(self)

    __array_ufunc__ = None  # a NumPy number on the left then leaves the product to __rmul__

    def __matmul__(self, right: Any) -> Any:
        if isinstance(right, Tensor) and right.ndim in (1, 2):
            return self.matvec(right.mT).mT if right.ndim == 2 else self.matvec(right)
        return Composed(self, right) if isinstance(right, LinearOperator) else NotImplemented

    def __add__(self, right: Any) -> "LinearOperator":
        return Sum(self, right) if isinstance(right, LinearOperator) else NotImplemented

    def __sub__(self, right: Any) -> "LinearOperator":
        return Sum(self, -right) if isinstance(right, LinearOperator) else NotImplemented

    def __neg__(self) -> "LinearOperator":
        return -1 * self

    def __mul__(self, factor: Any) -> "LinearOperator":
        is_number = isinstance(factor, numbers.Real) or (isinstance(factor, Tensor) and factor.ndim == 0)
        return Scaled(float(factor), self) if is_number else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> "LinearOperator":
        return self * (1 / factor)

    def __radd__(self, left: Any) -> "LinearOperator":
        return self if isinstance(left, int) and left == 0 else NotImplemented  # sum() starts from 0

    def to_scipy(self) -> Any:
        """Return this map as a `scipy.sparse.linalg.LinearOperator`, for `eigsh`, `cg`, `expm_multiply` and the like.

        It takes and returns NumPy arrays, in float64 if `dtype` is float64, else in float32; products run on `device`.

        Raises:
            ImportError: If SciPy is not installed.

        >>> from lightning_sketch.operators import Gaussian
        >>> from scipy.sparse.linalg import svds
        >>> s = Gaussian(n=50, dim=4).to_scipy()
        >>> s.shape, svds(s, k=2, return_singular_vectors=False).shape
        ((4, 50), (2,))
        """
        try:
            from scipy.sparse.linalg import LinearOperator as ScipyOperator
        except ImportError as error:
            raise ImportError("to_scipy makes an operator of SciPy, which is missing; pip install scipy.") from error
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

        def on_numpy(product: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            """Wrap a product so that it takes a NumPy vector, or a matrix of column vectors."""

            def multiply(x: Any) -> Any:
                if x.dtype.kind == "c":
                    return multiply(x.real) + 1j * multiply(x.imag)
                rows = torch.as_tensor(x.T.copy(), dtype=dtype, device=self.device)
                return product(rows).detach().cpu().numpy().T

            return multiply

        forward, adjoint = on_numpy(self.matvec), on_numpy(self.rmatvec)
        return ScipyOperator(
            self.shape,
            matvec=lambda x: forward(x.reshape(-1)),
            rmatvec=lambda y: adjoint(y.reshape(-1)),
            matmat=forward,
            rmatmat=adjoint,
            dtype=str(dtype).removeprefix("torch."),
        )

    def as_matrix(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Float[Tensor, "m n"]:
        """Return the dense matrix, for small problems: n products and m·n numbers.

        Args:
            dtype: Type of the columns of the identity that the map is applied to; that of the map if None.
            device: Device of those columns; that of the map if None.

        >>> from lightning_sketch.operators import CountSketch
        >>> CountSketch(n=3, dim=3, seed=0).as_matrix(dtype=torch.float64).dtype
        torch.float64
        """
        dtype, device = dtype or self.dtype, device or self.device
        return self.matvec(torch.eye(self.shape[1], dtype=dtype, device=device)).T


class UnaryOperator(LinearOperator):
    """A map made of one operator A, with the type and the device of A.

    Attributes:
        of: The operator A.
    """

    of: LinearOperator

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # an attribute elsewhere, computed here
        """The type of vectors for A."""
        return self.of.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of vectors for A."""
        return self.of.device

    @property
    def space(self) -> VectorSpace:
        """The vectors that A takes."""
        return self.of.space

    def last_error(self) -> Float[Tensor, " m"] | None:
        """Return the error of the last product with A."""
        return self.of.last_error()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Share work between the products with A taken inside this context."""
        with self.of.hold():
            yield


class BinaryOperator(LinearOperator):
    """A map made of two operators, A and B.

    Attributes:
        left: The operator A.
        right: The operator B.
    """

    left: LinearOperator
    right: LinearOperator

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # an attribute elsewhere, computed here
        """The wider of the types of A and B."""
        return torch.promote_types(self.left.dtype, self.right.dtype)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of A, or that of B if A is on the CPU."""
        return self.right.device if self.left.device.type == "cpu" else self.left.device

    @property
    def space(self) -> VectorSpace:
        """The vectors that B takes, in the type and on the device of this map; those of A have its size in a sum."""
        space = self.right.space
        return space if space.sharded else super().space

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Share work between the products with A, and between those with B, taken inside this context."""
        with self.left.hold(), self.right.hold():
            yield


@dataclass(frozen=True)
class Transposed(UnaryOperator):
    """The adjoint Aᵀ of an operator.

    Args:
        of: The operator A.
    """

    of: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, m), where A has (m, n)."""
        return self.of.shape[::-1]

    def matvec(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ x."""
        return self.of.rmatvec(x)

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A y."""
        return self.of.matvec(y)

    @property
    def T(self) -> LinearOperator:
        """The operator A itself."""
        return self.of


@dataclass(frozen=True)
class Scaled(UnaryOperator):
    """The multiple c A of an operator.

    Args:
        factor: The number c.
        of: The operator A.
    """

    factor: float
    of: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return c (A x)."""
        return self.factor * self.of.matvec(x)

    def last_error(self) -> Float[Tensor, " m"] | None:
        """Return c times the error of the last product with A."""
        error = self.of.last_error()
        return None if error is None else self.factor * error

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return c (Aᵀ y)."""
        return self.factor * self.of.rmatvec(y)


@dataclass(frozen=True)
class Composed(BinaryOperator):
    """The product A B of two operators: B is applied first, then A.

    Args:
        left: The operator A.
        right: The operator B.

    Raises:
        ValueError: If A takes vectors of another size than B returns.
    """

    left: LinearOperator
    right: LinearOperator

    def __post_init__(self):
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"cannot compose {self.left.shape} with {self.right.shape}: the left operator takes "
                f"vectors of size {self.left.shape[1]}, the right one gives size {self.right.shape[0]}; build both for "
                "the same size, exchange them, or transpose one with .T."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows of A and of columns of B."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def space(self) -> VectorSpace:
        """The vectors that B takes.

        Raises:
            ValueError: If these are sharded.
        """
        space = super().space
        if space.sharded:
            raise ValueError(
                "products of sharded operators are not supported, since what one of them makes of the errors of the "
                "other is not known; use sums and multiples, or one operator."
            )
        return space

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A (B x)."""
        return self.left.matvec(self.right.matvec(x))

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Bᵀ (Aᵀ y)."""
        return self.right.rmatvec(self.left.rmatvec(y))


@dataclass(frozen=True)
class Sum(BinaryOperator):
    """The sum A + B of two operators.

    Args:
        left: The operator A.
        right: The operator B.

    Raises:
        ValueError: If their shapes differ.
    """

    left: LinearOperator
    right: LinearOperator

    def __post_init__(self):
        if self.left.shape != self.right.shape:
            raise ValueError(
                f"cannot add operators of shapes {self.left.shape} and {self.right.shape}; build both for the same "
                "input and output size."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape that A and B share."""
        return self.left.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A x + B x."""
        return self.left.matvec(x) + self.right.matvec(x)

    def last_error(self) -> Float[Tensor, " m"] | None:
        """Return the sum of the errors of the last products with A and with B, by their sizes."""
        errors = [error.abs() for error in (self.left.last_error(), self.right.last_error()) if error is not None]
        return sum(errors[1:], errors[0]) if errors else None

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ y + Bᵀ y."""
        return self.left.rmatvec(y) + self.right.rmatvec(y)


def check_vectors(x: Tensor, size: int, what: str) -> None:
    """Refuse what is not a real floating-point tensor with `size` numbers along its last axis.

    Args:
        x: The argument to check.
        size: The number of entries of a vector.
        what: The name of the method that was called, for the message.

    Raises:
        TypeError: If x is no tensor, or holds integers, booleans or complex numbers.
        ValueError: If its last axis has another size.
    """
    if not isinstance(x, Tensor):
        way_out = "use torch.as_tensor"
        if isinstance(x, Iterable) and not hasattr(x, "__array__"):
            way_out += ", or torch.nn.utils.parameters_to_vector for several tensors"
        raise TypeError(f"{what} takes a torch tensor, got {type(x).__name__}; {way_out}.")
    if not x.is_floating_point():
        way_out = "sketch real and imaginary parts apart" if x.is_complex() else "convert it with .float()"
        raise TypeError(f"{what} takes real floating-point numbers, got {x.dtype}; {way_out}.")
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(
            f"{what} takes vectors of size {size} along the last axis, got shape {tuple(x.shape)}; "
            f"move that axis last, or build an operator of the right size."
        )
