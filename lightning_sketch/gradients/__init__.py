"""A model's loss and its gradients, without side effects."""

from lightning_sketch.gradients.loss import LossFn as LossFn
from lightning_sketch.gradients.loss import num_examples as num_examples
from lightning_sketch.gradients.loss import training_step_loss as training_step_loss
from lightning_sketch.gradients.undisturbed import undisturbed as undisturbed
