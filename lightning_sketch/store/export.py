"""Rows for other tools: pandas, Arrow, NumPy files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sketch.store.sketched_gradients import STAGES, Column, SketchedGradients, Strings

_INSTALL = "pip install 'lightning-sketch[tables]'"


def to_pandas(columns: Mapping[str, Column]) -> Any:
    """Return columns as a pandas DataFrame, with the stages in words and the strings as such."""
    try:
        import pandas as pd  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(f"to_pandas() needs pandas: {_INSTALL}, or use metadata().") from error
    return pd.DataFrame(_plain(columns))


def to_arrow(rows: SketchedGradients) -> Any:
    """Return rows as a pyarrow Table: the columns as in `to_pandas`, and `sketch`, a list of dim numbers per row."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(f"to_arrow() needs pyarrow: {_INSTALL}, or use numpy.asarray(rows).") from error
    sketch = pa.FixedSizeListArray.from_arrays(np.asarray(rows).reshape(-1), rows.dim)
    plain = _plain(rows.columns)
    return pa.table({**{name: pa.array(values) for name, values in plain.items()}, "sketch": sketch})


def to_npy(blocks: Iterable[SketchedGradients], columns: Mapping[str, Column], dim: int, folder: Path) -> None:
    """Write `sketches.npy`, (rows, dim) in float32, and a file per column, with one block in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(columns["step"])
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", np.array(column.tolist()) if isinstance(column, Strings) else column.numpy())
    out = np.lib.format.open_memmap(folder / "sketches.npy", mode="w+", dtype=np.float32, shape=(count, dim))
    start = 0
    for block in blocks:
        out[start : start + len(block)] = np.asarray(block)
        start += len(block)
    out.flush()


def _plain(columns: Mapping[str, Column]) -> dict[str, Any]:
    """Return columns as arrays, and as lists where they have strings or lists."""
    found: dict[str, Any] = {}
    for name, column in columns.items():
        if name == "stage":
            found[name] = [STAGES[i] for i in column.tolist()]
        elif isinstance(column, Strings) or column.ndim > 1:
            found[name] = column.tolist()
        else:
            found[name] = column.numpy()
    return found
