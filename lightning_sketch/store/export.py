"""Rows for other tools: pandas, Arrow, NumPy and Parquet files."""

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from lightning_sketch.store.sketched_gradients import (
    STAGES,
    UNKNOWN_ID,
    Column,
    SketchedGradients,
    Strings,
    keys_of,
    matching,
)

_INSTALL = "pip install 'lightning-sketch[tables]'"
SPEC = "spec.json"  # of a store
EXPORTED = "export.json"  # the names of the files of an export
SKETCH = "sketch"  # the column of sketches
NEIGHBORS = "neighbors"  # the column of the nearest rows
_ROWS = 1024  # whose neighbors are looked for at a time
Blocks = Callable[[], Iterable[SketchedGradients]]  # reads all rows anew, block by block


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
    half = rows.sketches.dtype == torch.float16
    sketch = rows.sketches.cpu().numpy() if half else np.asarray(rows)
    if SKETCH in rows.columns:
        raise ValueError(f"a column has the name {SKETCH!r}, which the sketches have in a table; rename it.")
    plain = {name: pa.array(values) for name, values in _plain(rows.columns).items()}
    return pa.table({**plain, SKETCH: pa.FixedSizeListArray.from_arrays(sketch.reshape(-1), rows.dim)})


class ReadFromDisk(ABC):
    """Rows outside memory, as arrays and tables of other libraries."""

    @abstractmethod
    def read(self) -> SketchedGradients:
        """Read all rows into memory."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return the columns by name; no sketch is read."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the sketches as an array, (rows, dim); bfloat16 and float16 are widened to float32."""
        if copy is False:
            raise ValueError("rows on a disk are read into memory; leave copy=False out.")
        return self.read().__array__(dtype)

    def to_pandas(self) -> Any:
        """Return the columns as a pandas DataFrame, with the stages in words; no sketch is read."""
        return to_pandas(self.metadata())

    def to_arrow(self) -> Any:
        """Return the columns and the sketches of all rows as a pyarrow Table, see `SketchedGradients.to_arrow`."""
        return self.read().to_arrow()


def to_npy(blocks: Iterable[SketchedGradients], columns: Mapping[str, Column], dim: int, folder: Path) -> None:
    """Write `sketches.npy`, (rows, dim) in float32, and a file per column, with one block in memory at a time.

    They are written beside and renamed when all are whole; the files of an earlier export, which `export.json` names,
    are removed then.
    """
    if (folder / SPEC).exists():
        raise ValueError(f"{folder} is the folder of a store; export to another one.")
    if wrong := [name for name in columns if name == "sketches" or "/" in name]:
        raise ValueError(f"columns are files by their names, which {', '.join(wrong)} cannot be; rename them.")
    with tempfile.TemporaryDirectory(dir=_made(folder), prefix=".part-") as part:
        count, start = len(columns["step"]), 0
        for name, column in columns.items():
            array = np.array(column.tolist()) if isinstance(column, Strings) else column.numpy()
            np.save(Path(part) / f"{name}.npy", array)
        path = Path(part) / "sketches.npy"
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, dim))
        for block in blocks:
            out[start : start + len(block)] = np.asarray(block)
            start += len(block)
        out.flush()
        names = sorted(path.name for path in Path(part).iterdir())
        listed = folder / EXPORTED
        earlier = json.loads(listed.read_text()) if listed.exists() else []
        if foreign := [name for name in names if name not in earlier and (folder / name).exists()]:
            raise ValueError(f"{folder} has {', '.join(foreign)} of something else; export to another folder.")
        listed.write_text(json.dumps(sorted({*earlier, *names})))
        for old in {*earlier} - {*names}:
            (folder / Path(old).name).unlink(missing_ok=True)
        for name in names:
            (Path(part) / name).replace(folder / name)
        listed.write_text(json.dumps(names))


def to_parquet(blocks: Blocks, path: Path, neighbors: int | None = None) -> None:
    """Write one Parquet file, with the columns of `to_arrow`, and one block in memory at a time; whole or not there.

    With `neighbors` each row names that many nearest rows too, and two blocks are in memory at a time; all blocks are
    read once for each `_ROWS` rows.
    """
    writer: Any = None
    with tempfile.TemporaryDirectory(dir=_made(path.parent), prefix=".part-") as part:
        start = 0
        for block in blocks() if neighbors is None else _joined(blocks(), _ROWS):
            table = to_arrow(block)
            if neighbors is not None:
                if NEIGHBORS in table.column_names:
                    raise ValueError(f"a column has the name {NEIGHBORS!r}, which neighbors= writes; rename it.")
                table = table.append_column(NEIGHBORS, _nearest(block, start, blocks, neighbors))
                start += len(block)
            if writer is None:
                from pyarrow import parquet  # type: ignore[import-untyped,unused-ignore]

                writer = parquet.ParquetWriter(Path(part) / path.name, table.schema)
            writer.write_table(table)
        if writer is None:
            raise ValueError("there are no rows to export.")
        writer.close()
        (Path(part) / path.name).replace(path)


