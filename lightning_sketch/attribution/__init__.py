"""Sketched gradients: made, stored, and asked which examples taught what."""

from lightning_sketch.attribution.appender import RowAppender as RowAppender
from lightning_sketch.attribution.calibrate import Calibration as Calibration
from lightning_sketch.attribution.calibrate import calibrate as calibrate
from lightning_sketch.attribution.curvature import Curvature as Curvature
from lightning_sketch.attribution.ggn import fit_ggn as fit_ggn
from lightning_sketch.attribution.indexed_dataset import IndexedDataset as IndexedDataset
from lightning_sketch.attribution.indexed_dataset import batch_ids as batch_ids
from lightning_sketch.attribution.row_curvature import row_curvature as row_curvature
from lightning_sketch.attribution.rows import STAGES as STAGES
from lightning_sketch.attribution.rows import SketchedGradients as SketchedGradients
from lightning_sketch.attribution.scoring import scores as scores
from lightning_sketch.attribution.scoring import together as together
from lightning_sketch.attribution.self_influence import SelfInfluence as SelfInfluence
from lightning_sketch.attribution.self_influence import self_influence as self_influence
from lightning_sketch.attribution.shards import CorruptShard as CorruptShard
from lightning_sketch.attribution.sketch_gradients import sketch_gradients as sketch_gradients
from lightning_sketch.attribution.solve import Influence as Influence
from lightning_sketch.attribution.source import RowSource as RowSource
from lightning_sketch.attribution.spec import StoreSpec as StoreSpec
from lightning_sketch.attribution.store import GradientStore as GradientStore
from lightning_sketch.attribution.store import read_shard as read_shard
from lightning_sketch.attribution.top_k import TopK as TopK
from lightning_sketch.attribution.top_k import top_k as top_k
