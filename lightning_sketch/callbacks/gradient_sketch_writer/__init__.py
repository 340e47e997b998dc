"""The callback that stores sketched gradients during training and at checkpoints."""

from lightning_sketch.callbacks.gradient_sketch_writer.writer import GradientSketchWriter

__all__ = ["GradientSketchWriter"]
