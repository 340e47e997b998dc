"""How good an attribution is."""

from lightning_sketch.metrics.linear_datamodeling_score import LinearDatamodelingScore as LinearDatamodelingScore
