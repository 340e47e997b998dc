"""Test classes to inherit for a sketch, or a rule for a layer, of your own."""

from lightning_sketch.testing.layer_rules import LayerRuleTests
from lightning_sketch.testing.sketches import SketchTests

__all__ = ["LayerRuleTests", "SketchTests"]
