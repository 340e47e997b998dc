"""Metrics of attribution quality, as torchmetrics."""

from lightning_sketch.metrics.linear_datamodeling_score import LinearDatamodelingScore

__all__ = ["LinearDatamodelingScore"]
