"""The index of a store: the columns and the place of every row, without its sketch, and which rows are visible."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_sketch.store.lineage import Run
from lightning_sketch.store.shards import Shard, ShardName
from lightning_sketch.store.sketched_gradients import DEFAULTS, STAGES, cat_columns, contents
from lightning_sketch.store.spec import StoreSpec

QUERIES = STAGES.index("queries")


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a store without their sketches.

    Args:
        columns: The columns of the rows, by name.
        files: The names of the store's files of rows.
        file: For each row, the index of its file in `files`.
        place: For each row, its position in that file.
    """

    columns: Mapping[str, Tensor]
    files: Sequence[ShardName]
    file: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.file)

    def __repr__(self) -> str:
        files = len(self.file.unique())
        return f"StoredRows: {len(self)} rows in {files} file{'s' if files != 1 else ''}{contents(self.columns)}"

    def where(self, mask: Bool[Tensor, " rows"]) -> "StoredRows":
        """Select the rows where a mask is true, in their order."""
        columns = {name: column[mask] for name, column in self.columns.items()}
        return StoredRows(columns, self.files, self.file[mask], self.place[mask])

    @staticmethod
    def cat(one: "StoredRows", other: "StoredRows") -> "StoredRows":
        """Concatenate two indexes of one store."""
        columns = {name: torch.cat([one.columns[name], other.columns[name]]) for name in one.columns}
        files, places = (torch.cat([getattr(one, key), getattr(other, key)]) for key in ("file", "place"))
        return StoredRows(columns, one.files, files, places)

    def by_file(self) -> Iterator[tuple[ShardName, list[int], dict[str, Tensor]]]:
        """Yield each file's name, the positions of the rows in it, in rising order, and their columns."""
        for i in self.file.unique().tolist():
            (here,) = (self.file == i).nonzero(as_tuple=True)
            here = here[self.place[here].argsort()]
            yield self.files[i], self.place[here].tolist(), {name: c[here] for name, c in self.columns.items()}


def missing_files(names: Iterable[ShardName]) -> list[ShardName]:
    """Return the names that their writers must have used before later ones, but that are not among `names`."""
    found = set(names)
    before = {replace(name, sequence=i) for name in found for i in range(name.sequence)}
    return sorted(before - found)


def read_index(folder: Path, spec: StoreSpec) -> StoredRows:
    """Read the index of all rows below a folder, visible or not, ordered by run, rank and time.

    Raises:
        CorruptShard: if a file is truncated, foreign, or has a name that no store uses.
    """
    names = sorted(ShardName.of(path) for path in folder.rglob("*.safetensors"))
    missing = missing_files(names)
    if missing:
        listed = ", ".join(str(folder / name.path) for name in missing)
        warnings.warn(f"rows are missing, since later files of their writers exist: {listed}.", stacklevel=2)
    parts, files, places = [_no_columns()], [], []
    for i, name in enumerate(names):
        shard = Shard(folder, name, spec)
        parts.append(shard.columns() | {"attempt": torch.full((len(shard),), name.run)})
        files.append(torch.full((len(shard),), i))
        places.append(torch.arange(len(shard)))
    nothing = torch.zeros(0, dtype=torch.int64)
    return StoredRows(
        cat_columns(parts if len(parts) == 1 else parts[1:]),
        names,
        torch.cat([nothing, *files]),
        torch.cat([nothing, *places]),
    )


def visible_rows(rows: StoredRows, runs: Sequence[Run], lineage: Mapping[int, int]) -> StoredRows:
    """Select the rows that are visible in a lineage, see the module `lineage`.

    Args:
        rows: All rows of a store.
        runs: All runs of the store.
        lineage: The runs of the lineage, each with its last visible step, as `lineage_of` returns it.
    """
    stages = {run.number: run.stage for run in runs}
    number, step, fingerprint = (rows.columns[name] for name in ("attempt", "step", "fingerprint"))
    keep = torch.zeros(len(rows), dtype=torch.bool)
    newest: dict[tuple[str, int], int] = {}
    for run in number.unique().tolist():
        own = number == run
        if stages.get(run) == "fit":
            keep |= own & (step <= lineage.get(run, -1))
            continue
        keep |= own
        for weights in set(fingerprint[own].tolist()) - {0}:  # 0 is unknown, and not equal to another 0
            key = (stages.get(run, ""), weights)
            if key in newest:
                keep &= ~((number == newest[key]) & (fingerprint == weights))
            newest[key] = run
    return rows.where(keep)


def _no_columns() -> dict[str, Tensor]:
    """Return the columns of no rows."""
    columns = {name: torch.full((0,), value) for name, value in DEFAULTS.items()}
    return columns | {"attempt": torch.zeros(0, dtype=torch.int64)}
