"""Torchmetrics that say how good an attribution is."""

from lightning_sketch.metrics.linear_datamodeling_score import LinearDatamodelingScore

__all__ = ["LinearDatamodelingScore"]
