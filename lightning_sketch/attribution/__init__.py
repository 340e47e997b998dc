"""Sketched gradients: made, stored, and asked which examples taught what."""

from lightning_sketch.attribution.appender import RowAppender as RowAppender
from lightning_sketch.attribution.indexed_dataset import IndexedDataset as IndexedDataset
from lightning_sketch.attribution.indexed_dataset import batch_ids as batch_ids
from lightning_sketch.attribution.rows import STAGES as STAGES
from lightning_sketch.attribution.rows import SketchedGradients as SketchedGradients
from lightning_sketch.attribution.shards import CorruptShard as CorruptShard
from lightning_sketch.attribution.sketch_gradients import sketch_gradients as sketch_gradients
from lightning_sketch.attribution.spec import StoreSpec as StoreSpec
from lightning_sketch.attribution.store import GradientStore as GradientStore
from lightning_sketch.attribution.store import read_shard as read_shard
