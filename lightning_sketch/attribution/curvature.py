"""The curvature matrix of the loss in sketch space, how noisy it is, and its damped inverse.

    A = (1/n) sum_i B_i,    B_i = sum_r r rᵀ over the rows r of example i

kind      rows of an example                                           how many
ggn       sqrt(p_c) S (J_c - sum_k p_k J_k), see `ggn`                 one for each class
margin    g sqrt(p / (1 - p))                                          one
fisher    g                                                            one
trak      g / (1 - p)                                                  one

g, p      sketched gradient of the example's loss; probability that the model gives to its true label
b²        (mean |B_i|² - |A|²) / n, Frobenius norms: expected squared error of A from a random half of the examples
t_i       tr B_i; (sum t_i)² / sum t_i² is the effective number of examples that carry A

For two classes margin is ggn: the gradients of both logits lie on one line. All in float64. Memory: dim x dim, or
rows x dim as long as there are fewer rows than dim.

(A + lambda I) x = q is solved, with a damping lambda that is never zero,

A as a matrix        by its eigenvectors, computed once for all dampings; above dim 1024, where eigenvectors take
                     minutes, by a Cholesky factor for each damping
A = Rᵀ R, R small    (q - Rᵀ (R Rᵀ + lambda I)⁻¹ R q) / lambda: a system of as many equations as there are rows

The automatic damping is large enough that neither the noise of few examples nor that of the sketch is inverted:

    lambda = max(0.01 e, kappa b² / tr A max(1, 15 p / dim)),    e = tr A² / tr A,    p = (tr A)² / tr A²

e      an energy-weighted mean eigenvalue; unlike tr A / dim it does not depend on the size of the sketch
b²     expected squared error of A from a random half of the examples, see `curvature`
kappa  0.3; 0.1 for the empirical Fisher
p      the effective dimension of A: that of as many equal eigenvalues

In units of e: c = lambda / e = max(0.01, kappa v max(1, 15 p / dim)) with v = b² / tr A². A sketch adds (tr A)² / dim
to tr A², which is p / dim of it, so that small eigenvalues are made of its errors where dim is not large beside p. For
an image classifier dim 256 is large (p = 11, few directions carry all), for a small language model dim 4096 hardly is
(p = 290). Form and factor are not derived but chosen by retraining on 17 problems: the automatic damping has .975 of
the LDS of the best damping on average and .88 at worst; without the factor .961 and .84.

A large v, or few effective examples, means that a few examples carry the curvature; how far they move a retrained model
cannot be known then from one model, and `calibrate` measures it. A large v of many effective examples means that these
all differ.

Source: Park et al. (2023), "TRAK", arXiv:2303.14186, for trak; Ledoit and Wolf (2004), "A well-conditioned estimator
for large-dimensional covariance matrices", doi:10.1016/S0047-259X(03)00096-4, for b².
"""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._files import CorruptFile, TensorFile, check_folder, check_place, write_tensors
from lightning_sketch.autodiff.fingerprint import short
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.store.format import store_id

# Curvatures that are made from the rows alone, and all.
RowKind = Literal["margin", "fisher", "trak"]
Kind = Literal["ggn", "margin", "fisher", "trak"]
# A number, "auto", or several numbers for a sweep.
Damping = float | int | Literal["auto"] | Sequence[float]

_EIGENVECTORS_UP_TO = 1024
_FLOOR, _FULL = 0.01, 15
_NOISY, _FEW = 0.5, 0.1


