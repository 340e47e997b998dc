"""What hooks do not serve: told by the first batch, and served by a pass of its own for each example, if asked for."""

import warnings
from collections.abc import Callable, Collection
from typing import Any

from jaxtyping import Float
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, muted_loggers
from lightning_sketch.autodiff.batches import BatchStructure, differentiable
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import on_copies, training_step_loss
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.per_example.example_sketches import ExampleSketches
from lightning_sketch.per_example.reduction import own_scale
from lightning_sketch.per_example.verify import hooks_fail


def left_by_hooks(
    trainer: Trainer,
    module: nn.Module,
    layout: Layout,
    batch: Any,
    weight_fn: Callable[[Any], float] | None,
    reduction: str,
    structure: BatchStructure,
    fallback: str | None,
) -> dict[str, str]:
    """The parameters whose gradients hooks do not split into examples, with the reason; named in one warning.

    Of all ranks, whose first batches may take different ways through the module.

    Raises:
        MisconfigurationException: if they are all, and there is no fallback.
        ValueError: if the module is compiled, and there is no fallback.
    """
    parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
    with muted_loggers(trainer), preserve_state(module):
        scale = own_scale(batch, reduction, weight_fn, structure)
        try:
            loss_fn = on_copies(training_step_loss)
            own = hooks_fail(module, differentiable(batch), parameters, loss_fn, scale, structure)
        except ValueError as error:
            if fallback is None:
                raise
            own = dict.fromkeys(layout.names, str(error))
    left: dict[str, str] = {}
    for rank in range(trainer.world_size):
        left = {**trainer.strategy.broadcast(own, rank), **left}
    if fallback is None and len(left) == len(parameters):
        raise MisconfigurationException(
            f"no gradient of {type(module).__name__} can be split into examples: {next(iter(left.values()))}. Use "
            "fallback='loop', which takes a pass for each example, or per='step', or write rows at checkpoints: "
            "trainer.validate(model, train_loader)."
        )
    if left and trainer.is_global_zero:
        many = f"{len(left)} of {len(layout.names)} parameters"
        examples = structure.count(batch)
        passes = "a vectorized pass" if fallback == "vmap" else f"a pass for each of its {examples} examples"
        told = (
            f"rows leave out {many}; fallback='loop' would serve them"
            if fallback is None
            else f"fallback={fallback!r} serves {many}, at the price of {passes} more for every batch like the first, "
            "in evaluation mode"
        )
        listed = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        warnings.warn(f"{told}:{listed}", stacklevel=2)
    return left


def without(layout: Layout, names: Collection[str]) -> Layout:
    """The layout of the other parameters."""
    pairs = zip(layout.names, layout.shapes, strict=True)
    return Layout(*zip(*((name, shape) for name, shape in pairs if name not in names), strict=True))


class SecondPass:
    """A function: batch -> for each example, the sketch of its own gradient with respect to some parameters.

    At the module's present weights, in evaluation mode and float32 or wider: a pass for one example has no batch
    statistics, and no way to draw the dropout that the example met in its batch. Leaves nothing behind.

    Args:
        trainer: that trains.
        sketches: makes the gradients.
    """

    def __init__(self, trainer: Trainer, sketches: ExampleSketches):
        self.trainer, self.sketches = trainer, sketches

    def __call__(self, batch: Any) -> Float[Tensor, "examples dim"]:
        """The rows, where other parameters count as zero."""
        with muted_loggers(self.trainer), preserve_state(self.sketches.module):
            return self.sketches(differentiable(batch))[0]
