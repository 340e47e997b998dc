"""Training in a random subspace of the weights, and the search for the smallest dimension that suffices."""

from lightning_sketch.subspace.bound import GeneralizationBound, error_bound, generalization_bound
from lightning_sketch.subspace.export import load_subspace, quantize, save_subspace
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.result import IntrinsicDimensionResult
from lightning_sketch.subspace.subspace_model import SubspaceModel
from lightning_sketch.subspace.subspace_module import SubspaceModule
from lightning_sketch.subspace.tuner import IntrinsicDimensionTuner

__all__ = [
    "GeneralizationBound",
    "IntrinsicDimensionFinder",
    "IntrinsicDimensionResult",
    "IntrinsicDimensionTuner",
    "SubspaceModel",
    "SubspaceModule",
    "error_bound",
    "generalization_bound",
    "load_subspace",
    "quantize",
    "save_subspace",
]
