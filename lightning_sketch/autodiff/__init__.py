"""A model as a function: parameters as one vector, a loss without side effects, batches, output losses, derivatives."""

from lightning_sketch.autodiff.batches import num_examples, num_labels
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import CrossEntropy, LossFn, SquaredError, training_step_loss
from lightning_sketch.autodiff.preserve_state import preserve_state

__all__ = [
    "CrossEntropy",
    "Layout",
    "LossFn",
    "SquaredError",
    "fingerprint",
    "num_examples",
    "num_labels",
    "preserve_state",
    "training_step_loss",
]
