"""In-memory table of sketched gradients: one row per gradient, with columns such as its step, example and loss.

Columns of strings, their selection and concatenation are in this file too, so that a row is read through few files.
"""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_sketch._arguments import whole_number
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.operators.sketch import Sketch

# Where a row comes from: "fit" from training; "validate", "test" and "predict" from an example at a checkpoint;
# "queries" from a validation example during training.
Stage = Literal["fit", "validate", "test", "predict", "queries"]
STAGES: tuple[Stage, ...] = get_args(Stage)

UNKNOWN_ID = -1

# Ids of preconditioners: of rows without one, and of rows of training steps, whose gradients went through that of the
# optimizer at their step, (sqrt(v) + epsilon)^-1, and are compared with queries without one.
NONE, OF_STEP = 0, 1

_STORED = (torch.bool, torch.int64, torch.float32, torch.float64)  # types of columns

# The columns of every row, with the value that means "unknown":
#
#     example_id    the user's number or name of the example
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
#     weight        weight of the example in a mean over a batch, such as its number of labels
#     scale_known   False if the length of the row was not compared with the gradient of the example alone
#     preconditioner    id of what the gradient was multiplied by before it was sketched
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
    "weight": float("nan"),
    "scale_known": True,
    "preconditioner": NONE,
}


class Strings:
    """A column of strings: a hash of 63 bits for each row, and a table of the distinct strings.

    It compares and iterates as an array of strings does.

    Args:
        hashes: The hash of each row's string, int64, (rows,); -1 for the empty string, which means "unknown".
        tables: Distinct hashes with their strings, as JSON in bytes; they may have more than the rows need.

    >>> column = Strings.of(["wiki", "books", "wiki"])
    >>> column[1], column[:2].tolist(), column == "wiki"
    ('books', ['wiki', 'books'], tensor([ True, False,  True]))
    """

    def __init__(self, hashes: Tensor, tables: "Sequence[tuple[Tensor, Tensor]] | _Names"):
        self.hashes, self._names = hashes, tables if isinstance(tables, _Names) else _Names(tables)

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Make a column of strings."""
        listed = list(strings)
        keys = {text: Strings.key(text) for text in dict.fromkeys(listed)}
        texts = torch.frombuffer(bytearray(json.dumps(list(keys)).encode()), dtype=torch.uint8)
        rows = torch.tensor([keys[text] for text in listed], dtype=torch.long)
        return cls(rows, [(torch.tensor(list(keys.values()), dtype=torch.long), texts)])

    @staticmethod
    def key(text: str) -> int:
        """Return the hash of a string."""
        return content_hash(text) if text else UNKNOWN_ID

    @property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """The tables of distinct strings."""
        return self._names.tables

    @property
    def names(self) -> dict[int, str]:
        """The string of each hash.

        Raises:
            ValueError: if two strings have one hash.
        """
        return self._names.by_key

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, index: Any) -> Any:
        keys = self.hashes[index]
        return Strings(keys, self._names) if keys.ndim else self.names[int(keys)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and bool((self.hashes == Strings.key(text)).any())

    def __eq__(self, other: Any) -> Any:
        return self.hashes == (Strings.key(other) if isinstance(other, str) else Strings.of(other).hashes)

    def __ne__(self, other: Any) -> Any:
        return ~(self == other)

    __hash__ = None  # type: ignore[assignment]  # as that of arrays, since == compares row by row

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the strings as an array of objects, of the shape of the hashes."""
        flat = [self.names[key] for key in self.hashes.flatten().tolist()]
        return np.array(flat, dtype=dtype or object).reshape(self.hashes.shape)

    def __repr__(self) -> str:
        return f"Strings({self[:5].tolist()}{', ...' if len(self) > 5 else ''}, {len(self)} rows)"

    def tolist(self) -> list[Any]:
        """Return the strings as a list, or as lists of the shape of the hashes."""
        return self.__array__().tolist()


class _Names:
    """Tables of strings, parsed once for all columns that share them."""

    def __init__(self, tables: Sequence[tuple[Tensor, Tensor]]):
        self.tables = list(tables)

    @cached_property
    def by_key(self) -> dict[int, str]:
        """The string of each hash."""
        found: dict[int, str] = {UNKNOWN_ID: ""}
        for keys, texts in self.tables:
            for key, text in zip(keys.tolist(), json.loads(texts.numpy().tobytes()), strict=True):
                if found.setdefault(key, text) != text:
                    raise ValueError(f"{text!r} and {found[key]!r} have one hash; rename one of them.")
        return found


Column = Tensor | Strings


def keys_of(column: Column) -> Tensor:
    """Return the numbers of a column, or the hashes of its strings."""
    return column.hashes if isinstance(column, Strings) else column


