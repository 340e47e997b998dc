"""In-memory table of sketched gradients: one row per gradient, with columns such as its step, example and loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_sketch.operators.sketch import Sketch

# Where a row comes from: "fit" from training; "validate", "test" and "predict" from an example at a checkpoint;
# "queries" from a validation example during training.
Stage = Literal["fit", "validate", "test", "predict", "queries"]
STAGES: tuple[Stage, ...] = get_args(Stage)

UNKNOWN_ID = -1

# The columns of every row, with the value that means "unknown":
#
#     example_id    the user's number of the example
#     stage         index into STAGES
#     step          optimizer steps done, counting the row's own step; or when the checkpoint was saved
#     epoch
#     lr            learning rate of the step; at a checkpoint, that of its last step
#     loss          loss of the example, or mean loss of the step
#     prob_true     probability that the model gives to the example's true label
#     fingerprint   hash of the weights at which the gradient was taken; 0 if unknown
#     rank          rank of the process that wrote the row
#     padded        True for a duplicate that a distributed sampler added to even out the ranks
#     finite        False if the gradient had an inf or NaN: the step was skipped and the sketch is zero
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


@dataclass(frozen=True, eq=False)
class SketchedGradients:
    """A table of sketched gradients: one row per gradient, and columns of the same length.

    Each column is also an attribute: `rows.loss` is `rows.columns["loss"]`.

    Args:
        sketches: The sketched gradients, (rows, dim), in any floating-point type.
        sketch: The sketch that made them.
        columns: Tensors with one value per row. Missing ones of `example_id`, `stage`, `step`, `epoch`, `lr`, `loss`,
            `prob_true`, `fingerprint`, `rank`, `padded` and `finite` are filled with the value that means "unknown".

    Raises:
        ValueError: if the lengths disagree, or the width of `sketches` is not `sketch.dim`.

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
        """The number of entries in a row."""
        return self.sketch.dim

    @property
    def fingerprint(self) -> int:
        """The fingerprint of the weights at which all rows were taken, 0 if unknown.

        Raises:
            ValueError: if the rows were taken at different weights.
        """
        found = self.columns["fingerprint"].unique().tolist()
        if len(found) > 1:
            raise ValueError(
                f"the rows were taken at {len(found)} different weights; choose with .where(stage=...) "
                "or .where(fingerprint=...)."
            )
        return found[0] if found else 0

    def metadata(self) -> dict[str, Tensor]:
        """Return the columns by name."""
        return dict(self.columns)

    def where(self, mask: Tensor | None = None, **equal: Any) -> "SketchedGradients":
        """Select the rows where a mask is true and columns have given values.

        Args:
            mask: Booleans, one per row.
            **equal: Column names with the value that the rows must have; a stage is given by its name.

        Raises:
            ValueError: if a column or a stage is unknown.
        """
        keep = matching(self.columns, len(self), mask, equal)
        if keep.all():
            return self
        return SketchedGradients(self.sketches[keep], self.sketch, {k: v[keep] for k, v in self.columns.items()})

    def blocks(self, batch_rows: int = 4096) -> Iterator["SketchedGradients"]:
        """Yield the rows in order, at most `batch_rows` at a time."""
        for start in range(0, len(self), batch_rows):
            part = slice(start, start + batch_rows)
            yield SketchedGradients(self.sketches[part], self.sketch, {k: v[part] for k, v in self.columns.items()})

    @staticmethod
    def cat(parts: "list[SketchedGradients]") -> "SketchedGradients":
        """Concatenate tables of one sketch; where a table lacks a column, its values are unknown."""
        columns = cat_columns([part.columns for part in parts])
        return SketchedGradients(torch.cat([part.sketches for part in parts]), parts[0].sketch, columns)


def described(columns: Mapping[str, Tensor], dtype: torch.dtype, sketch: Sketch) -> str:
    """Describe a table of rows in a line or two: their number, sketch, stages, and the columns that have values."""
    kind = str(dtype).removeprefix("torch.")
    return f"{len(columns['stage'])} rows of {sketch.dim} numbers ({kind}) by {sketch}{contents(columns)}"


def contents(columns: Mapping[str, Tensor]) -> str:
    """Describe the rows of a table, to be appended to a text: their stages, and the columns that have values."""
    stages = columns["stage"]
    counts = ", ".join(f"{STAGES[i]} {int((stages == i).sum())}" for i in stages.unique().tolist())
    known = [name for name, column in columns.items() if not _is_default(name, column)]
    return (f"; {counts}" if counts else "") + (f"\n    columns with values: {', '.join(known)}" if known else "")


def _is_default(name: str, column: Tensor) -> bool:
    """Return whether a column has no information: the default everywhere (for the stage: always)."""
    if name not in DEFAULTS or name == "stage":
        return name == "stage"
    default = DEFAULTS[name]
    return bool(column.isnan().all() if default != default else (column == default).all())


def cat_columns(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate columns; a missing column is unknown there, and lists of ids are padded to the longest with -1."""
    columns = {}
    for name, like in {name: column for part in parts for name, column in part.items()}.items():
        tensors = [part[name] if name in part else _unknown(like, len(part["step"])) for part in parts]
        if like.ndim == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(tensor, (0, width - tensor.shape[1]), value=UNKNOWN_ID) for tensor in tensors]
        columns[name] = torch.cat(tensors)
    return columns


def _unknown(like: Tensor, count: int) -> Tensor:
    """Return `count` unknown values of a column, by its type: -1, NaN or False."""
    value = torch.nan if like.is_floating_point() else False if like.dtype == torch.bool else UNKNOWN_ID
    return like.new_full((count, *like.shape[1:]), value)


def matching(columns: Mapping[str, Tensor], count: int, mask: Tensor | None, equal: Mapping[str, Any]) -> Tensor:
    """Return booleans for `count` rows: whether the mask is true and the columns have the values in `equal`.

    Raises:
        ValueError: if a column or a stage is unknown.
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
    """Sketched gradients, in memory or on disk: what the functions of `attribution` read."""

    @property
    def sketch(self) -> Sketch:
        """The sketch that made the rows."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def metadata(self) -> dict[str, Tensor]:
        """Return the columns by name, without reading the sketches."""

    def where(self, mask: Tensor | None = None, **equal: Any) -> "RowSource":
        """Select the rows where the mask is true and columns have the values in `equal`, in their order."""

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """Yield the rows in order, at most `batch_rows` at a time."""