def _nearest(own: SketchedGradients, start: int, blocks: Blocks, k: int) -> Any:
    """Return for each row the k rows of the largest cosines, itself first, in the form of embedding-atlas.

    This is a dictionary of ids, which count rows from zero, and of distances, 1 - cosine; a row of zeros or NaN has
    the distance 1 to all others.
    """
    import pyarrow as pa

    directions, first = _directions(own), 0
    places = torch.arange(len(own))
    cosines, ids = torch.zeros(len(own), 0), torch.zeros(len(own), 0, dtype=torch.int64)
    for block in blocks():
        found = directions @ _directions(block).T
        itself = start + places - first
        inside = (itself >= 0) & (itself < len(block))
        found[places[inside], itself[inside]] = torch.inf
        cosines = torch.cat([cosines, found], 1)
        ids = torch.cat([ids, torch.arange(first, first + len(block)).expand(len(own), -1)], 1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]), 1)
        ids, first = ids.gather(1, best), first + len(block)
    distances = (1 - cosines).clamp(min=0)
    columns = {"ids": ids, "distances": distances}
    lists = [pa.FixedSizeListArray.from_arrays(c.flatten().numpy(), c.shape[1]) for c in columns.values()]
    return pa.StructArray.from_arrays(lists, list(columns))


def _joined(blocks: Iterable[SketchedGradients], least: int) -> Iterator[SketchedGradients]:
    """Yield the same rows in blocks of at least this many, but for the last."""
    parts: list[SketchedGradients] = []
    for block in blocks:
        parts.append(block)
        if sum(map(len, parts)) >= least:
            yield SketchedGradients.cat(parts)
            parts = []
    if parts:
        yield SketchedGradients.cat(parts)


def _directions(rows: SketchedGradients) -> Tensor:
    """Return rows of length one, whatever their sizes, and zeros for those of zeros or NaN."""
    sketches = torch.from_numpy(np.asarray(rows))
    largest = sketches.abs().amax(1, keepdim=True)
    return normalize(torch.where(largest.isfinite() & (largest > 0), sketches / largest, 0.0), dim=1)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def column_of(array: Any, name: str) -> Column:
    """Return a column of Arrow as it was exported."""
    kind = str(array.type)
    values = array.to_pylist() if "string" in kind or kind.startswith("list") else array.to_numpy()
    if name == "stage":
        return torch.tensor([STAGES.index(value) for value in values], dtype=torch.int64)
    if kind.startswith("list") and "string" in kind:
        flat = Strings.of([text for row in values for text in row])
        return Strings(flat.hashes.view(len(values), -1), flat.tables)
    if kind.startswith("list"):
        rows = [torch.tensor(row) for row in values]
        return pad_sequence(rows, batch_first=True, padding_value=UNKNOWN_ID) if rows else torch.zeros(0, 1).long()
    return Strings.of(values) if "string" in kind else torch.tensor(values)


def sql_of(first: Any, equal: Mapping[str, Any]) -> str | None:
    """Return in SQL that columns have given values; None where a database would compare otherwise than `matching`.

    Args:
        first: A table of Arrow with one row.
        equal: Column names with a value or a list of values.

    Raises:
        ValueError: as `matching`.
    """
    columns, parts = {name: column_of(first[name], name)[:0] for name in first.column_names}, []
    matching(columns, 0, None, equal)
    for name, value in equal.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        values = [STAGES[v] if name == "stage" and isinstance(v, int) else v for v in values]
        plain = all(isinstance(v, str | bool | int) for v in values) and keys_of(columns[name]).ndim == 1
        if not values or not plain or keys_of(columns[name]).is_floating_point():
            return None
        text = ["'" + v.replace("'", "''") + "'" if isinstance(v, str) else str(v).lower() for v in values]
        parts.append(f"`{name}` IN ({', '.join(text)})")
    return " AND ".join(parts)


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
