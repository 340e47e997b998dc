"""The parameters that hooks do not support, and a second pass that computes their gradients example by example."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

from jaxtyping import Float
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, muted_loggers
from lightning_sketch.autodiff.batches import BatchStructure, differentiable
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import on_copies, training_step_loss
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.per_example.example_sketches import ExampleSketches
from lightning_sketch.per_example.reduction import Reduction, own_scale
from lightning_sketch.per_example.verify import hooks_fail

Fallback = Literal["loop", "vmap"]  # engines of the second pass


def unsupported_by_hooks(
    trainer: Trainer,
    module: nn.Module,
    layout: Layout,
    batch: Any,
    weight_fn: Callable[[Any], float] | None,
    reduction: Reduction,
    structure: BatchStructure,
    fallback: Fallback | None,
) -> dict[str, str]:
    """Find the parameters whose gradients hooks cannot split into examples, with the reasons, and warn of them.

    Those of all ranks are returned, since their first batches may take different paths through the module.

    Args:
        trainer: The Trainer that runs the fit.
        module: The module that is trained.
        layout: The parameters that rows are to cover.
        batch: The first batch.
        weight_fn: batch -> its weight in a mean.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        structure: Counts and splits the examples of a batch.
        fallback: The engine of the second pass, or None for no such pass.

    Raises:
        MisconfigurationException: If hooks support no parameter, and there is no fallback.
        ValueError: If the module is compiled, and there is no fallback.
    """
    parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
    with muted_loggers(trainer), preserve_state(module):
        scale = own_scale(batch, reduction, weight_fn, structure)
        try:
            loss_fn = on_copies(training_step_loss)
            reasons = hooks_fail(module, differentiable(batch), parameters, loss_fn, scale, structure)
        except ValueError as error:
            if fallback is None:
                raise
            reasons = dict.fromkeys(layout.names, str(error))
    unsupported: dict[str, str] = {}
    for rank in range(trainer.world_size):
        unsupported = {**trainer.strategy.broadcast(reasons, rank), **unsupported}
    if fallback is None and len(unsupported) == len(parameters):
        raise MisconfigurationException(
            f"no gradient of {type(module).__name__} can be split into examples: {next(iter(unsupported.values()))}. "
            "Use fallback='loop', which takes a pass for each example, or per='step', or write rows at checkpoints: "
            "trainer.validate(model, train_loader)."
        )
    if unsupported and trainer.is_global_zero:
        many = f"{len(unsupported)} of {len(layout.names)} parameters"
        examples = structure.count(batch)
        passes = "a vectorized pass" if fallback == "vmap" else f"a pass for each of its {examples} examples"
        summary = (
            f"rows leave out {many}; fallback='loop' would cover them"
            if fallback is None
            else f"fallback={fallback!r} covers {many}, at the cost of {passes} more for every batch like the first, "
            "in evaluation mode"
        )
        listed = "".join(f"\n  {name}: {reason}" for name, reason in unsupported.items())
        warnings.warn(f"{summary}:{listed}", stacklevel=2)
    return unsupported


def without(layout: Layout, names: Collection[str]) -> Layout:
    """Return the layout of all parameters but those with these names."""
    pairs = zip(layout.names, layout.shapes, strict=True)
    return Layout(*zip(*((name, shape) for name, shape in pairs if name not in names), strict=True))


class SecondPass:
    """A function: batch -> a row per example, the sketch of its own gradient with respect to some parameters.

    Gradients are taken at the module's present weights, in evaluation mode and float32 or wider: a pass for one example
    has no batch statistics, and cannot repeat the dropout of the example in its batch. The module's state is preserved.

    Args:
        trainer: The Trainer that runs the fit.
        sketches: Computes the rows.
    """

    def __init__(self, trainer: Trainer, sketches: ExampleSketches):
        self.trainer, self.sketches = trainer, sketches

    def __call__(self, batch: Any) -> Float[Tensor, "examples dim"]:
        """Return the rows of a batch; the gradients of other parameters count as zero."""
        with muted_loggers(self.trainer), preserve_state(self.sketches.module):
            return self.sketches(differentiable(batch))[0]
