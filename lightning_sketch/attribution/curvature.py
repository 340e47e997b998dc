"""The curvature matrix of the loss in sketch space, a mean over examples, and how noisy this mean is.

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

Source: Park et al. (2023), "TRAK", arXiv:2303.14186, for trak; Ledoit and Wolf (2004), "A well-conditioned estimator
for large-dimensional covariance matrices", doi:10.1016/S0047-259X(03)00096-4, for b².
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._files import CorruptFile, check_folder, check_place
from lightning_sketch._tensor_file import TensorFile, write_tensors
from lightning_sketch.store.format import store_id

# Curvatures that are made from the rows alone, and all.
RowKind = Literal["margin", "fisher", "trak"]
Kind = Literal["ggn", "margin", "fisher", "trak"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Curvature:
    """The curvature matrix A, stored as itself, or as its root where that is smaller: A = rootᵀ root.

    Attributes:
        kind: "ggn", "margin", "fisher" or "trak", see the module `attribution.curvature`.
        fingerprint: Fingerprint of the weights at which it was taken; 0 if unknown.
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
        path = _path(Path(folder), self.kind, self.fingerprint)
        name = "root" if self.matrix is None else "matrix"
        numbers = {"examples": self.examples, "mean_square": self.mean_square}
        numbers |= {"effective_samples": self.effective_samples}
        metadata = {"kind": self.kind, "fingerprint": str(self.fingerprint), **{k: repr(v) for k, v in numbers.items()}}
        metadata["store"] = store_id(path.absolute().parents[1])  # another store may have another sketch
        if metadata["store"]:
            check_folder(path.parent)  # a link would be written through
        write_tensors(path, {name: getattr(self, name)}, metadata)
        return path

    @classmethod
    def load(cls, folder: str | Path, kind: Kind, *, fingerprint: int) -> "Curvature":
        """Read a curvature that `save` wrote.

        Args:
            folder: The folder that was given to `save`.
            kind: The kind of the curvature.
            fingerprint: Fingerprint of the weights at which it was taken.

        Raises:
            FileNotFoundError: if there is none of this kind at these weights.
            CorruptFile: if the file is not what was written.
        """
        path = _path(Path(folder), kind, fingerprint)
        if not path.exists():
            raise FileNotFoundError(
                f"no curvature {kind!r} at weights {fingerprint} in {folder}; call "
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
        if path != _path(path.parent, kind, fingerprint):
            raise CorruptFile(f"{path} belongs elsewhere: it has {kind!r} at weights {fingerprint}; put it back there.")
        store = store_id(path.absolute().parents[1])
        check_place(path, {"store": metadata.get("store") or store}, {"store": store})
        file.check()
        return cls(
            kind=kind,
            fingerprint=fingerprint,
            examples=int(metadata["examples"]),
            mean_square=float(metadata["mean_square"]),
            effective_samples=float(metadata["effective_samples"]),
            **tensors,
        )


class CurvatureSum:
    """Accumulates the rows of examples into a `Curvature`.

    Args:
        dim: The dimension of the rows.

    >>> total = CurvatureSum(2)
    >>> total.add(torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]))  # two examples of one row
    >>> total.curvature("fisher").dense()
    tensor([[2., 0.], [0., 0.]], dtype=torch.float64)
    """

    def __init__(self, dim: int):
        self.dim, self.examples = dim, 0
        self._rows: list[Tensor] = []
        self._matrix: Tensor | None = None
        self._mean_square = self._traces = self._squared_traces = 0.0

    def add(self, rows: Float[Tensor, "examples rows dim"]) -> None:
        """Add examples, each with the same number of rows; rows of zeros add nothing to A. O(examples rows dim²)."""
        rows = rows.detach().double()
        grams = torch.linalg.matmul(rows, rows.mT)
        traces = grams.diagonal(dim1=1, dim2=2).sum(1)
        self.examples += len(rows)
        self._mean_square += float(grams.square().sum())
        self._traces += float(traces.sum())
        self._squared_traces += float(traces.square().sum())
        self._accumulate(rows.flatten(0, 1))

    def curvature(self, kind: Kind, fingerprint: int = 0) -> Curvature:
        """Return the curvature of the examples that were added.

        Raises:
            ValueError: if it is zero or not finite.
        """
        if not self._traces < float("inf") or self._traces == 0:
            what = "zero" if self._traces == 0 else "not finite"
            raise ValueError(f"the curvature of {self.examples} examples is {what}; check their gradients.")
        n, matrix = self.examples, self._matrix
        form = {"root": torch.cat(self._rows) / n**0.5} if matrix is None else {"matrix": matrix / n}
        effective = self._traces**2 / self._squared_traces
        return Curvature(
            kind=kind,
            fingerprint=fingerprint,
            examples=n,
            mean_square=self._mean_square / n,
            effective_samples=effective,
            **form,
        )

    def _accumulate(self, rows: Float[Tensor, "rows dim"]) -> None:
        """Keep the rows while they are fewer than dim, then add their outer products to the matrix."""
        if self._matrix is None:
            self._rows.append(rows)
            if sum(map(len, self._rows)) < self.dim:
                return
            rows, self._rows = torch.cat(self._rows), []
            self._matrix = rows.new_zeros(self.dim, self.dim)
        self._matrix.addmm_(rows.T, rows)


def _path(folder: Path, kind: Kind, fingerprint: int) -> Path:
    return folder / f"{kind}_{fingerprint % (1 << 64):016x}.safetensors"
