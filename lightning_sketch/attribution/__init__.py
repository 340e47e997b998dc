"""Training-data attribution: sketched gradients of examples, curvature in sketch space, influence scores and top-k."""

from lightning_sketch.attribution.calibrate import Calibration, calibrate
from lightning_sketch.attribution.curvature import Curvature, Influence
from lightning_sketch.attribution.fit_preconditioner import fit_preconditioner
from lightning_sketch.attribution.ggn import fit_ggn
from lightning_sketch.attribution.gradient_store import GradientStore
from lightning_sketch.attribution.indexed_dataset import Indexed, IndexedDataset, batch_ids, indexed
from lightning_sketch.attribution.preconditioner import Preconditioner
from lightning_sketch.attribution.ray import ray_scores, ray_top_k
from lightning_sketch.attribution.report import report
from lightning_sketch.attribution.report_table import report_table
from lightning_sketch.attribution.row_curvature import row_curvature
from lightning_sketch.attribution.scores import TopK, reliability, scored_rows, scores, together, top_k
from lightning_sketch.attribution.self_influence import SelfInfluence, self_influence
from lightning_sketch.attribution.sketch_gradients import sketch_gradients
from lightning_sketch.attribution.split_half import suggest_dim
from lightning_sketch.store import (
    STAGES,
    CorruptFile,
    CorruptShard,
    RowAppender,
    RowSource,
    SketchedGradients,
    StoreSpec,
    Strings,
    read_shard,
)

__all__ = [
    "STAGES",
    "Calibration",
    "CorruptFile",
    "CorruptShard",
    "Curvature",
    "GradientStore",
    "Indexed",
    "IndexedDataset",
    "Influence",
    "Preconditioner",
    "RowAppender",
    "RowSource",
    "SelfInfluence",
    "SketchedGradients",
    "StoreSpec",
    "Strings",
    "TopK",
    "batch_ids",
    "calibrate",
    "fit_ggn",
    "fit_preconditioner",
    "indexed",
    "ray_scores",
    "ray_top_k",
    "read_shard",
    "reliability",
    "report",
    "report_table",
    "row_curvature",
    "scored_rows",
    "scores",
    "self_influence",
    "sketch_gradients",
    "suggest_dim",
    "together",
    "top_k",
]
