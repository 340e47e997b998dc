"""Which layers can have their gradients split into examples, and how; `registry` holds what these files register."""

from lightning_sketch.per_example.rules import attention, convolution, linear, normalization

__all__ = ["attention", "convolution", "linear", "normalization"]
