"""What every linear map in this package can do: `matvec`, `rmatvec`, `.T`, `@`, `+`, `-`, `*`, `to_scipy`."""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class LinearOperator(ABC):
    """A linear map A: R^n -> R^m that is never stored as a matrix.

    A subclass gives `shape`, `matvec` and `rmatvec`.
    """

    dtype: torch.dtype = torch.float32
    """What a vector made for it should be, where that is not left to the caller."""
    device: torch.device = torch.device("cpu")
    """Where a vector made for it should be, likewise."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): output size, input size."""

    @abstractmethod
    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A x for each vector along the last axis."""

    @abstractmethod
    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ y for each vector along the last axis."""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Promise that what the map depends on stays as it is, so that products can share work."""
        yield

    @property
    def T(self) -> "LinearOperator":
        """The adjoint, Aᵀ."""
        return Transposed(self)

    __array_ufunc__ = None  # so that a NumPy number on the left leaves the product to __rmul__

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
        return self if isinstance(left, int) and left == 0 else NotImplemented  # as sum() begins

    def to_scipy(self) -> Any:
        """Return this map as a `scipy.sparse.linalg.LinearOperator`, for `eigsh`, `cg`, `expm_multiply` and the like.

        Vectors are NumPy's, in float64 if `dtype` is, else in float32; products run on `device`.

        Raises:
            ImportError: if SciPy is not installed.

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

        def on_numpy(product):
            """Of a vector, or of the columns of a matrix."""

            def multiply(x):
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

    def as_matrix(self, **factory) -> Float[Tensor, "m n"]:
        """Return the dense matrix, m·n numbers, for small problems; `dtype` and `device` as in `torch.eye`."""
        return self.matvec(torch.eye(self.shape[1], **{"dtype": self.dtype, "device": self.device, **factory})).T


class OfOne(LinearOperator):
    """What is made of one operator A, `of`: for vectors of its type, where it is."""

    of: LinearOperator

    @property
    def dtype(self) -> torch.dtype:
        """That of A."""
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        """That of A."""
        return self.of.device

    def hold(self) -> AbstractContextManager[None]:
        """Hold A."""
        return self.of.hold()


class OfTwo(LinearOperator):
    """What is made of two operators, `left` and `right`."""

    left: LinearOperator
    right: LinearOperator

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two."""
        return torch.promote_types(self.left.dtype, self.right.dtype)

    @property
    def device(self) -> torch.device:
        """That of the one which is not on the CPU, if there is one."""
        return self.right.device if self.left.device.type == "cpu" else self.left.device

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold both."""
        with self.left.hold(), self.right.hold():
            yield


@dataclass(frozen=True)
class Transposed(OfOne):
    """Aᵀ."""

    of: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) where A has (m, n)."""
        return self.of.shape[::-1]

    def matvec(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ x."""
        return self.of.rmatvec(x)

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A y."""
        return self.of.matvec(y)

    @property
    def T(self) -> LinearOperator:
        """A itself."""
        return self.of


@dataclass(frozen=True)
class Scaled(OfOne):
    """c A, for a number c."""

    factor: float
    of: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        """That of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return c (A x)."""
        return self.factor * self.of.matvec(x)

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return c (Aᵀ y)."""
        return self.factor * self.of.rmatvec(y)


@dataclass(frozen=True)
class Composed(OfTwo):
    """A B: first B, then A.

    Raises:
        ValueError: if A takes vectors of another size than B gives.
    """

    left: LinearOperator
    right: LinearOperator

    def __post_init__(self):
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"cannot compose {self.left.shape} with {self.right.shape}: the left operator takes "
                f"vectors of size {self.left.shape[1]}, the right one gives size {self.right.shape[0]}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of A, columns of B."""
        return self.left.shape[0], self.right.shape[1]

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A (B x)."""
        return self.left.matvec(self.right.matvec(x))

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Bᵀ (Aᵀ y)."""
        return self.right.rmatvec(self.left.rmatvec(y))


@dataclass(frozen=True)
class Sum(OfTwo):
    """A + B.

    Raises:
        ValueError: if their shapes differ.
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
        """That of both."""
        return self.left.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return A x + B x."""
        return self.left.matvec(x) + self.right.matvec(x)

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return Aᵀ y + Bᵀ y."""
        return self.left.rmatvec(y) + self.right.rmatvec(y)


def check_vectors(x: Tensor, size: int, what: str) -> None:
    """Refuse what is not a real floating-point tensor with `size` numbers along its last axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} takes a torch tensor, got {type(x).__name__}; use torch.as_tensor.")
    if not x.is_floating_point():
        way_out = "sketch real and imaginary parts apart" if x.is_complex() else "convert it with .float()"
        raise TypeError(f"{what} takes real floating-point numbers, got {x.dtype}; {way_out}.")
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(
            f"{what} takes vectors of size {size} along the last axis, got shape {tuple(x.shape)}; "
            f"move that axis last, or build an operator of the right size."
        )