@dataclass(frozen=True, eq=False, kw_only=True)
class Curvature:
    """The curvature matrix A, stored as itself, or as its root where that is smaller: A = rootᵀ root.

    Attributes:
        kind: "ggn", "margin", "fisher" or "trak", see the module `attribution.curvature`.
        fingerprint: Fingerprint of the weights at which it was taken; 0 if unknown.
        preconditioner: The `id` of the preconditioner that the gradients went through before they were sketched, or 0.
        examples: The number of examples, n.
        mean_square: The mean over examples of the squared Frobenius norm, mean |B_i|².
        effective_samples: The effective number of examples that carry A, at most n.
        matrix: A, (dim, dim) in float64; None if the root is stored.
        root: The rows / sqrt(n), (rows, dim) in float64, if there are fewer rows than dim; else None.
        trace: The trace of A.
        trace_of_square: The trace of A², its squared Frobenius norm.

    Example::

        curvature = fit_ggn(module, batches, sketch, layout)
        curvature.save("curvature")
    """

    kind: Kind
    fingerprint: int
    examples: int
    mean_square: float
    effective_samples: float
    matrix: Float[Tensor, "dim dim"] | None = None
    root: Float[Tensor, "rows dim"] | None = None
    preconditioner: int = 0
    trace: float = field(init=False)
    trace_of_square: float = field(init=False)

    def __post_init__(self):
        small = self._stored if self.root is None else self.root @ self.root.T  # same trace, same trace of square
        object.__setattr__(self, "trace", float(small.trace()))
        object.__setattr__(self, "trace_of_square", float(small.square().sum()))

    def __repr__(self) -> str:
        stored = "" if self.root is None else f", stored as its {len(self.root)} x {self.dim} root"
        return (
            f"Curvature: {self.kind} of {self.examples} examples, {self.dim} x {self.dim}{stored}, trace "
            f"{self.trace:.4g}, {self.effective_samples:.1f} effective examples"
        )

    @property
    def dim(self) -> int:
        """The dimension of the sketches."""
        return self._stored.shape[1]

    @property
    def half_noise(self) -> float:
        """The expected squared error of A from a random half of the examples, b²."""
        return max(0.0, self.mean_square - self.trace_of_square) / self.examples

    @property
    def effective_dim(self) -> float:
        """The effective dimension of A, (tr A)² / tr A²: that of as many equal eigenvalues, at most `dim`."""
        return self.trace**2 / self.trace_of_square

    def dense(self) -> Float[Tensor, "dim dim"]:
        """Return A as a matrix."""
        return self._stored if self.root is None else self.root.T @ self.root

    @property
    def _stored(self) -> Tensor:
        """The matrix, or else the root."""
        return cast(Tensor, self.root if self.matrix is None else self.matrix)

    def save(self, folder: str | Path) -> Path:
        """Write the curvature into a folder, atomically, and return the file, named by kind and fingerprint.

        Raises:
            OSError: if the disk is full or the folder cannot be written.
        """
        path = _path(Path(folder), self.kind, self.fingerprint, self.preconditioner)
        name = "root" if self.matrix is None else "matrix"
        numbers = {"examples": self.examples, "mean_square": self.mean_square}
        numbers |= {"effective_samples": self.effective_samples}
        metadata = {"kind": self.kind, "fingerprint": str(self.fingerprint), **{k: repr(v) for k, v in numbers.items()}}
        metadata["preconditioner"] = str(self.preconditioner)
        metadata["store"] = store_id(path.absolute().parents[1])  # another store may have another sketch
        if metadata["store"]:
            check_folder(path.parent)  # a link would be written through
        write_tensors(path, {name: getattr(self, name)}, metadata)
        return path

    @classmethod
    def load(cls, folder: str | Path, kind: Kind, *, fingerprint: int, preconditioner: int = 0) -> "Curvature":
        """Read a curvature that `save` wrote.

        Args:
            folder: The folder that was given to `save`.
            kind: The kind of the curvature.
            fingerprint: Fingerprint of the weights at which it was taken.
            preconditioner: The `id` of its preconditioner, 0 for none.

        Raises:
            FileNotFoundError: if there is none of this kind at these weights.
            CorruptFile: if the file is not what was written.
        """
        path = _path(Path(folder), kind, fingerprint, preconditioner)
        if not path.exists():
            raise FileNotFoundError(
                f"no curvature {kind!r} at weights {short(fingerprint)} in {folder}; call "
                "store.fit_curvature(module, batches) first."
            )
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> "Curvature":
        """Read the curvature in a file whose name is that of its kind and fingerprint.

        Raises:
            CorruptFile: if the file is not what was written.
        """
        file = TensorFile(path, sealed=False)  # the first version wrote no checksum
        metadata, tensors = file.header, {name: file.tensor(name) for name in file.shapes}
        kind, fingerprint = cast(Kind, metadata.get("kind", "")), int(metadata.get("fingerprint", 0))
        preconditioner = int(metadata.get("preconditioner", 0))
        if path != _path(path.parent, kind, fingerprint, preconditioner):
            raise CorruptFile(f"{path} belongs elsewhere: it has {kind!r} at weights {fingerprint}; put it back there.")
        store = store_id(path.absolute().parents[1])
        check_place(path, {"store": metadata.get("store") or store}, {"store": store})
        file.check()
        return cls(
            kind=kind,
            fingerprint=fingerprint,
            preconditioner=preconditioner,
            examples=int(metadata["examples"]),
            mean_square=float(metadata["mean_square"]),
            effective_samples=float(metadata["effective_samples"]),
            **tensors,
        )


