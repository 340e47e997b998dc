"""Training in a random subspace of the weights, and the search for the smallest that is large enough."""

from lightning_sketch.subspace.finder import IntrinsicDimensionFinder as IntrinsicDimensionFinder
from lightning_sketch.subspace.result import IntrinsicDimensionResult as IntrinsicDimensionResult
from lightning_sketch.subspace.subspace_module import SubspaceModule as SubspaceModule
from lightning_sketch.subspace.tuner import IntrinsicDimensionTuner as IntrinsicDimensionTuner