@dataclass(frozen=True, eq=False)
class SketchedGradients:
    """A table of sketched gradients: one row per gradient, and columns of the same length.

    Each column is also an attribute: `rows.loss` is `rows.columns["loss"]`.

    Args:
        sketches: The sketched gradients, (rows, dim), in any floating-point type.
        sketch: The sketch that made them.
        columns: Tensors, arrays or lists with one number, boolean or string per row. Missing ones of `example_id`,
            `stage`, `step`, `epoch`, `lr`, `loss`, `prob_true`, `fingerprint`, `rank`, `padded`, `weight` and
            `scale_known` are filled with the value that means "unknown"; `finite` is computed from the sketches.

    Raises:
        ValueError: if the lengths disagree, the width of `sketches` is not `sketch.dim`, or a column has other values,
            such as ids that are no whole numbers or strings.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.eye(4), BlockSRHT(100, 4), {"example_id": torch.arange(4)})
    >>> len(rows), rows.where(example_id=2).sketches
    (4, tensor([[0., 0., 1., 0.]]))
    """

    sketches: Float[Tensor, "rows dim"]
    sketch: Sketch
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        count, dim = self.sketches.shape
        if dim != self.sketch.dim:
            raise ValueError(f"sketches have {dim} numbers a row, {self.sketch} gives {self.sketch.dim}.")
        if not self.sketches.is_floating_point():
            raise ValueError(f"sketches are floating-point numbers, got {self.sketches.dtype}; convert them: .float().")
        columns: dict[str, Column] = {
            name: torch.full((count,), value) for name, value in DEFAULTS.items() if name not in self.columns
        }
        if "finite" not in self.columns:
            columns["finite"] = self.sketches.isfinite().all(1).cpu()
        for name, values in self.columns.items():
            stored = isinstance(values, Strings) or (isinstance(values, Tensor) and values.dtype in _STORED)
            columns[name] = values if stored else as_column(values, name)
        for name in {"example_id", "example_ids"} & columns.keys():
            ids = columns[name]
            if not count and isinstance(ids, Tensor):
                columns[name] = ids.long()  # of an empty list, whose numbers are floats
            elif keys_of(ids).dtype != torch.int64:
                kind = str(keys_of(ids).dtype).removeprefix("torch.")
                raise ValueError(f"{name} takes whole numbers or strings, got {kind}; convert it: .long(), or names.")
        for name, column in columns.items():
            if len(column) != count:
                raise ValueError(f"column {name} has {len(column)} values for {count} rows.")
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        return len(self.sketches)

    def __repr__(self) -> str:
        return f"SketchedGradients: {described(self.columns, self.sketches.dtype, self.sketch)}"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the sketches as an array; bfloat16 and float16 are widened to float32."""
        own = self.sketches.detach().cpu()
        wide = (own.float() if own.dtype.itemsize < 4 else own).numpy()
        found = wide.astype(dtype or wide.dtype, copy=False)
        shared = found is wide and own.data_ptr() == self.sketches.data_ptr() and own.dtype.itemsize >= 4
        if copy is False and not shared:
            raise ValueError(f"the sketches in {self.sketches.dtype} need a copy; leave copy=False out.")
        return found.copy() if copy and shared else found

    def __getattr__(self, name: str) -> Any:
        columns = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"{type(self).__name__} has no attribute and no column {name!r}")
        return columns[name]

    @property
    def nbytes(self) -> int:
        """The bytes of the sketches and columns, strings aside."""
        return self.sketches.nbytes + sum(keys_of(column).nbytes for column in self.columns.values())

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
                f"the rows were taken at {len(found)} different weights; choose with .where(stage=...), "
                ".where(step=...) or .where(fingerprint=...)."
            )
        return found[0] if found else 0

    def metadata(self) -> dict[str, Any]:
        """Return the columns by name: tensors, or `Strings`."""
        return dict(self.columns)

    def to_pandas(self) -> Any:
        """Return the columns as a pandas DataFrame, with the stages in words."""
        from lightning_sketch.store import export  # knows tables, which are defined here

        return export.to_pandas(self.columns)

    def to_arrow(self) -> Any:
        """Return the columns and the sketches, widened to float32, as a pyarrow Table."""
        from lightning_sketch.store import export

        return export.to_arrow(self)

    def where(self, mask: Any = None, **equal: Any) -> "SketchedGradients":
        """Select the rows where a mask is true and columns have given values.

        Args:
            mask: Booleans, one per row.
            **equal: Column names with the value that the rows must have, or a list of such values; a stage is given by
                its name. A column of lists, such as `example_ids`, must contain one of the values.

        Raises:
            ValueError: if a column or a stage is unknown, the mask is not one boolean per row, or a value cannot be in
                its column.
        """
        keep = matching(self.columns, len(self), mask, equal)
        if keep.all():
            return self
        return SketchedGradients(self.sketches[keep], self.sketch, {k: v[keep] for k, v in self.columns.items()})

    def blocks(self, batch_rows: int = 4096) -> Iterator["SketchedGradients"]:
        """Yield the rows in order, at most `batch_rows` at a time."""
        batch_rows = whole_number(batch_rows, "batch_rows")
        for start in range(0, len(self), batch_rows):
            part = slice(start, start + batch_rows)
            yield SketchedGradients(self.sketches[part], self.sketch, {k: v[part] for k, v in self.columns.items()})

    @staticmethod
    def cat(parts: "list[SketchedGradients]") -> "SketchedGradients":
        """Concatenate tables of one sketch; where a table lacks a column, its values are unknown.

        Raises:
            ValueError: if there are no tables, or they are of several sketches.
        """
        sketches = dict.fromkeys(part.sketch for part in parts)
        if len(sketches) != 1:
            raise ValueError(f"cat() takes tables of one sketch, got {', '.join(map(str, sketches)) or 'no table'}.")
        columns = cat_columns([part.columns for part in parts])
        return SketchedGradients(torch.cat([part.sketches for part in parts]), parts[0].sketch, columns)


def described(columns: Mapping[str, Column], dtype: torch.dtype, sketch: Sketch) -> str:
    """Describe a table of rows in a line or two: their number, sketch, stages, and the columns that have values."""
    kind = str(dtype).removeprefix("torch.")
    return f"{len(columns['stage'])} rows of {sketch.dim} numbers ({kind}) by {sketch}{contents(columns)}"


@runtime_checkable
class RowSource(Protocol):
    """Sketched gradients, in memory or on disk: what the functions of `attribution` read."""

    @property
    def sketch(self) -> Sketch:
        """The sketch that made the rows."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def metadata(self) -> dict[str, Any]:
        """Return the columns by name, without reading the sketches."""

    def where(self, mask: Any = None, **equal: Any) -> "RowSource":
        """Select the rows where the mask is true and columns have the values in `equal`, in their order."""

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """Yield the rows in order, at most `batch_rows` at a time."""


