"""Maintenance of a store: verify its files, compact it, export its rows."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from lightning_sketch._files import sync_folder
from lightning_sketch.store.index import StoredRows, missing_files
from lightning_sketch.store.lineage import lineage_of, read_runs
from lightning_sketch.store.manifest import next_folder, rows_folder, switch
from lightning_sketch.store.shards import CorruptShard, Shard, ShardName
from lightning_sketch.store.sketched_gradients import SketchedGradients
from lightning_sketch.store.spec import StoreSpec
from lightning_sketch.store.writer import RowAppender

_NEVER = 1e6  # seconds: while compacting, files are cut by size alone


def verify(path: Path, spec: StoreSpec) -> int:
    """Read every file of rows, compare its checksum, and return the number of rows, visible or not.

    Raises:
        CorruptShard: if files are truncated, changed, foreign or missing; the message names all. Nothing is repaired.
    """
    folder, wrong, rows = rows_folder(path), [], 0
    names = []
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            shard = Shard(folder, ShardName.of(file), spec)
            shard.verify()
            names.append(shard.name)
            rows += len(shard)
        except CorruptShard as error:
            wrong.append(str(error))
            names += [ShardName.of(file)] if "is not a file of a store" not in str(error) else []
    wrong += [f"{folder / name.path} is missing: a later file of its writer exists." for name in missing_files(names)]
    if wrong:
        raise CorruptShard(f"{len(wrong)} files of {path} are not as they were written:\n" + "\n".join(wrong))
    return rows


def compact(path: Path, spec: StoreSpec, visible: StoredRows, shard_bytes: int) -> None:
    """Replace the rows of a store by its visible ones, in files of about `shard_bytes` bytes.

    Killed at any point, the store is as before or as after. No other process may write at the same time.
    """
    old, new = rows_folder(path), next_folder(path)
    appenders: dict[tuple[int, int], RowAppender] = {}
    for name, places, _ in visible.by_file():
        shard = Shard(old, name, spec)
        shard.verify()  # a changed bit would get a new, matching checksum
        key = (name.rank, name.run)
        if key not in appenders:
            for appender in appenders.values():
                appender.close()
            appenders = {
                key: RowAppender(new, spec, rank=name.rank, run=name.run, shard_bytes=shard_bytes, flush_seconds=_NEVER)
            }
        appenders[key].put(shard.rows(torch.tensor(places)))
    for appender in appenders.values():
        appender.close()
    for folder in (*new.rglob("*/"), new, path):
        sync_folder(folder)
    runs = read_runs(path)
    lineage = lineage_of(runs)
    switch(path, {run.number: lineage.get(run.number, 0) for run in runs if run.stage == "fit"})


def export_npy(blocks: Iterable[SketchedGradients], columns: dict[str, torch.Tensor], dim: int, folder: Path) -> None:
    """Write `sketches.npy`, (rows, dim) in float32, and a file per column, with one block in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(columns["step"])
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column.numpy())
    out = np.lib.format.open_memmap(folder / "sketches.npy", mode="w+", dtype=np.float32, shape=(count, dim))
    start = 0
    for block in blocks:
        out[start : start + len(block)] = block.sketches.float().numpy()
        start += len(block)
    out.flush()
