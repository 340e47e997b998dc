"""Gradients of single examples: by hooks from the ordinary backward pass, by vmap, or one at a time."""

from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.example_sketches import ExampleGradients, ExampleSketches
from lightning_sketch.per_example.factors import Bias, Dense, Factor, LowRank, SparseRows, Unsupported
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.rules.registry import register_layer

__all__ = [
    "Bias",
    "Dense",
    "ExampleGradients",
    "ExampleHooks",
    "ExampleSketches",
    "Factor",
    "LowRank",
    "SketchAccumulator",
    "SparseRows",
    "Unsupported",
    "register_layer",
]