def say_rows(count: int, total: int, what: str) -> None:
    """Warn that some rows are odd; if they are one in a hundred or fewer, as of examples learned by heart, log it."""
    text = f"{count} of {total} rows {what}."
    if 100 * count > total:
        warnings.warn(text, stacklevel=3)
    elif count:
        logging.getLogger("lightning_sketch").info(text)


def as_column(values: Any, name: str) -> Column:
    """Convert a tensor, an array, or a list of numbers or strings to a column.

    Raises:
        ValueError: if the values are none of these.
    """
    if isinstance(values, Strings):
        return values
    if isinstance(values, Tensor):
        return _stored(values, name)
    listed = values.tolist() if isinstance(values, np.ndarray) else list(values) if isinstance(values, Iterable) else 0
    if isinstance(listed, list) and listed and all(isinstance(value, str) for value in listed):
        return Strings.of(listed)
    try:
        return _stored(torch.as_tensor(np.array(values) if listed else torch.zeros(0)), name)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"column {name!r} has {str(values)[:60]}; give one number, boolean or string per row, all of one type."
        ) from error


def _stored(values: Tensor, name: str) -> Tensor:
    """Return a tensor in a type that columns have: whole numbers as int64, half precision as float32.

    Raises:
        ValueError: if the numbers are complex, or too large for int64.
    """
    if values.dtype in _STORED:
        return values
    if values.is_complex() or (values.dtype == torch.uint64 and bool((values.view(torch.int64) < 0).any())):
        raise ValueError(f"column {name!r} has {values.dtype}, which cannot be stored; convert it, or use strings.")
    return values.to(torch.float32 if values.is_floating_point() else torch.int64)


def cat_columns(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """Concatenate columns; a missing column is unknown there, and lists of ids are padded to the longest with -1.

    Where a column has strings in one part and numbers in another, as two runs may have written it, all become strings.
    """
    columns: dict[str, Column] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        given = [part[name] for part in parts if name in part]
        like = next((column for column in given if isinstance(column, Strings)), given[0])
        found = [part[name] if name in part else unknown(like, len(part["step"]), name) for part in parts]
        if isinstance(like, Strings):
            strings = [_as_strings(column) for column in found]
            tables = {id(table): table for column in strings for table in column.tables}
            columns[name] = Strings(torch.cat([column.hashes for column in strings]), list(tables.values()))
            continue
        tensors = [keys_of(column) for column in found]
        if any(tensor.ndim == 2 for tensor in tensors):
            tensors = [tensor if tensor.ndim == 2 else tensor[:, None] for tensor in tensors]
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(tensor, (0, width - tensor.shape[1]), value=UNKNOWN_ID) for tensor in tensors]
        if len({tensor.is_floating_point() for tensor in tensors}) > 1:
            tensors = [tensor.double() for tensor in tensors]  # int64 and float32 would make float32
        columns[name] = torch.cat(tensors)
    return columns


