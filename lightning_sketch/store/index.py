"""The index of a store: every row's columns and where it lies, and which rows count."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_sketch.store.lineage import Run
from lightning_sketch.store.shards import Shard, ShardName
from lightning_sketch.store.sketched_gradients import DEFAULTS, STAGES, cat_columns
from lightning_sketch.store.spec import StoreSpec

QUERIES = STAGES.index("queries")


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows without their sketches.

    Args:
        columns: what is known of each.
        files: the files of a store.
        file: for each row, the index of its file,
        place: and the row's place in it.
    """

    columns: Mapping[str, Tensor]
    files: Sequence[ShardName]
    file: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.file)

    def chosen(self, keep: Bool[Tensor, " rows"]) -> "StoredRows":
        """Some of the rows, in their order."""
        columns = {name: column[keep] for name, column in self.columns.items()}
        return StoredRows(columns, self.files, self.file[keep], self.place[keep])

    @staticmethod
    def cat(one: "StoredRows", other: "StoredRows") -> "StoredRows":
        """Both, of one store."""
        columns = {name: torch.cat([one.columns[name], other.columns[name]]) for name in one.columns}
        files, places = (torch.cat([getattr(one, key), getattr(other, key)]) for key in ("file", "place"))
        return StoredRows(columns, one.files, files, places)

    def by_file(self) -> Iterator[tuple[ShardName, list[int], dict[str, Tensor]]]:
        """For each file its name, the places of the rows in it, and their columns."""
        for i in self.file.unique().tolist():
            (here,) = (self.file == i).nonzero(as_tuple=True)
            here = here[self.place[here].argsort()]
            yield self.files[i], self.place[here].tolist(), {name: c[here] for name, c in self.columns.items()}


def shard_names(folder: Path) -> list[ShardName]:
    """The files of rows below a folder, by attempt, rank and sequence.

    Raises:
        CorruptShard: if one has a name that no store gives.
    """
    return sorted(ShardName.of(path) for path in folder.rglob("*.safetensors"))


def gaps(names: Iterable[ShardName]) -> list[ShardName]:
    """Names that were given before later ones, and are not there."""
    found = set(names)
    before = {replace(name, sequence=i) for name in found for i in range(name.sequence)}
    return sorted(before - found)


def read_index(folder: Path, spec: StoreSpec) -> StoredRows:
    """All rows below a folder, live or not, in the order of attempt, rank and time.

    Raises:
        CorruptShard: if a file is cut or foreign.
    """
    names = shard_names(folder)
    missing = gaps(names)
    if missing:
        listed = ", ".join(str(folder / name.path) for name in missing)
        warnings.warn(f"rows are missing, since later files of their writers are there: {listed}.", stacklevel=2)
    parts, files, places = [_empty()], [], []
    for i, name in enumerate(names):
        shard = Shard(folder, name, spec)
        parts.append(shard.columns() | {"attempt": torch.full((len(shard),), name.attempt)})
        files.append(torch.full((len(shard),), i))
        places.append(torch.arange(len(shard)))
    nothing = torch.zeros(0, dtype=torch.int64)
    return StoredRows(
        cat_columns(parts if len(parts) == 1 else parts[1:]),
        names,
        torch.cat([nothing, *files]),
        torch.cat([nothing, *places]),
    )


def live_rows(rows: StoredRows, attempts: Sequence[Run], line: Mapping[int, int]) -> StoredRows:
    """The rows that count for a line of attempts, as `lineage_of` gives it; see `attempts`."""
    stages = {attempt.number: attempt.stage for attempt in attempts}
    number, step, fingerprint = (rows.columns[name] for name in ("attempt", "step", "fingerprint"))
    keep = torch.zeros(len(rows), dtype=torch.bool)
    newest: dict[tuple[str, int], int] = {}
    for attempt in number.unique().tolist():
        own = number == attempt
        if stages.get(attempt) == "fit":
            keep |= own & (step <= line.get(attempt, -1))
            continue
        keep |= own
        for weights in set(fingerprint[own].tolist()) - {0}:  # 0 is not known to be equal to 0
            key = (stages.get(attempt, ""), weights)
            if key in newest:
                keep &= ~((number == newest[key]) & (fingerprint == weights))
            newest[key] = attempt
    return rows.chosen(keep)


def _empty() -> dict[str, Tensor]:
    columns = {name: torch.full((0,), value) for name, value in DEFAULTS.items()}
    return columns | {"attempt": torch.zeros(0, dtype=torch.int64)}
