"""Tests to inherit: what a sketch or a layer's rule of one's own has to fulfill."""

from lightning_sketch.testing.layer_rules import LayerRuleTests
from lightning_sketch.testing.sketches import SketchTests

__all__ = ["LayerRuleTests", "SketchTests"]
