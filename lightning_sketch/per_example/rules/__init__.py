"""Rules that split the gradients of layers into examples, one family of layers a file, with their registry."""

from lightning_sketch.per_example.rules import attention as attention
from lightning_sketch.per_example.rules import convolution as convolution
from lightning_sketch.per_example.rules import linear as linear
from lightning_sketch.per_example.rules import normalization as normalization
from lightning_sketch.per_example.rules.registry import register_layer, rule_of

__all__ = ["register_layer", "rule_of"]
