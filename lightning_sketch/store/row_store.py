"""A store of sketched gradients on disk, read lazily."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch._files import CorruptFile, locked
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store import export, maintenance
from lightning_sketch.store.format import (
    CorruptShard,
    Run,
    RunStage,
    Shard,
    ShardName,
    Snapshot,
    begin_run,
    create_store,
    read_runs,
)
from lightning_sketch.store.index import lineage_of, read_index, visible
from lightning_sketch.store.sketched_gradients import (
    STAGES,
    Column,
    SketchedGradients,
    contents,
    described,
    keys_of,
    matching,
)
from lightning_sketch.store.spec import DTYPES, StoreSpec
from lightning_sketch.store.writer import RowAppender

Store = TypeVar("Store", bound="RowStore")


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a store without their sketches, in the order of their files.

    Args:
        columns: The columns of the rows, by name.
        files: The names of the store's files of rows.
        file: For each row, the index of its file in `files`.
        place: For each row, its position in that file.
    """

    columns: Mapping[str, Column]
    files: Sequence[ShardName]
    file: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.file)

    def __repr__(self) -> str:
        files = len(self.file.unique())
        return f"StoredRows: {len(self)} rows in {files} file{'s' if files != 1 else ''}{contents(self.columns)}"

    def where(self, mask: Tensor | slice) -> "StoredRows":
        """Select the rows where a mask, (rows,), is true, or adjacent ones."""
        columns = {name: column[mask] for name, column in self.columns.items()}
        return StoredRows(columns, self.files, self.file[mask], self.place[mask])

    def by_file(self) -> Iterator[tuple[ShardName, slice]]:
        """Yield the name of each file with the slice of the rows that are in it."""
        start = 0
        for i, count in zip(
            *(found.tolist() for found in self.file.unique_consecutive(return_counts=True)), strict=True
        ):
            yield self.files[i], slice(start, start := start + count)


