"""Training in a random subspace of the weights, and the search for the smallest dimension that suffices."""

from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.result import IntrinsicDimensionResult
from lightning_sketch.subspace.subspace_model import SubspaceModel
from lightning_sketch.subspace.subspace_module import SubspaceModule
from lightning_sketch.subspace.tuner import IntrinsicDimensionTuner

__all__ = [
    "IntrinsicDimensionFinder",
    "IntrinsicDimensionResult",
    "IntrinsicDimensionTuner",
    "SubspaceModel",
    "SubspaceModule",
]
