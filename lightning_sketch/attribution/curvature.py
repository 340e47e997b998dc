"""Curvature of the loss in sketch space, averaged over examples, and how noisy that average is.

    A = (1/n) sum_i B_i,    B_i = sum_r r rᵀ over the rows r of example i

kind      rows of an example                                           how many
ggn       sqrt(p_c) S (J_c - sum_k p_k J_k), see `ggn`                 one for each class
margin    g sqrt(p / (1 - p))                                          one
fisher    g                                                            one
trak      g / (1 - p)                                                  one

g, p      sketched gradient of the example's loss; probability that the model gives to its true label
b²        (mean |B_i|² - |A|²) / n, Frobenius norms: what A of a random half of the examples is expected to be off by
t_i       tr B_i; (sum t_i)² / sum t_i² is the effective number of examples that carry A

For two classes margin is ggn: the gradients of both logits lie on one line. All in float64. Memory: dim x dim, or
rows x dim while there are fewer rows than dim.

Source: Park et al. (2023), "TRAK", arXiv:2303.14186, for trak; Ledoit and Wolf (2004), "A well-conditioned estimator
for large-dimensional covariance matrices", doi:10.1016/S0047-259X(03)00096-4, for b².
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_sketch._files import commit

FROM_ROWS = ("margin", "fisher", "trak")
KINDS = ("ggn", *FROM_ROWS)


@dataclass(frozen=True, eq=False)
class Curvature:
    """A, as itself or by its root: A = rootᵀ root.

    Args:
        kind: see the module.
        fingerprint: of the weights that it was taken at; 0 if not known.
        examples: n.
        matrix: A, if it was formed.
        root: rows / sqrt(n), where there are fewer rows than dim.
        mean_square: mean |B_i|².
        effective_samples: how many examples carry A, at most n.
    """

    kind: str
    fingerprint: int
    examples: int
    mean_square: float
    effective_samples: float
    matrix: Float[Tensor, "dim dim"] | None = None
    root: Float[Tensor, "rows dim"] | None = None
    trace: float = field(init=False)
    trace_of_square: float = field(init=False)

    def __post_init__(self):
        small = self.root @ self.root.T if self.matrix is None else self.matrix  # same trace, same trace of square
        object.__setattr__(self, "trace", float(small.trace()))
        object.__setattr__(self, "trace_of_square", float(small.square().sum()))

    @property
    def dim(self) -> int:
        """Numbers in a sketch."""
        return (self.root if self.matrix is None else self.matrix).shape[1]

    @property
    def half_noise(self) -> float:
        """b²."""
        return max(0.0, self.mean_square - self.trace_of_square) / self.examples

    def dense(self) -> Float[Tensor, "dim dim"]:
        """A as a matrix."""
        return self.root.T @ self.root if self.matrix is None else self.matrix

    def save(self, folder: str | Path) -> Path:
        """Write it into a folder, named by kind and fingerprint; whole or not at all."""
        path = _path(Path(folder), self.kind, self.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        name = "root" if self.matrix is None else "matrix"
        numbers = {"examples": self.examples, "mean_square": self.mean_square}
        numbers |= {"effective_samples": self.effective_samples}
        told = {"kind": self.kind, "fingerprint": str(self.fingerprint), **{k: repr(v) for k, v in numbers.items()}}
        commit(path, save({name: getattr(self, name).contiguous()}, told))
        return path

    @classmethod
    def load(cls, folder: str | Path, kind: str, fingerprint: int) -> "Curvature":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is none of this kind at these weights.
        """
        path = _path(Path(folder), kind, fingerprint)
        if not path.exists():
            raise FileNotFoundError(f"no curvature {kind!r} at weights {fingerprint} in {folder}; fit it first.")
        with safe_open(path, "pt") as file:
            told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        return cls(
            kind, fingerprint, int(told["examples"]), *map(float, (told["mean_square"], told["effective_samples"])),
            **tensors,
        )  # fmt: skip


class CurvatureSum:
    """Collects the rows of examples; gives their `Curvature` at the end.

    >>> total = CurvatureSum(2)
    >>> total.add(torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]))  # two examples of one row
    >>> total.curvature("fisher").dense()
    tensor([[2., 0.], [0., 0.]], dtype=torch.float64)
    """

    def __init__(self, dim: int):
        self.dim, self.examples = dim, 0
        self._kept: list[Tensor] = []
        self._matrix: Tensor | None = None
        self._mean_square = self._traces = self._squared_traces = 0.0

    def add(self, rows: Float[Tensor, "examples rows dim"]) -> None:
        """Add examples, with as many rows for each; rows of zeros count nothing. O(examples rows dim²)."""
        rows = rows.detach().double()
        grams = torch.linalg.matmul(rows, rows.mT)
        traces = grams.diagonal(dim1=1, dim2=2).sum(1)
        self.examples += len(rows)
        self._mean_square += float(grams.square().sum())
        self._traces += float(traces.sum())
        self._squared_traces += float(traces.square().sum())
        self._take(rows.flatten(0, 1))

    def curvature(self, kind: str, fingerprint: int = 0) -> Curvature:
        """What was collected.

        Raises:
            ValueError: if that is nothing, or not finite.
        """
        if not self._traces < float("inf") or self._traces == 0:
            what = "zero" if self._traces == 0 else "not finite"
            raise ValueError(f"the curvature of {self.examples} examples is {what}; look at their gradients.")
        n, matrix = self.examples, self._matrix
        form = {"root": torch.cat(self._kept) / n**0.5} if matrix is None else {"matrix": matrix / n}
        effective = self._traces**2 / self._squared_traces
        return Curvature(kind, fingerprint, n, self._mean_square / n, effective, **form)

    def _take(self, rows: Float[Tensor, "rows dim"]) -> None:
        if self._matrix is None:
            self._kept.append(rows)
            if sum(map(len, self._kept)) < self.dim:
                return
            rows, self._kept = torch.cat(self._kept), []
            self._matrix = rows.new_zeros(self.dim, self.dim)
        self._matrix.addmm_(rows.T, rows)


def _path(folder: Path, kind: str, fingerprint: int) -> Path:
    return folder / f"{kind}_{fingerprint % (1 << 64):016x}.safetensors"