_TOGETHER = 2048  # rows whose products are summed in float32
_BLOCKS = 8  # by which a matrix is cut, since the products below its diagonal are those above


class CurvatureSum:
    """Accumulates the rows of examples into a `Curvature`.

    Args:
        dim: The dimension of the rows.
        single: Whether products are summed in float32, of 2048 rows, and these sums in float64. That takes half the
            time, with errors of 1e-7 of the diagonal.

    >>> total = CurvatureSum(2)
    >>> total.add(torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]))  # two examples of one row
    >>> total.curvature("fisher").dense()
    tensor([[2., 0.], [0., 0.]], dtype=torch.float64)
    """

    def __init__(self, dim: int, single: bool = False):
        self.dim, self.single, self.examples = dim, single, 0
        self._rows: list[Tensor] = []
        self._matrix: Tensor | None = None
        self._mean_square = self._traces = self._squared_traces = 0.0

    def add(self, rows: Float[Tensor, "examples rows dim"]) -> None:
        """Add examples, each with the same number of rows; rows of zeros add nothing to A. O(examples rows dim²)."""
        with full_precision(rows.device):
            self._add(rows.detach())

    def _add(self, rows: Float[Tensor, "examples rows dim"]) -> None:
        rows, size = _sized(rows) if self.single else (rows.double(), 1.0)
        if rows.shape[1] == 1:
            traces = torch.linalg.vector_norm(rows[:, 0], dim=1).double().square() * (size * size)
            squares = traces.square()
        else:
            grams = torch.linalg.matmul(rows.double(), rows.double().mT) * (size * size)
            traces, squares = grams.diagonal(dim1=1, dim2=2).sum(1), grams.square()
        self.examples += len(rows)
        self._mean_square += float(squares.sum())
        self._traces += float(traces.sum())
        self._squared_traces += float(traces.square().sum())
        self._accumulate(rows.flatten(0, 1), size)

    def curvature(self, kind: Kind, fingerprint: int = 0, preconditioner: int = 0) -> Curvature:
        """Return the curvature of the examples that were added.

        Raises:
            ValueError: if it is zero or not finite, or float64 cannot hold its squares.
        """
        if not self.examples:
            raise ValueError("a curvature of no examples; pass a list of batches, or a data loader.")
        if not self._traces < float("inf") or self._traces == 0:
            what = "zero" if self._traces == 0 else "not finite"
            raise ValueError(f"the curvature of {self.examples} examples is {what}; check their gradients.")
        if not 0 < self._mean_square < float("inf"):
            raise ValueError(
                f"the squares of the curvature of {self.examples} gradients with a mean square of "
                f"{self._traces / self.examples:.2g} are beyond the range of float64; scale the loss."
            )
        n, matrix = self.examples, self._matrix
        if matrix is None:
            form = {"root": torch.cat(self._rows) / n**0.5}
        else:
            form = {"matrix": (matrix.triu() + matrix.triu(1).T) / n}
        effective = self._traces**2 / self._squared_traces
        return Curvature(
            kind=kind,
            fingerprint=fingerprint,
            preconditioner=preconditioner,
            examples=n,
            mean_square=self._mean_square / n,
            effective_samples=effective,
            **form,
        )

    def _accumulate(self, rows: Float[Tensor, "rows dim"], size: float) -> None:
        """Keep the rows while they are fewer than dim, then add their outer products to the matrix's upper triangle."""
        if self._matrix is None:
            self._rows.append(rows.double() * size)
            if sum(map(len, self._rows)) < self.dim:
                return
            rows, self._rows = torch.cat(self._rows), []
            self._matrix = rows.new_zeros(self.dim, self.dim)
            rows, size = _sized(rows) if self.single else (rows, 1.0)
        for part in rows.split(_TOGETHER):
            self._add_outer(part, size * size)

    def _add_outer(self, rows: Float[Tensor, "rows dim"], scale: float) -> None:
        step = -(-self.dim // _BLOCKS)
        for start in range(0, self.dim, step):
            found = rows[:, start : start + step].T @ rows[:, start:]
            cast(Tensor, self._matrix)[start : start + step, start:].add_(found, alpha=scale)


def _sized(rows: Float[Tensor, "*rows dim"]) -> tuple[Float[Tensor, "*rows dim"], float]:
    """Return rows in float32 whose largest number is in [1, 2), so that float32 holds squares, and their size."""
    largest = float(torch.stack(rows.aminmax()).abs().max()) if rows.numel() else 0.0
    known = 0 < largest < math.inf
    size = 2.0 ** max(-1022 if rows.dtype == torch.float64 else -126, math.floor(math.log2(largest))) if known else 1.0
    return (rows / size).float(), size


class Influence:
    """The inverse of a damped curvature, (A + lambda I)⁻¹, as a function of vectors.

    Args:
        curvature: The curvature matrix A.
        damping: The damping lambda > 0; "auto" for the rule of the module `attribution.influence`; several for a sweep.

    Attributes:
        damping: The damping in use, or a tuple of several.
        noise: The relative noise of the curvature, v.
        effective_samples: The effective number of examples that carry the curvature.

    Raises:
        ValueError: if a damping is not positive, since noise would be inverted then.

    Warns:
        UserWarning: if "auto" is a guess, since few examples carry the curvature (less than a tenth, effectively), or
            since a random half of them has another curvature (v > 0.5).

    >>> total = CurvatureSum(2)
    >>> total.add(torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]))
    >>> inverse = Influence(total.curvature("fisher"), damping=1.0)
    >>> inverse(torch.tensor([[3.0, 1.0]]))
    tensor([[1., 1.]], dtype=torch.float64)
    >>> print(inverse)
    fisher of 2 examples, damping 1 (c = 0.5, v = 0.5, 1.0 effective examples)
    """

    def __init__(self, curvature: Curvature, damping: Damping = "auto"):
        self.curvature, measured = curvature, _Measures.of(curvature)
        self.noise, self.effective_samples, self._scale = measured.noise, measured.effective_samples, measured.scale
        if isinstance(damping, str):
            if damping != "auto":
                raise ValueError(f"damping={damping!r} is not known; use 'auto', a number, or several numbers.")
            damping = automatic(curvature)
            if measured.doubt:
                warnings.warn(
                    f"{measured.doubt}: v = {self.noise:.2g}, {self.effective_samples:.0f} effective of "
                    f"{curvature.examples} examples. The automatic damping {damping:.3g} is a guess; calibrate(...) "
                    "measures it with short trainings.",
                    stacklevel=2,
                )
        self.damping: float | tuple[float, ...] = (
            float(damping) if isinstance(damping, float | int) else tuple(map(float, damping))
        )
        wrong = [value for value in self._dampings if not 0 < value < float("inf")]
        if wrong or not self._dampings:
            raise ValueError(
                f"damping is a positive number, got {damping!r}; without damping the noise of the curvature would be "
                f"inverted. For comparison, 'auto' is {automatic(curvature):.3g} here."
            )

    @property
    def relative_damping(self) -> float | tuple[float, ...]:
        """The damping relative to the curvature, c = lambda / e, comparable between models and sketches."""
        relative = tuple(value / self._scale for value in self._dampings)
        return relative if isinstance(self.damping, tuple) else relative[0]

    def __call__(self, vectors: Float[Tensor, "q dim"]) -> Float[Tensor, "*dampings q dim"]:
        """Return (A + lambda I)⁻¹ times each row, in float64; several dampings are along a new first axis.

        Raises:
            ValueError: if a damping is so small that it is lost in rounding.
        """
        solved = torch.stack([self._solve(vectors.double(), value) for value in self._dampings])
        return solved if isinstance(self.damping, tuple) else solved[0]

    def __str__(self) -> str:
        ends = (min(self._dampings), max(self._dampings)) if len(self._dampings) > 1 else self._dampings
        damping, c = (" to ".join(f"{value / unit:.3g}" for value in ends) for unit in (1, self._scale))
        return (
            f"{self.curvature.kind} of {self.curvature.examples} examples, damping {damping} (c = {c}, "
            f"v = {self.noise:.3g}, {self.effective_samples:.1f} effective examples)"
        )

    def __repr__(self) -> str:
        return f"Influence: {self}"

    def log(self) -> None:
        """Log the curvature and the damping in use; a second time the same is not logged."""
        log_once(str(self))

    @property
    def _dampings(self) -> tuple[float, ...]:
        """The dampings as a tuple."""
        return self.damping if isinstance(self.damping, tuple) else (self.damping,)

    @cached_property
    def _symmetric(self) -> Float[Tensor, "m m"]:
        """The matrix A, or R Rᵀ if A is stored by its root."""
        root = self.curvature.root
        return self.curvature.dense() if root is None else root @ root.T

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues, none of them negative, and the eigenvectors of `_symmetric`."""
        values, vectors = torch.linalg.eigh(self._symmetric)
        return values.clamp(min=0), vectors

    def _solve(self, vectors: Float[Tensor, "q dim"], damping: float) -> Float[Tensor, "q dim"]:
        """Return (A + lambda I)⁻¹ times each row."""
        root = self.curvature.root
        if root is None:
            return self._solve_symmetric(vectors, damping)
        return (vectors - self._solve_symmetric(vectors @ root.T, damping) @ root) / damping

    def _solve_symmetric(self, vectors: Float[Tensor, "q m"], damping: float) -> Float[Tensor, "q m"]:
        """Return (M + lambda I)⁻¹ times each row, where M is `_symmetric`."""
        if len(self._symmetric) <= _EIGENVECTORS_UP_TO:
            values, basis = self._eigen
            return (vectors @ basis / (values + damping)) @ basis.T
        damped = self._symmetric.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise ValueError(
                f"damping={damping:.3g} is lost in rounding beside the curvature; 'auto' is "
                f"{automatic(self.curvature):.3g}."
            )
        return torch.cholesky_solve(vectors.T, factor).T


@cache
def log_once(text: str, level: int = logging.INFO) -> None:
    """Log a text, unless it was logged before."""
    log = logging.getLogger("lightning_sketch")
    if not log.hasHandlers():  # logging is not configured: print to stderr, as Lightning does
        log.addHandler(logging.StreamHandler())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
    log.log(level, text)


@dataclass(frozen=True)
class _Measures:
    """The numbers that determine the automatic damping.

    Args:
        scale: The energy-weighted mean eigenvalue, e.
        noise: The relative noise, v.
        fill: How far it fills the sketch, p / dim.
        effective_samples: The effective number of examples that carry the curvature.
        examples: The number of examples.
    """

    scale: float
    noise: float
    fill: float
    effective_samples: float
    examples: int

    @classmethod
    def of(cls, curvature: Curvature) -> "_Measures":
        """Compute them from the scalars of a curvature."""
        return cls(
            curvature.trace_of_square / curvature.trace,
            curvature.half_noise / curvature.trace_of_square,
            curvature.effective_dim / curvature.dim,
            curvature.effective_samples,
            curvature.examples,
        )

    @property
    def doubt(self) -> str:
        """Why an automatic damping is a guess, or nothing."""
        if self.effective_samples < _FEW * self.examples:
            return "few examples carry the curvature"
        return "the curvature is noisy, as all examples differ" if self.noise > _NOISY else ""


def automatic(curvature: Curvature) -> float:
    """Return the automatic damping, by the rule of this module.

    >>> total = CurvatureSum(2)
    >>> total.add(torch.eye(2)[:, None])  # A = I / 2, e = 1/2, b² = (1 - 1/2) / 2, p = 2, so lambda = 0.3 b² 15
    >>> round(automatic(total.curvature("ggn")), 6)
    1.125
    """
    measured, kappa = _Measures.of(curvature), 0.1 if curvature.kind == "fisher" else 0.3
    return max(_FLOOR, kappa * measured.noise * max(1, _FULL * measured.fill)) * measured.scale


def _path(folder: Path, kind: Kind, fingerprint: int, preconditioner: int) -> Path:
    made_at = [fingerprint, preconditioner] if preconditioner else [fingerprint]
    return folder / f"{'_'.join([kind, *(f'{id % (1 << 64):016x}' for id in made_at)])}.safetensors"
