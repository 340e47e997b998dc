"""Tables of sketched gradients, in memory and in files that are written atomically; without Lightning."""

from lightning_sketch.store.lineage import Run
from lightning_sketch.store.row_store import RowStore, read_shard
from lightning_sketch.store.shards import CorruptShard
from lightning_sketch.store.sketched_gradients import STAGES, RowSource, SketchedGradients
from lightning_sketch.store.spec import StoreSpec
from lightning_sketch.store.writer import RowAppender

__all__ = [
    "STAGES",
    "CorruptShard",
    "RowAppender",
    "RowSource",
    "RowStore",
    "Run",
    "SketchedGradients",
    "StoreSpec",
    "read_shard",
]
