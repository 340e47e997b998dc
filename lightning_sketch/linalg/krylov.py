"""Records of Lanczos runs on one operator: sketched vectors and tridiagonal matrices, nothing of size n."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.lanczos import lanczos, start_vector
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.operators.space import VectorSpace

NOT_FINITE = (
    "a product with the operator is NaN or infinite, though its vector is finite; look at what the operator computes, "
    "or use float64."
)

_SHOWN = 8  # runs in a repr


@dataclass
class SketchedRun:
    """The record of one Lanczos run of m products.

    Attributes:
        columns: S v_1 ... S v_{m+1}, each (dim,), in float64 on the CPU.
        alpha: α_1 ... α_m.
        beta: β_1 ... β_m.
        dots: v_1ᵀ g ... v_{m+1}ᵀ g, if a gradient g was given; else empty.
        errors: About how large the errors are of A v_1 ... A v_m, beyond rounding.
    """

    columns: list[Float[Tensor, " dim"]]
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)
    dots: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"SketchedRun of {len(self.alpha)} products, {len(self.columns)} vectors of {self._size:,} numbers"

    @property
    def _size(self) -> int:
        """The size of the sketched vectors, 0 before the first one."""
        return len(self.columns[0]) if self.columns else 0

    def basis(self) -> Float[Tensor, "dim m"]:
        """Return S V_m."""
        return torch.stack(self.columns[:-1], dim=1)

    def image(self) -> Float[Tensor, "dim m"]:
        """Return S A V_m, which is S V_{m+1} T̄_m."""
        m = len(self.alpha)
        below = torch.zeros(1, m, dtype=torch.float64)
        below[0, -1] = self.beta[-1]
        return torch.stack(self.columns, dim=1) @ torch.cat([self.tridiagonal(m), below])

    def tridiagonal(self, m: int) -> Float[Tensor, "m m"]:
        """Return T_m, the leading m x m part of the tridiagonal matrix."""
        matrix = torch.diag(torch.tensor(self.alpha[:m], dtype=torch.float64))
        off = torch.tensor(self.beta[: m - 1], dtype=torch.float64)
        return matrix + off.diag(1) + off.diag(-1) if m > 1 else matrix


@dataclass(frozen=True, eq=False)
class Krylov:
    """The Lanczos runs on one operator, each from its own start vector.

    Attributes:
        seed: The seed of the start vectors; run i starts from `start_vector(operator, seed, name=f"{i}")`.
        sketch: The sketch S of the Lanczos vectors; None if the vectors themselves are kept.
        runs: The records of the runs.
    """

    seed: int
    sketch: Sketch | None
    runs: list[SketchedRun] = field(default_factory=list)

    def __repr__(self) -> str:
        products = [str(len(run.alpha)) for run in self.runs]
        listed = ", ".join(products[:_SHOWN] + ["..."] * (len(products) > _SHOWN)) or "no"
        by = "vectors kept whole" if self.sketch is None else f"vectors sketched by {self.sketch}"
        runs = f"{len(products)} run{'s' if len(products) != 1 else ''}"
        return f"Krylov: {runs} of {listed} products, seed {self.seed}, {by}"

    def grow(
        self, operator: LinearOperator, gradient: Float[Tensor, " n"] | None = None
    ) -> Iterator[Float[Tensor, " n"]]:
        """Yield v_2, v_3, ... of a run from a new start vector, and record their sketches.

        Args:
            operator: The operator of all runs.
            gradient: A vector whose products with the v_j are recorded too.

        Raises:
            ValueError: If a product is not finite.
        """
        start, space = len(self.runs), operator.space
        self.runs.append(run := SketchedRun([]))
        self._record(run, space, start_vector(operator, self.seed, name=f"{start}"), gradient)
        for v, alpha, beta in lanczos(operator, self.seed, start=start):
            if not (alpha == alpha and beta < float("inf")):
                raise ValueError(NOT_FINITE)
            self._record(run, space, v, gradient)
            error = operator.last_error()
            run.errors.append(0.0 if error is None else space.norm(error))
            run.alpha.append(alpha)
            run.beta.append(beta)
            yield v

    def _record(
        self, run: SketchedRun, space: VectorSpace, v: Float[Tensor, " n"], gradient: Float[Tensor, " n"] | None
    ) -> None:
        run.columns.append(space.sketched(self.sketch, v))
        if gradient is not None:
            run.dots.append(space.dot(v, gradient))

    @property
    def num_products(self) -> int:
        """The number of products of all runs together."""
        return sum(len(run.alpha) for run in self.runs)