@dataclass(frozen=True, eq=False)
class RowStore(export.ReadFromDisk):
    """Sketched gradients on disk, one row per optimizer step or per example, as `GradientSketchWriter` writes them.

    `len`, `metadata`, `where` and `blocks` see the visible rows: those of the latest fit and of the runs that it
    resumed, each step once, and those taken at checkpoints; not the `queries`, which are stored beside them. At the
    same weights, and in one stage, rows of other examples add up, of the same example (its id and loader) the last
    run's are visible, and a run without ids replaces what was there.

    Made by `open` or `create`. It reads the files that were there then, each of which is compared with its checksum
    when it is first read. After `compact()`, by whatever process, it says that it must be opened again.

    Args:
        snapshot: Which store, and which files of it.
        rows: Index of the visible rows.
        query_rows: Index of the visible rows of stored queries.

    Example::

        store = RowStore.open("lightning_logs/version_0/sketches")
        for block in store.where(stage="fit").blocks():
            print(block.step, block.sketches.float().norm(dim=1))
    """

    snapshot: Snapshot
    rows: StoredRows
    query_rows: StoredRows
    _checked: set[ShardName] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls: type[Store], path: str | Path | None, lineage: Literal["latest"] | SupportsIndex = "latest") -> Store:
        """Open a store as it is now; open it again to see rows that are written later.

        Args:
            path: The folder that was written, the writer's `dirpath`.
            lineage: "latest", or the number of a fit: the rows of this fit and of the runs that it resumed are visible.

        Raises:
            FileNotFoundError: if the folder has no store.
            CorruptFile: if a file is truncated, changed or foreign; `RowStore.verify` lists all such files.
            ValueError: if there is no such fit, or `path` is None, the `dirpath` of a writer that has not written.
        """
        if path is None:
            raise ValueError("got path=None, which a writer's dirpath is until it has written; run trainer.fit first.")
        if not isinstance(path, str | Path):
            raise ValueError(
                f"open() takes the folder of a store, such as writer.dirpath, got a {type(path).__name__}."
            )
        folder, last = Path(path).absolute(), _fit_number(lineage)
        while True:
            snapshot = Snapshot.read(folder)
            runs = read_runs(snapshot)
            try:
                missing, columns, names, file, place = read_index(snapshot, runs)
            except CorruptFile:
                if Snapshot.read(folder).number == snapshot.number:
                    raise
                continue  # compaction has removed the files meanwhile
            if Snapshot.read(folder).number == snapshot.number:
                break
        if missing:
            listed = ", ".join(missing)
            warnings.warn(f"rows are missing, since these files were written and are gone: {listed}.", stacklevel=2)
        chosen = lineage_of(runs, last, snapshot.kept)
        unfinished = [run.number for run in runs if run.incomplete and run.number in chosen]
        if unfinished:
            warnings.warn(f"some steps of runs {unfinished} have no rows, which could not be written.", stacklevel=2)
        mask = visible(columns, runs, chosen)
        rows = StoredRows(columns, names, file, place).where(mask)
        queries = keys_of(rows.columns["stage"]) == STAGES.index("queries")
        return cls(snapshot, rows.where(~queries), rows.where(queries))

    @classmethod
    def create(cls: type[Store], path: str | Path, spec: StoreSpec, *, overwrite: bool = False) -> Store:
        """Create a store in a folder, or open the store that the folder has, if its spec is equal.

        Args:
            path: The folder.
            spec: The sketch, parameters and number type of the rows.
            overwrite: Whether to delete the store that the folder has; files that are not of a store stay.

        Raises:
            ValueError: if the folder has a store of another spec; the message shows both.
            CorruptFile: if the folder has a part of a store.
        """
        if overwrite:
            maintenance.erase(Path(path))
        create_store(Path(path), spec)
        return cls.open(path)

    def begin_run(
        self,
        stage: RunStage,
        *,
        parent: int | None = None,
        parent_step: int | None = None,
        world_size: int = 1,
        optimizer: str = "",
    ) -> Run:
        """Record a new run, before its rows are appended; one process does so for all.

        Args:
            stage: "fit", "validate", "test" or "predict".
            parent: Number of the fit that this one resumes, or at whose weights it takes its rows, if it is known.
            parent_step: Optimizer steps done at the checkpoint that this run resumes from.
            world_size: Number of processes that will write.
            optimizer: The classes of the optimizers, separated by commas, such as "AdamW".

        Raises:
            ValueError: if the stage or the parent is unknown, or compaction has dropped the parent's last steps.
        """
        return begin_run(self.path, stage, parent, parent_step, world_size, optimizer=optimizer)

    @property
    def path(self) -> Path:
        """The folder of the store."""
        return self.snapshot.path

    @property
    def spec(self) -> StoreSpec:
        """The sketch, parameters and number type of the rows."""
        return self.snapshot.spec

    @property
    def sketch(self) -> Sketch:
        """The sketch that made the rows."""
        return self.spec.operator

    @property
    def parts(self) -> Int[Tensor, " rows"]:
        """The number of the part, here a file, that each visible row is in."""
        return self.rows.file

    @property
    def optimizers(self) -> frozenset[str]:
        """The classes of the optimizers that trained the weights of the visible rows, as far as they are known."""
        runs = {run.number: run for run in read_runs(self.snapshot)}
        own = [runs[number] for number in keys_of(self.rows.columns["attempt"]).unique().tolist()]
        trained = [run if run.optimizer or run.parent is None else runs[run.parent] for run in own]
        return frozenset(name.strip() for run in trained for name in run.optimizer.split(",") if name.strip())

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        rows = described(self.rows.columns, DTYPES[self.spec.dtype], self.sketch)
        queries = f"\n    {len(self.query_rows)} rows of stored queries" if len(self.query_rows) else ""
        return f"{type(self).__name__} in {self.path}: {rows}{queries}"

    def metadata(self) -> dict[str, Any]:
        """Return the columns of the visible rows by name, tensors or `Strings`; no sketch is read."""
        return dict(self.rows.columns)

    def part(self: Store, rows: slice) -> Store:
        """Return adjacent rows without their columns, to be sent to another process."""
        file = self.rows.file[rows]
        numbers, file = file.unique(return_inverse=True)
        names = [self.rows.files[i] for i in numbers.tolist()]
        none = self.query_rows.where(slice(0, 0))
        bare = StoredRows({}, names, file, self.rows.place[rows].clone())
        return replace(self, rows=bare, query_rows=replace(none, columns={}, files=[]), _checked=set())

    def where(self: Store, mask: Any = None, **equal: Any) -> Store:
        """Select the rows where a mask is true and columns have given values; no sketch is read.

        Args:
            mask: Booleans, one per visible row.
            **equal: Column names with the value that the rows must have, or a list of such values; a stage is given by
                its name. A column of lists, such as `example_ids`, must contain one of the values.

        Raises:
            ValueError: if a column or a stage is unknown, the mask is not one boolean per row, or a value cannot be in
                its column.
        """
        return replace(self, rows=self.rows.where(matching(self.rows.columns, len(self), mask, equal)))

    def blocks(self, batch_rows: int = 4096) -> Iterator[SketchedGradients]:
        """Yield the rows in order, at most `batch_rows` at a time; adjacent ones in bfloat16 or float32 are not copied.

        Raises:
            CorruptFile: if a file is not what was written; it is compared with its checksum before its first block.
            RuntimeError: if the store was compacted since it was opened.
        """
        for part, shard, places in self._read(batch_rows):
            columns = {key: column[part] for key, column in self.rows.columns.items()}
            yield SketchedGradients(shard.sketches(places), self.sketch, columns)

    def scaled_blocks(self, batch_rows: int = 4096) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the sketches as they are stored, and the scales that they lack in float16; errors as `blocks`."""
        for _, shard, places in self._read(batch_rows):
            yield shard.scaled(places)

    def _read(self, batch_rows: int) -> Iterator[tuple[slice, Shard, slice | Tensor]]:
        """Yield where in the store and in a file rows are, at most `batch_rows` at a time."""
        batch_rows = whole_number(batch_rows, "batch_rows")
        parts = list(self.rows.by_file())
        with ThreadPoolExecutor(1, "check of a shard") as pool:  # the next file, while the last is worked on
            following = [pool.submit(self._open_shard, parts[0][0])] if parts else []
            for i, (_, rows) in enumerate(parts):
                shard = following.pop().result()
                following = [pool.submit(self._open_shard, name) for name, _ in parts[i + 1 : i + 2]]
                for start in range(rows.start, rows.stop, batch_rows):
                    part = slice(start, min(start + batch_rows, rows.stop))
                    yield part, shard, _span(self.rows.place[part])

    def _open_shard(self, name: ShardName) -> Shard:
        """Open a file, and compare it with its checksum when it is first read."""
        try:
            shard = Shard(self.snapshot, name)
            if name not in self._checked:
                shard.check()
                self._checked.add(name)
            shard.sketches(slice(0, 0))  # maps the file, which stays readable then if it is removed
        except FileNotFoundError as error:
            if Snapshot.read(self.path).folder == self.snapshot.folder:
                raise CorruptShard(f"{self.snapshot.folder / name.path} is gone since the store was opened.") from error
            raise RuntimeError(
                f"the store in {self.path} was compacted since this object was opened, which reads the files that were "
                f"there before; open it again: {type(self).__name__}.open(path), or use what compact() returned."
            ) from error
        return shard

    def read(self) -> SketchedGradients:
        """Read all rows into memory."""
        blocks = list(self.blocks())
        if not blocks:
            return SketchedGradients(torch.zeros(0, self.sketch.dim), self.sketch, self.metadata())
        return SketchedGradients.cat(blocks)

    def queries(self) -> dict[int, SketchedGradients]:
        """Read the validation examples' rows that were written during training, by the step of their checkpoint."""
        steps = keys_of(self.query_rows.columns["step"]).unique().tolist()
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
        return RowAppender.open(
            self.path,
            rank=rank,
            run=run.number,
            shard_bytes=shard_bytes,
            flush_seconds=flush_seconds,
            queue_bytes=queue_bytes,
        )

    def verify(self, on_file: Callable[[], object] | None = None) -> int:
        """Read every file, compare its checksum, and return the number of rows, visible or not.

        Args:
            on_file: Called after each file, to show progress.

        Raises:
            CorruptFile: if files are truncated, changed, foreign or missing; the message names all.
        """
        return maintenance.verify(self.path, on_file)

    def compact(self: Store, shard_bytes: int = 256 << 20, *, accept_loss: bool = False) -> Store:
        """Delete the rows that are not visible, merge small files, and return the store as it is then.

        Only the latest lineage is left, and of an example that was measured again at the same weights the last rows.
        Killed at any point, the store is as before or as after. Objects that have the store open, this one too, must
        be opened again.

        Args:
            shard_bytes: Bytes of rows in a file.
            accept_loss: Go on although files are missing; their rows are lost then, and not named any more.

        Raises:
            Busy: if another process compacts the store or writes to it.
            CorruptFile: if a file is missing or has changed since it was written.
        """
        maintenance.compact(self.path, self.visible_places, shard_bytes, accept_loss)
        return self.open(self.path)

    def visible_places(self) -> dict[ShardName, Tensor]:
        """Return the positions of the rows of each file that are visible now, those of queries too."""
        with warnings.catch_warnings():  # what is missing is said, or was accepted
            warnings.simplefilter("ignore")
            now = self.open(self.path)
        found: dict[ShardName, Tensor] = {}
        for rows in (now.rows, now.query_rows):
            for name, part in rows.by_file():
                found[name] = torch.cat([found.get(name, rows.place[:0]), rows.place[part]]).sort()[0]
        return dict(sorted(found.items()))

    def export(
        self,
        kind: Literal["npy", "parquet", "lance"],
        path: str | Path,
        *,
        append: bool = False,
        neighbors: int | None = None,
        dtype: Literal["float16", "float32"] | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """Export the rows to another format, with one block of them in memory at a time.

        Args:
            kind: "npy" writes `sketches.npy`, (rows, dim) in float32, and one file per column, beside what else is in
                the folder; "parquet" one file of all columns and `sketch`, for DuckDB, Polars and viewers; "lance" a
                Lance dataset, for `LanceRows`.
            path: The folder, the file or the dataset, which may be an address in an object store.
            append: Whether the Lance dataset may be there: rows that it lacks are added, and those that are not visible
                in the store any more are removed; those that `where` has left out stay. Every row is there once,
                whenever an export was killed.
            neighbors: How many rows of the largest cosines each row of a Parquet file names in a column `neighbors`, as
                `embedding-atlas rows.parquet --vector sketch --neighbors neighbors` reads them: `ids`, which count rows
                from zero, its own first, and `distances`, 1 - cosine. Costs a product of all rows with all rows, and
                reads all of them once for each thousand.
            dtype: Type of the sketches of a new Lance dataset: "float16", with a scale per row, if the store has that,
                else "float32", which is exact.
            storage_options: Keys of the object store, as Lance takes them.

        Raises:
            ValueError: if the kind is unknown, an option is of another kind, there are no rows, or the Lance dataset is
                there without `append`, or of another sketch.
            ImportError: if pyarrow or pylance is missing.
            Busy: if another process exports the store to Lance.
        """
        if kind not in ("npy", "parquet", "lance"):
            raise ValueError(f"export({kind!r}) is not known; use 'npy', 'parquet' or 'lance'.")
        if neighbors is not None:
            neighbors = whole_number(neighbors, "neighbors", usual=15)
            if kind != "parquet":
                raise ValueError(f"neighbors is of 'parquet', got {kind!r}; leave it out, or export('parquet', path).")
        if kind != "lance" and (append or dtype is not None or storage_options is not None):
            raise ValueError(f"append, dtype and storage_options are of 'lance'; leave them out for {kind!r}.")
        if kind == "npy":
            export.to_npy(self.blocks(), self.rows.columns, self.sketch.dim, Path(path))
        elif kind == "parquet":
            export.to_parquet(self.blocks, Path(path), neighbors)
        else:
            from lightning_sketch.store import lance_export  # which few need

            with locked(self.path / "export.lock", f"{self.path} is being exported by another process; try again."):
                lance_export.to_lance(self, str(path), append=append, dtype=dtype, storage_options=storage_options)

    def shards(self) -> list[str]:
        """Return one string per file of visible rows, which `read_shard` reads in any process that sees the file."""
        uris = []
        for name, rows in self.rows.by_file():
            places = self.rows.place[rows]
            (jumps,) = (places.diff() != 1).nonzero(as_tuple=True)
            bounds = zip([0, *(jumps + 1).tolist()], [*jumps.tolist(), -1], strict=True)
            runs = ",".join(f"{places[a]}-{places[b] + 1}" for a, b in bounds)
            uris.append(f"{self.snapshot.folder / name.path}#{runs}")
        return uris


def read_shard(uri: str) -> SketchedGradients:
    """Read a store's visible rows in one of its files; a plain function, so that it can be sent to other processes.

    Args:
        uri: One of the strings that `store.shards()` returns.

    Raises:
        FileNotFoundError: if the store was compacted since.
        CorruptFile: if the file is truncated, changed or foreign.
    """
    file, _, runs = uri.rpartition("#")
    path = Path(file)
    folder = path.parents[2]
    snapshot = Snapshot.read(folder.parent)
    number = int(folder.name.partition("-")[2] or 1)
    shard = Shard(replace(snapshot, number=number), ShardName.of(path))
    shard.check()
    bounds = (map(int, run.split("-")) for run in runs.split(","))
    return shard.rows(torch.cat([torch.arange(a, b) for a, b in bounds]))


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


def _span(places: Int[Tensor, " rows"]) -> slice | Tensor:
    """Return rising positions as a slice if they are adjacent."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first == len(places) - 1 else places
