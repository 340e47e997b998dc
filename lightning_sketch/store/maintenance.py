"""What a store needs now and then: to be checked, made smaller, and copied out."""

from pathlib import Path

import numpy as np
import torch

from lightning_sketch._files import sync_folder
from lightning_sketch.store.index import StoredRows, gaps
from lightning_sketch.store.lineage import lineage_of, read_runs
from lightning_sketch.store.manifest import next_folder, rows_folder, switch
from lightning_sketch.store.shards import CorruptShard, Shard, ShardName
from lightning_sketch.store.spec import StoreSpec
from lightning_sketch.store.writer import RowAppender

_LATER = 1e6
"""Seconds: files are cut by size alone."""


def verify(path: Path, spec: StoreSpec) -> int:
    """Read every file of rows and compare its checksum; the number of rows, live or not.

    Raises:
        CorruptShard: naming every file that is cut, changed, foreign or missing. Nothing is repaired.
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
    wrong += [f"{folder / name.path} is missing: a later file of its writer is there." for name in gaps(names)]
    if wrong:
        raise CorruptShard(f"{len(wrong)} files of {path} are not as they were written:\n" + "\n".join(wrong))
    return rows


def compact(path: Path, spec: StoreSpec, live: StoredRows, shard_bytes: int) -> None:
    """Keep the live rows only, in files of this size; killed at any point, the store is as before or as after.

    No other process may write meanwhile.
    """
    old, new = rows_folder(path), next_folder(path)
    appenders: dict[tuple[int, int], RowAppender] = {}
    for name, places, _ in live.by_file():
        shard = Shard(old, name, spec)
        shard.verify()  # a changed bit would get a checksum that fits
        key = (name.rank, name.attempt)
        if key not in appenders:
            for appender in appenders.values():
                appender.close()
            appenders = {key: RowAppender(new, spec, *key, shard_bytes=shard_bytes, flush_seconds=_LATER)}
        appenders[key].put(shard.rows(torch.tensor(places)))
    for appender in appenders.values():
        appender.close()
    for folder in (*new.rglob("*/"), new, path):
        sync_folder(folder)
    attempts = read_runs(path)
    line = lineage_of(attempts)
    switch(path, {attempt.number: line.get(attempt.number, 0) for attempt in attempts if attempt.stage == "fit"})


def export_npy(blocks, columns: dict[str, torch.Tensor], dim: int, folder: Path) -> None:
    """`sketches.npy`, (rows, dim) in float32, and a file per column; streamed, never the whole in memory."""
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
