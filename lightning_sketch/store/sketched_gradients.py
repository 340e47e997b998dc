"""Sketched gradients with what is known of each: the rows that stores hold and questions are asked of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_sketch.operators.sketch import Sketch

STAGES = ("fit", "validate", "test", "predict", "queries")
"""Where a row comes from: an optimizer step; an example at a checkpoint; a validation example while training."""

UNKNOWN_ID = -1

DEFAULTS: dict[str, int | float | bool] = {
    "example_id": UNKNOWN_ID,
    "stage": STAGES.index("predict"),
    "step": 0,
    "epoch": 0,
    "lr": float("nan"),
    "loss": float("nan"),
    "prob_true": float("nan"),
    "fingerprint": 0,
    "rank": 0,
    "padded": False,
    "finite": True,
}
"""The columns that every row has, with what stands for "not known".

example_id    the user's number of the example
stage         index into STAGES
step          optimizer steps done when the row's own step was done, or when the checkpoint was taken
epoch
lr            learning rate of the step; of the checkpoint, that of its last step
loss          loss of the example, or mean loss of the step
prob_true     probability that the model gives to the example's true label
fingerprint   of the weights that the gradient was taken at; 0: not known
rank          process that wrote it
padded        a copy that a distributed sampler added to even out the ranks
finite        False: the gradient had an inf or NaN, the step was skipped, the sketch is zero
"""


@dataclass(frozen=True, eq=False)
class SketchedGradients:
    """One sketched gradient per row, and columns of the same length.

    Args:
        sketches: (rows, dim), in any floating type.
        sketch: the map that made them.
        columns: tensors with a value per row; those of `DEFAULTS` that are missing are filled in.

    Raises:
        ValueError: if lengths disagree, or the sketches have another width than the sketch gives.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.eye(4), BlockSRHT(100, 4), {"example_id": torch.arange(4)})
    >>> len(rows), rows.where(example_id=2).sketches
    (4, tensor([[0., 0., 1., 0.]]))
    """

    sketches: Float[Tensor, "rows dim"]
    sketch: Sketch
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        count, dim = self.sketches.shape
        if dim != self.sketch.dim:
            raise ValueError(f"sketches have {dim} numbers a row, {self.sketch} gives {self.sketch.dim}.")
        columns = {name: torch.full((count,), value) for name, value in DEFAULTS.items() if name not in self.columns}
        columns |= self.columns
        for name, column in columns.items():
            if len(column) != count:
                raise ValueError(f"column {name} has {len(column)} values for {count} rows.")
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        return len(self.sketches)

    def __repr__(self) -> str:
        return f"SketchedGradients: {described(self.columns, self.sketches.dtype, self.sketch)}"

    def __getattr__(self, name: str) -> Tensor:
        columns = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"{type(self).__name__} has no attribute and no column {name!r}")
        return columns[name]

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self.sketch.dim

    @property
    def fingerprint(self) -> int:
        """Of the weights that all rows were taken at.

        Raises:
            ValueError: if they were taken at different ones.
        """
        found = self.columns["fingerprint"].unique().tolist()
        if len(found) > 1:
            raise ValueError(
                f"the rows were taken at {len(found)} different weights; choose with .where(fingerprint=...)."
            )
        return found[0] if found else 0

    def metadata(self) -> dict[str, Tensor]:
        """The columns."""
        return dict(self.columns)

    def where(self, mask: Tensor | None = None, **equal: Any) -> "SketchedGradients":
        """The rows where the mask is true and columns have these values; a stage goes by its name."""
        keep = matching(self.columns, len(self), mask, equal)
        if keep.all():
            return self
        return SketchedGradients(self.sketches[keep], self.sketch, {k: v[keep] for k, v in self.columns.items()})

    def blocks(self, batch_rows: int = 4096) -> Iterator["SketchedGradients"]:
        """The rows in order, at most so many at a time."""
        for start in range(0, len(self), batch_rows):
            part = slice(start, start + batch_rows)
            yield SketchedGradients(self.sketches[part], self.sketch, {k: v[part] for k, v in self.columns.items()})

    @staticmethod
    def cat(parts: "list[SketchedGradients]") -> "SketchedGradients":
        """All rows of the parts, in order; where a part lacks a column its values are unknown."""
        columns = cat_columns([part.columns for part in parts])
        return SketchedGradients(torch.cat([part.sketches for part in parts]), parts[0].sketch, columns)


def described(columns: Mapping[str, Tensor], dtype: torch.dtype, sketch: Sketch) -> str:
    """Return what rows are, in a line or two: how many, by which sketch, from which stages, with what known of them."""
    stages = columns["stage"]
    counts = ", ".join(f"{STAGES[i]} {int((stages == i).sum())}" for i in stages.unique().tolist())
    known = [name for name, column in columns.items() if not _is_default(name, column)]
    return (
        f"{len(stages)} rows of {sketch.dim} numbers ({str(dtype).removeprefix('torch.')}) by {sketch}"
        + (f"; {counts}" if counts else "")
        + (f"\n    columns with values: {', '.join(known)}" if known else "")
    )


def _is_default(name: str, column: Tensor) -> bool:
    """Whether a column says nothing of any row."""
    if name not in DEFAULTS or name == "stage":
        return name == "stage"
    default = DEFAULTS[name]
    return bool(column.isnan().all() if default != default else (column == default).all())


def cat_columns(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One below the other; what a part lacks is unknown there, and lists of ids are filled up to the longest."""
    columns = {}
    for name, like in {name: column for part in parts for name, column in part.items()}.items():
        tensors = [part[name] if name in part else _unknown(like, len(part["step"])) for part in parts]
        if like.ndim == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(tensor, (0, width - tensor.shape[1]), value=UNKNOWN_ID) for tensor in tensors]
        columns[name] = torch.cat(tensors)
    return columns


def _unknown(like: Tensor, count: int) -> Tensor:
    """So many values of a column that say nothing: -1, NaN, False."""
    value = torch.nan if like.is_floating_point() else False if like.dtype == torch.bool else UNKNOWN_ID
    return like.new_full((count, *like.shape[1:]), value)


def matching(columns: Mapping[str, Tensor], count: int, mask: Tensor | None, equal: Mapping[str, Any]) -> Tensor:
    """Which of `count` rows have these values, as booleans.

    Raises:
        ValueError: if a column or a stage is not known.
    """
    keep = torch.ones(count, dtype=torch.bool) if mask is None else mask.clone()
    for name, value in equal.items():
        if name not in columns:
            raise ValueError(f"no column {name!r}; there are {', '.join(columns)}.")
        if name == "stage" and isinstance(value, str):
            if value not in STAGES:
                raise ValueError(f"no stage {value!r}; use one of {', '.join(STAGES)}.")
            value = STAGES.index(value)
        keep &= columns[name] == value
    return keep


@runtime_checkable
class RowSource(Protocol):
    """Sketched gradients, in memory or on disk."""

    @property
    def sketch(self) -> Sketch:
        """The map that made the rows."""

    def __len__(self) -> int:
        """How many rows there are."""

    def metadata(self) -> dict[str, Tensor]:
        """The columns, without touching the sketches."""

    def where(self, mask: Tensor | None = None, **equal: Any) -> "RowSource":
        """The rows where the mask is true and columns have these values, in their order."""

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """The rows in order, at most so many at a time."""
