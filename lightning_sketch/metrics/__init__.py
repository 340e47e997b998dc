"""How good attributions are: a score as a torchmetrics metric, and removal of examples with retraining."""

from lightning_sketch.metrics.linear_datamodeling_score import LinearDatamodelingScore
from lightning_sketch.metrics.removal import RemovalCurve, leave_one_out, removal_curve

__all__ = ["LinearDatamodelingScore", "RemovalCurve", "leave_one_out", "removal_curve"]
