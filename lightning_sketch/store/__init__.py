"""Tables of sketched gradients, in memory and in files that are written atomically; without Lightning."""

from lightning_sketch._files import Busy, CorruptFile
from lightning_sketch.store.format import CorruptShard, Run
from lightning_sketch.store.lance import LanceRows
from lightning_sketch.store.lance_index import build_index
from lightning_sketch.store.row_store import RowStore, read_shard
from lightning_sketch.store.sketched_gradients import STAGES, RowSource, SketchedGradients, Strings
from lightning_sketch.store.spec import StoreSpec
from lightning_sketch.store.writer import RowAppender

__all__ = [
    "STAGES",
    "Busy",
    "CorruptFile",
    "CorruptShard",
    "LanceRows",
    "RowAppender",
    "RowSource",
    "RowStore",
    "Run",
    "SketchedGradients",
    "StoreSpec",
    "Strings",
    "build_index",
    "read_shard",
]