def _as_strings(column: Column) -> Strings:
    """Return a column as strings; a number that means "unknown" becomes the empty one."""
    if isinstance(column, Strings):
        return column
    return Strings.of("" if value == UNKNOWN_ID or value != value else str(value) for value in column.tolist())


def unknown(like: Column, count: int, name: str = "") -> Column:
    """Return `count` unknown values of a column: its default if it has one, else by its type "", -1, NaN or False."""
    if isinstance(like, Strings):
        return Strings(torch.full((count,), UNKNOWN_ID), [])
    by_type = torch.nan if like.is_floating_point() else False if like.dtype == torch.bool else UNKNOWN_ID
    value = DEFAULTS.get(name, by_type)
    value = by_type if value != value else value  # NaN is no integer
    return like.new_full((count, *like.shape[1:]), value)


def matching(columns: Mapping[str, Column], count: int, mask: Any, equal: Mapping[str, Any]) -> Tensor:
    """Return booleans for `count` rows: whether the mask is true and the columns have one of the values in `equal`.

    Raises:
        ValueError: if a column or a stage is unknown, the mask is not one boolean per row, or a value cannot be in its
            column.
    """
    keep = torch.ones(count, dtype=torch.bool)
    if mask is not None:
        given = f"a {type(mask).__name__}"
        if not isinstance(mask, str | Mapping) and not callable(mask):
            mask = mask if isinstance(mask, Tensor) else torch.as_tensor(np.array(mask))
            given = f"{mask.dtype} of shape {tuple(mask.shape)}"
        if isinstance(mask, str | Mapping) or callable(mask) or mask.dtype != torch.bool or mask.shape != keep.shape:
            raise ValueError(
                f"where() takes a mask of {count} booleans, one per row, got {given}; name a column to select by its "
                "values, such as where(stage='fit') or where(example_id=[3, 7])."
            )
        keep &= mask
    for name, value in equal.items():
        if name not in columns:
            raise ValueError(f"no column {name!r}; there are {', '.join(columns)}.")
        column, wanted = keys_of(columns[name]), _values(columns[name], name, value)
        if column.dtype == torch.bool:
            column, wanted = column.byte(), wanted.byte()  # isin() takes numbers only
        found = torch.isin(column, wanted)
        keep &= found.any(1) if found.ndim == 2 else found
    return keep


def _values(column: Column, name: str, value: Any) -> Tensor:
    """Return the value, or the values of a list, as they are in the column."""
    plain = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    values = [plain] if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Iterable) else list(plain)
    if name == "stage":
        unknown = [item for item in values if isinstance(item, str) and item not in STAGES]
        if unknown:
            raise ValueError(f"no stage {unknown[0]!r}; use one of {', '.join(STAGES)}.")
        values = [STAGES.index(item) if isinstance(item, str) else item for item in values]
    dtype = keys_of(column).dtype
    kinds = str if isinstance(column, Strings) else int | float if dtype.is_floating_point else int
    if name == "example_ids":  # of examples that may have names, of which only the hashes are stored
        values = [Strings.key(item) if isinstance(item, str) else item for item in values]
    if not all(isinstance(item, kinds) for item in values):
        kind = "strings" if isinstance(column, Strings) else str(dtype).removeprefix("torch.")
        raise ValueError(f"column {name!r} has {kind}, where() got {str(value)[:60]!r}; give a value of this type.")
    try:
        return torch.tensor([Strings.key(item) if isinstance(item, str) else item for item in values], dtype=dtype)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"column {name!r} cannot have {str(value)[:60]}: it is stored as {dtype}.") from error


def contents(columns: Mapping[str, Column]) -> str:
    """Describe the rows of a table, to be appended to a text: their stages, and the columns that have values."""
    stages = columns["stage"]
    assert isinstance(stages, Tensor)
    counts = ", ".join(f"{STAGES[i]} {int((stages == i).sum())}" for i in stages.unique().tolist())
    order = [*DEFAULTS, *sorted(set(columns) - set(DEFAULTS))]
    known = [name for name in order if name in columns and not _is_default(name, columns[name])]
    return (f"; {counts}" if counts else "") + (f"\n    columns with values: {', '.join(known)}" if known else "")


def _is_default(name: str, column: Column) -> bool:
    """Return whether a column has no information: the default everywhere (for the stage: always)."""
    if name not in DEFAULTS or name == "stage" or isinstance(column, Strings):
        return name == "stage"
    default = DEFAULTS[name]
    return bool(column.isnan().all() if default != default else (column == default).all())
