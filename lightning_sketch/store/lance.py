"""Rows in a Lance dataset, as `RowStore.export("lance", uri)` writes them, on a disk or in an object store."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store import lance_format
from lightning_sketch.store.export import ReadFromDisk, column_of, sql_of
from lightning_sketch.store.sketched_gradients import Column, SketchedGradients, described, matching
from lightning_sketch.store.spec import StoreSpec

FEW = 10_000  # rows that are fetched by their ids; for more their fragments are read through


@dataclass(frozen=True, eq=False)
class LanceRows(ReadFromDisk):
    """Sketched gradients in a Lance dataset: a source of rows for `scores`, `top_k` and all that take a store.

    It has the rows that the last complete export left, in the order of exports. Sketches are read block by block.

    Args:
        uri: The dataset: a folder, or an address in an object store.
        version: Its version; that of the last complete export if None.
        storage_options: Keys of the object store, as Lance takes them.

    Raises:
        ImportError: if pylance is missing.
        ValueError: if there is no dataset, or it is of another program.

    Example::

        store.export("lance", "s3://bucket/rows.lance", append=True)
        rows = LanceRows("s3://bucket/rows.lance")
        top_k(queries, rows.where(stage="validate", source="wiki"))
    """

    uri: str | Path
    version: int | None = None
    storage_options: Mapping[str, str] | None = field(default=None, repr=False)
    condition: str | None = field(default=None, init=False)  # what Lance itself selects rows by, in SQL
    _chosen: tuple[Mapping[str, Column], Int[Tensor, " rows"]] | None = field(default=None, init=False)  # by a mask

    def __post_init__(self):
        if self.version is None:
            object.__setattr__(self, "version", lance_format.complete_version(str(self.uri), self.storage_options))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "dataset"}  # opened again where it lands

    @cached_property
    def dataset(self) -> Any:
        """The dataset, for what Lance itself can do with it."""
        return lance_format.import_lance().dataset(str(self.uri), self.version, storage_options=self.storage_options)

    @cached_property
    def spec(self) -> StoreSpec:
        """The sketch and the parameters of the rows, as in the store."""
        return StoreSpec(**json.loads(self.dataset.schema.metadata[lance_format.SPEC.encode()])["spec"])

    @property
    def sketch(self) -> Sketch:
        """The sketch that made the rows."""
        return self.spec.operator

    @property
    def optimizers(self) -> frozenset[str]:
        """The classes of the optimizers that trained the weights, as far as they are known."""
        return frozenset(json.loads(self.dataset.schema.metadata[lance_format.SPEC.encode()])["optimizers"])

    @cached_property
    def rows(self) -> tuple[Mapping[str, Column], Int[Tensor, " rows"]]:
        """The columns, and Lance's ids of the rows."""
        if self._chosen is not None:
            return self._chosen
        table = lance_format.columns_of(self.dataset, filter=self.condition, with_row_id=True)
        ids = torch.from_numpy(table["_rowid"].to_numpy().astype(np.int64))
        return {name: column_of(table[name], name) for name in table.column_names if name != "_rowid"}, ids

    @property
    def parts(self) -> Int[Tensor, " rows"]:
        """The number of the part, here some thousands of rows of a fragment, that each row is in."""
        return self.rows[1] >> 13

    def __len__(self) -> int:
        return len(self.rows[1])

    def __repr__(self) -> str:
        dtype = torch.float16 if lance_format.SCALE in self.dataset.schema.names else torch.float32
        return f"LanceRows in {self.uri}: {described(self.rows[0], dtype, self.sketch)}"

    def metadata(self) -> dict[str, Any]:
        """Return the columns by name, tensors or `Strings`; no sketch is read."""
        return dict(self.rows[0])

    def where(self, mask: Any = None, **equal: Any) -> "LanceRows":
        """Select the rows where a mask is true and columns have given values; arguments and errors as `RowStore.where`.

        Before columns were read, Lance selects by whole numbers, booleans and strings, and reads no other rows.
        """
        equal = {name: list(value) if isinstance(value, Iterator) else value for name, value in equal.items()}
        unread = mask is None and equal and "rows" not in vars(self) and self._chosen is None
        condition = sql_of(lance_format.columns_of(self.dataset, limit=1), equal) if unread else None
        if condition is not None:
            chosen, condition = None, f"({self.condition}) AND {condition}" if self.condition else condition
        else:
            keep, condition = matching(self.rows[0], len(self), mask, equal), self.condition
            chosen = {name: column[keep] for name, column in self.rows[0].items()}, self.rows[1][keep]
        return self._with(condition, chosen)

    def part(self, rows: slice) -> "LanceRows":
        """Return adjacent rows without their columns, to be sent to another process."""
        return self._with(self.condition, ({}, self.rows[1][rows].clone()))

    @property
    def lance_filter(self) -> str | None:
        """What Lance selects by, in SQL: of more than `FEW` rows that a mask has selected, it yields others too."""
        few = self._chosen is not None and len(self) <= FEW
        return f"_rowid IN ({', '.join(map(str, self.rows[1].tolist()))})" if few else self.condition

    def _with(self, condition: str | None, chosen: Any) -> "LanceRows":
        found = replace(self)
        vars(found).update(condition=condition, _chosen=chosen)  # a frozen dataclass has no other way
        return found

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """Yield the rows in order, at most `batch_rows` at a time."""
        (columns, ids), start = self.rows, 0
        for batch, kept in lance_format.batches_of(self.dataset, ids.numpy(), self.lance_filter, batch_rows):
            part = slice(start, start := start + int(kept.sum()))
            own = {name: column[part] for name, column in columns.items()}
            yield SketchedGradients(lance_format.sketches_of(batch, kept, self.sketch.dim), self.sketch, own)

    def read(self) -> SketchedGradients:
        """Read all rows into memory."""
        none = SketchedGradients(
            torch.zeros(0, self.sketch.dim), self.sketch, {n: c[:0] for n, c in self.rows[0].items()}
        )
        return SketchedGradients.cat(list(self.blocks()) or [none])
