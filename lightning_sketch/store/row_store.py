"""Stored rows, read lazily."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store import maintenance
from lightning_sketch.store.index import QUERIES, StoredRows, live_rows, read_index
from lightning_sketch.store.lineage import Run, begin_run, lineage_of, read_runs
from lightning_sketch.store.manifest import rows_folder
from lightning_sketch.store.shards import Shard, ShardName
from lightning_sketch.store.sketched_gradients import SketchedGradients, described, matching
from lightning_sketch.store.spec import DTYPES, StoreSpec
from lightning_sketch.store.writer import RowAppender

Store = TypeVar("Store", bound="RowStore")


@dataclass(frozen=True, eq=False)
class RowStore:
    """Sketched gradients on disk, one row per optimizer step or per example, as `GradientSketchWriter` left them.

    `len`, `metadata`, `where` and `blocks` see the rows that count: those of the latest fit and what it resumed from,
    each step once, and those taken at checkpoints; not the `queries` kept beside them.

    Args:
        path: its folder.
        spec: what its rows are.
        rows: index of the visible rows.
        kept: index of the rows of stored queries.

    Example::

        store = RowStore.open("lightning_logs/version_0/sketches")
        for block in store.where(stage="fit").blocks():
            print(block.step, block.sketches.float().norm(dim=1))
    """

    path: Path
    spec: StoreSpec
    rows: StoredRows
    kept: StoredRows

    @classmethod
    def open(cls: type[Store], path: str | Path, lineage: str | int = "latest") -> Store:
        """A store as it is now; rows written later are seen by opening it again.

        Args:
            path: the folder that was written.
            lineage: "latest", or the number of the fit whose line of attempts counts.

        Raises:
            FileNotFoundError: if there is no store.
            CorruptShard: if a file is cut or foreign; `RowStore.verify` lists all such files.
            ValueError: if there is no such fit.
        """
        path = Path(path)
        spec, attempts = StoreSpec.read(path), read_runs(path)
        last = None if lineage == "latest" else int(lineage)
        live = live_rows(read_index(rows_folder(path), spec), attempts, lineage_of(attempts, last))
        queries = live.columns["stage"] == QUERIES
        return cls(path, spec, live.chosen(~queries), live.chosen(queries))

    @classmethod
    def create(cls: type[Store], path: str | Path, spec: StoreSpec) -> Store:
        """A store of this spec in this folder, which may hold one already.

        Raises:
            ValueError: if it holds one of another spec; both are shown.
        """
        spec.write(Path(path))
        return cls.open(path)

    def begin_run(
        self, stage: str, parent: int | None = None, parent_step: int | None = None, world_size: int = 1
    ) -> Run:
        """Write down that rows will come: see `attempts`; one process does so for all."""
        return begin_run(self.path, stage, parent, parent_step, world_size)

    @property
    def sketch(self) -> Sketch:
        """The map that made the rows."""
        return self.spec.operator

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        rows = described(self.rows.columns, DTYPES[self.spec.dtype], self.sketch)
        queries = f"\n    {len(self.kept)} rows of stored queries" if len(self.kept) else ""
        return f"{type(self).__name__} in {self.path}: {rows}{queries}"

    def metadata(self) -> dict[str, Tensor]:
        """What is known of each row; no sketch is read."""
        return dict(self.rows.columns)

    def where(self: Store, mask: Tensor | None = None, **equal: Any) -> Store:
        """The rows where the mask, of the store's length, is true and columns have these values; nothing is read."""
        return replace(self, rows=self.rows.chosen(matching(self.rows.columns, len(self), mask, equal)))

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """The rows in order, at most so many at a time; in bfloat16 and float32 straight from the files' pages."""
        folder = rows_folder(self.path)
        for name, places, columns in self.rows.by_file():
            shard = Shard(folder, name, self.spec)
            scale = shard.scale()
            for start, stop, begin in _runs(places, batch_rows):
                part = {key: column[begin : begin + stop - start] for key, column in columns.items()}
                yield SketchedGradients(shard.sketches(start, stop, scale), self.sketch, part)

    def read(self) -> SketchedGradients:
        """All rows in memory."""
        blocks = list(self.blocks())
        if not blocks:
            return SketchedGradients(torch.zeros(0, self.sketch.dim), self.sketch, self.metadata())
        return SketchedGradients.cat(blocks)

    def queries(self) -> dict[int, SketchedGradients]:
        """The validation examples' rows written while training, by the step of their checkpoint."""
        steps = self.kept.columns["step"].unique().tolist()
        return {step: replace(self, rows=self.kept).where(step=step).read() for step in steps}

    def appender(self, attempt: Run, rank: int = 0, **options: Any) -> RowAppender:
        """What one process writes the rows of an attempt with."""
        return RowAppender(rows_folder(self.path), self.spec, rank, attempt.number, **options)

    def verify(self) -> int:
        """Read every file and compare its checksum; returns the number of rows, live or not.

        Raises:
            CorruptShard: naming every file that is cut, changed, foreign or missing.
        """
        return maintenance.verify(self.path, self.spec)

    def compact(self: Store, shard_bytes: int = 256 << 20) -> Store:
        """Drop rows that no longer count and merge small files; all lines but the latest are gone then.

        Killed at any point, the store is as before or as after. No run may be writing to it.
        """
        whole = self.open(self.path, "latest")
        maintenance.compact(self.path, self.spec, StoredRows.cat(whole.rows, whole.kept), shard_bytes)
        return self.open(self.path)

    def export(self, kind: str, folder: str | Path) -> None:
        """Copy the rows out: "npy" writes `sketches.npy` in float32 and a file per column.

        Raises:
            ValueError: for another kind.
        """
        if kind != "npy":
            raise ValueError(f"export({kind!r}) is not known; use 'npy'.")
        maintenance.export_npy(self.blocks(), self.metadata(), self.sketch.dim, Path(folder))

    def shards(self) -> list[str]:
        """The files that hold the rows, and where in them: for `read_shard`, on any machine that sees them."""
        folder = rows_folder(self.path)
        parts = ((name, _runs(places, len(places))) for name, places, _ in self.rows.by_file())
        return [f"{folder / name.path}#{','.join(f'{a}-{b}' for a, b, _ in runs)}" for name, runs in parts]


def read_shard(uri: str) -> SketchedGradients:
    """The rows of a store that lie in one of its files: a plain function, to be sent to other processes.

    Args:
        uri: one of `store.shards()`.
    """
    file, _, runs = uri.rpartition("#")
    path = Path(file)
    spec = StoreSpec.read(next(parent for parent in path.parents if (parent / "spec.json").exists()))
    bounds = (map(int, run.split("-")) for run in runs.split(","))
    return Shard(path.parents[2], ShardName.of(path), spec).rows(torch.cat([torch.arange(a, b) for a, b in bounds]))


def _runs(places: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Rising places in a file as ranges (start, stop), each with the index of its first."""
    begin = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1 or i - begin == most:
            yield places[begin], places[i - 1] + 1, begin
            begin = i
