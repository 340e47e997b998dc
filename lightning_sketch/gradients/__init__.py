"""A model's loss and its gradients, without side effects."""

from lightning_sketch.gradients.examples import HALF as HALF
from lightning_sketch.gradients.examples import differentiable as differentiable
from lightning_sketch.gradients.examples import each_example as each_example
from lightning_sketch.gradients.examples import labels_of as labels_of
from lightning_sketch.gradients.examples import num_examples as num_examples
from lightning_sketch.gradients.examples import num_labels as num_labels
from lightning_sketch.gradients.examples import on_device as on_device
from lightning_sketch.gradients.examples import split_batch as split_batch
from lightning_sketch.gradients.examples import tensors_of as tensors_of
from lightning_sketch.gradients.fingerprint import fingerprint as fingerprint
from lightning_sketch.gradients.hooks import ExampleHooks as ExampleHooks
from lightning_sketch.gradients.layers import register_layer as register_layer
from lightning_sketch.gradients.loss import LossFn as LossFn
from lightning_sketch.gradients.loss import training_step_loss as training_step_loss
from lightning_sketch.gradients.norms import couples as couples
from lightning_sketch.gradients.one_by_one import loop_sketches as loop_sketches
from lightning_sketch.gradients.one_by_one import vmap_sketches as vmap_sketches
from lightning_sketch.gradients.own_scale import check_reduction as check_reduction
from lightning_sketch.gradients.own_scale import own_scale as own_scale
from lightning_sketch.gradients.pieces import NotServed as NotServed
from lightning_sketch.gradients.substituted import graph_nodes as graph_nodes
from lightning_sketch.gradients.substituted import in_float32 as in_float32
from lightning_sketch.gradients.substituted import nowhere_else as nowhere_else
from lightning_sketch.gradients.substituted import substituted as substituted
from lightning_sketch.gradients.undisturbed import undisturbed as undisturbed
