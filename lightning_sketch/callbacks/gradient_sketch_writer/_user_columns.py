"""Columns that users add to the rows: their own values for each example or batch, such as a source or a class."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_sketch.store.sketched_gradients import DEFAULTS, Column, Strings, as_column, keys_of, unknown

_RESERVED = {*DEFAULTS, "attempt", "dataloader", "example_ids", "mask", "scale", "self", "sketch", "sketches"}


class UserColumns:
    """A function from a batch to the user's columns of its rows.

    Args:
        columns_fn: batch -> {name: values}; None for no columns.
    """

    def __init__(self, columns_fn: Callable[[Any], Mapping[str, Any]] | None):
        self.columns_fn = columns_fn

    def __call__(self, batch: Any, count: int | None) -> dict[str, Column]:
        """Return the columns of the rows of a batch.

        Args:
            batch: The batch, as the module gets it.
            count: The number of its examples; None for the one row of a step, whose value is unknown where the examples
                have several.

        Raises:
            ValueError: If a name or the number of values does not fit.
        """
        if self.columns_fn is None:
            return {}
        found = self.columns_fn(batch)
        if not isinstance(found, Mapping):
            raise ValueError(f"columns_fn returned a {type(found).__name__}; return a dict: {{'source': values}}.")
        return {name: _column(name, values, count) for name, values in found.items()}


def _column(name: Any, values: Any, count: int | None) -> Column:
    """Return one column, from a value per row or one for all rows."""
    if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
        taken = f"; {name!r} is a column of every row" if name in _RESERVED else ""
        raise ValueError(f"columns_fn names a column {name!r}{taken}; use another name, such as 'source'.")
    single = isinstance(values, str | bool | int | float) or getattr(values, "ndim", 1) == 0
    column = Strings.of([values]) if isinstance(values, str) else as_column([values] if single else values, name)
    if single and isinstance(column, torch.Tensor):
        column = column.reshape(1)
    column = column if isinstance(column, Strings) else column.detach().cpu()
    if single:
        return column[torch.zeros(count or 1, dtype=torch.long)]
    if count is None and len(column):
        keys = keys_of(column)
        return column[:1] if bool((keys == keys[0]).all()) else unknown(column, 1)
    if len(column) != count or (isinstance(column, torch.Tensor) and column.ndim != 1):
        shape = f"{len(column)} values" if isinstance(column, Strings) else f"shape {tuple(column.shape)}"
        raise ValueError(
            f"columns_fn returned {shape} for column {name!r}; return one value, or one for each of {count} examples."
        )
    return column
