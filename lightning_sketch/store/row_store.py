"""A store of sketched gradients on disk, read lazily."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypeVar

import torch
from torch import Tensor

from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store import maintenance
from lightning_sketch.store.index import QUERIES, StoredRows, read_index, visible_rows
from lightning_sketch.store.lineage import Run, RunStage, begin_run, lineage_of, read_runs
from lightning_sketch.store.manifest import rows_folder
from lightning_sketch.store.shards import Shard, ShardName
from lightning_sketch.store.sketched_gradients import SketchedGradients, described, matching
from lightning_sketch.store.spec import DTYPES, StoreSpec
from lightning_sketch.store.writer import RowAppender

Store = TypeVar("Store", bound="RowStore")


@dataclass(frozen=True, eq=False)
class RowStore:
    """Sketched gradients on disk, one row per optimizer step or per example, as `GradientSketchWriter` writes them.

    `len`, `metadata`, `where` and `blocks` see the visible rows: those of the latest fit and of the runs that it
    resumed, each step once, and those taken at checkpoints; not the `queries`, which are stored beside them.

    Args:
        path: The folder of the store.
        spec: The sketch, parameters and number type of the rows.
        rows: Index of the visible rows.
        query_rows: Index of the visible rows of stored queries.

    Example::

        store = RowStore.open("lightning_logs/version_0/sketches")
        for block in store.where(stage="fit").blocks():
            print(block.step, block.sketches.float().norm(dim=1))
    """

    path: Path
    spec: StoreSpec
    rows: StoredRows
    query_rows: StoredRows

    @classmethod
    def open(cls: type[Store], path: str | Path | None, lineage: Literal["latest"] | SupportsIndex = "latest") -> Store:
        """Open a store as it is now; open it again to see rows that are written later.

        Args:
            path: The folder that was written, the writer's `dirpath`.
            lineage: "latest", or the number of a fit: the rows of this fit and of the runs that it resumed are visible.

        Raises:
            FileNotFoundError: if the folder has no store.
            CorruptShard: if a file is truncated or foreign; `RowStore.verify` lists all such files.
            ValueError: if there is no such fit, or `path` is None, the `dirpath` of a writer that has not written.
        """
        if path is None:
            raise ValueError("got path=None, which a writer's dirpath is until it has written; run trainer.fit first.")
        path = Path(path)
        spec, runs = StoreSpec.read(path), read_runs(path)
        visible = visible_rows(read_index(rows_folder(path), spec), runs, lineage_of(runs, _fit_number(lineage)))
        queries = visible.columns["stage"] == QUERIES
        return cls(path, spec, visible.where(~queries), visible.where(queries))

    @classmethod
    def create(cls: type[Store], path: str | Path, spec: StoreSpec) -> Store:
        """Create a store in a folder, or open the store that the folder has, if its spec is equal.

        Args:
            path: The folder.
            spec: The sketch, parameters and number type of the rows.

        Raises:
            ValueError: if the folder has a store of another spec; the message shows both.
        """
        spec.write(Path(path))
        return cls.open(path)

    def begin_run(
        self, stage: RunStage, *, parent: int | None = None, parent_step: int | None = None, world_size: int = 1
    ) -> Run:
        """Record a new run, before its rows are appended; one process does so for all.

        Args:
            stage: "fit", "validate", "test" or "predict".
            parent: Number of the run that this one resumes, if any.
            parent_step: Optimizer steps done at the checkpoint that this run resumes from.
            world_size: Number of processes that will write.

        Raises:
            ValueError: if the stage or the parent is unknown, or compaction has dropped the parent's last steps.
        """
        return begin_run(self.path, stage, parent, parent_step, world_size)

    @property
    def sketch(self) -> Sketch:
        """The sketch that made the rows."""
        return self.spec.operator

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        rows = described(self.rows.columns, DTYPES[self.spec.dtype], self.sketch)
        queries = f"\n    {len(self.query_rows)} rows of stored queries" if len(self.query_rows) else ""
        return f"{type(self).__name__} in {self.path}: {rows}{queries}"

    def metadata(self) -> dict[str, Tensor]:
        """Return the columns of the visible rows by name, such as `step`, `example_id`, `loss`; no sketch is read."""
        return dict(self.rows.columns)

    def where(self: Store, mask: Tensor | None = None, **equal: Any) -> Store:
        """Select the rows where a mask is true and columns have given values; no sketch is read.

        Args:
            mask: Booleans, one per visible row.
            **equal: Column names with the value that the rows must have; a stage is given by its name.

        Raises:
            ValueError: if a column or a stage is unknown.
        """
        return replace(self, rows=self.rows.where(matching(self.rows.columns, len(self), mask, equal)))

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """Yield the rows in order, at most `batch_rows` at a time; bfloat16 and float32 are not copied in memory."""
        folder = rows_folder(self.path)
        for name, places, columns in self.rows.by_file():
            shard = Shard(folder, name, self.spec)
            scale = shard.scale()
            for start, stop, begin in _runs(places, batch_rows):
                part = {key: column[begin : begin + stop - start] for key, column in columns.items()}
                yield SketchedGradients(shard.sketches(start, stop, scale), self.sketch, part)

    def read(self) -> SketchedGradients:
        """Read all rows into memory."""
        blocks = list(self.blocks())
        if not blocks:
            return SketchedGradients(torch.zeros(0, self.sketch.dim), self.sketch, self.metadata())
        return SketchedGradients.cat(blocks)

    def queries(self) -> dict[int, SketchedGradients]:
        """Read the validation examples' rows that were written during training, by the step of their checkpoint."""
        steps = self.query_rows.columns["step"].unique().tolist()
        return {step: replace(self, rows=self.query_rows).where(step=step).read() for step in steps}

    def appender(
        self,
        run: Run,
        rank: int = 0,
        *,
        shard_bytes: int = 64 << 20,
        flush_seconds: float = 60.0,
        queue_bytes: int = 256 << 20,
    ) -> RowAppender:
        """Return the writer of one process's rows, a context manager.

        Args:
            run: The run, from `begin_run`.
            rank: Rank of the process.
            shard_bytes: Write a file when its rows have this many bytes,
            flush_seconds: or when its first row is this old.
            queue_bytes: Most bytes that wait for the disk.
        """
        return RowAppender(
            rows_folder(self.path),
            self.spec,
            rank=rank,
            run=run.number,
            shard_bytes=shard_bytes,
            flush_seconds=flush_seconds,
            queue_bytes=queue_bytes,
        )

    def verify(self) -> int:
        """Read every file, compare its checksum, and return the number of rows, visible or not.

        Raises:
            CorruptShard: if files are truncated, changed, foreign or missing; the message names all.
        """
        return maintenance.verify(self.path, self.spec)

    def compact(self: Store, shard_bytes: int = 256 << 20) -> Store:
        """Delete the rows that are not visible, merge small files, and return the store as it is then.

        Only the latest lineage is left. Killed at any point, the store is as before or as after. No run may write to it
        at the same time.

        Args:
            shard_bytes: Bytes of rows in a file.

        Raises:
            CorruptShard: if a file has changed since it was written.
        """
        whole = self.open(self.path)
        maintenance.compact(self.path, self.spec, StoredRows.cat(whole.rows, whole.query_rows), shard_bytes)
        return self.open(self.path)

    def export(self, kind: Literal["npy"], folder: str | Path) -> None:
        """Export the rows to files of another format.

        Args:
            kind: "npy" writes `sketches.npy`, (rows, dim) in float32, and one file per column.
            folder: Where to write them.

        Raises:
            ValueError: if the kind is unknown.
        """
        if kind != "npy":
            raise ValueError(f"export({kind!r}) is not known; use 'npy'.")
        maintenance.export_npy(self.blocks(), self.metadata(), self.sketch.dim, Path(folder))

    def shards(self) -> list[str]:
        """Return one string per file of visible rows, which `read_shard` reads in any process that sees the file."""
        folder = rows_folder(self.path)
        parts = ((name, _runs(places, len(places))) for name, places, _ in self.rows.by_file())
        return [f"{folder / name.path}#{','.join(f'{a}-{b}' for a, b, _ in runs)}" for name, runs in parts]


def read_shard(uri: str) -> SketchedGradients:
    """Read a store's visible rows in one of its files; a plain function, so that it can be sent to other processes.

    Args:
        uri: One of the strings that `store.shards()` returns.

    Raises:
        CorruptShard: if the file is truncated or foreign.
    """
    file, _, runs = uri.rpartition("#")
    path = Path(file)
    spec = StoreSpec.read(next(parent for parent in path.parents if (parent / "spec.json").exists()))
    bounds = (map(int, run.split("-")) for run in runs.split(","))
    return Shard(path.parents[2], ShardName.of(path), spec).rows(torch.cat([torch.arange(a, b) for a, b in bounds]))


def _fit_number(lineage: Any) -> int | None:
    """Return the number of a fit as an int, or None for "latest".

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(lineage, str) and lineage == "latest":
        return None
    try:
        if not isinstance(lineage, bool):
            return index(lineage)
    except TypeError:
        pass
    raise ValueError(f"lineage={lineage!r} is not known; use 'latest', or the number of a fit as an int.")


def _runs(places: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Yield rising positions in a file as ranges (start, stop) of at most `most`, each with the index of its first."""
    begin = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1 or i - begin == most:
            yield places[begin], places[i - 1] + 1, begin
            begin = i
