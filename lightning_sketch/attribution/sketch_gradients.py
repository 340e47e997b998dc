"""Computes the sketched gradient of each example at the current weights of a module."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.attribution.indexed_dataset import batch_ids, without_index
from lightning_sketch.autodiff.batches import BatchStructure, differentiable, on_device
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn, training_step_loss
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.example_sketches import Engine, ExampleSketches
from lightning_sketch.per_example.reduction import Reduction
from lightning_sketch.store.sketched_gradients import Column, SketchedGradients

# (module, batch) -> loss of each example, probability of its true label.
RowFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def sketch_gradients(
    module: nn.Module,
    batches: Iterable[Any],
    sketch: Sketch,
    loss_fn: LossFn | None = None,
    *,
    row_fn: RowFn | None = None,
    engine: Engine = "auto",
    parameters: str | list[str] = "*",
    weight_fn: Callable[[Any], float] | None = None,
    reduction: Reduction = "mean",
    index_key: str | int | None = None,
    num_examples: int | Callable[[Any], int] | None = None,
    batch_dim: int = 0,
    split_fn: Callable[[Any], Iterable[Any]] | None = None,
) -> SketchedGradients:
    """Compute the sketched gradient of each example's own loss, in evaluation mode and float32 or wider.

    Args:
        module: The module, which is left as it was.
        batches: Batches of examples as the loss takes them, such as a data loader.
        sketch: The sketch, whose `n` is the number of these parameters.
        loss_fn: (module, batch) -> the mean loss, or one loss per example, which then also fills the column `loss`. If
            None, the module's own `training_step`, without its logging.
        row_fn: (module, batch) -> (losses, probabilities of the true labels), one per example. It fills the columns
            `loss` and `prob_true`, which the curvatures "margin" and "trak" need.
        engine: "hooks", from the ordinary backward pass of a whole batch; "vmap"; "loop", one example at a time, which
            supports every module; "auto": hooks, if two examples of the first batch show that they are exact, else the
            loop.
        parameters: The parameters, as shell patterns of their names.
        weight_fn: batch -> the weight of the batch in a mean over batches; `num_labels` if the loss is a mean over
            tokens.
        reduction: "mean", or "sum" if the loss is a sum over examples.
        index_key: Where a batch has the ids of its examples, or "hash"; see `batch_ids`.
        num_examples: The number of examples of a batch, or batch -> this number, if its tensors disagree; each item of
            a list of this length is then an example.
        batch_dim: The axis of the examples, 1 for (time, batch, ...), with the loop only.
        split_fn: batch -> batches of one example, for graphs and packed sequences, with the loop only.

    Returns:
        The rows, (examples, dim), in the order of the examples, with the columns `example_id`, `loss`, `prob_true` and
        `fingerprint`.

    Raises:
        ValueError: if sizes disagree, or the engine does not support the module; the message has the parameter and the
            reason.

    Cost: with hooks about two training steps per batch, one of them for the sketch; with the loop a step per example.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> module, x = nn.Linear(3, 1), torch.randn(8, 3)
    >>> rows = sketch_gradients(module, [x], BlockSRHT(4, 4), lambda module, x: module(x).square().mean())
    >>> rows.sketches.shape
    torch.Size([8, 4])
    """
    layout = Layout.of(module, parameters)
    if sketch.n != layout.n:
        raise ValueError(
            f"the sketch takes n={sketch.n} numbers, these parameters have {layout.n}; build it with n={layout.n}, "
            "or pass the parameters that it was made for."
        )
    if loss_fn is None and not hasattr(module, "training_step"):
        raise ValueError(f"{type(module).__name__} has no training_step; pass loss_fn=lambda module, batch: mean loss.")
    loss_fn = loss_fn or training_step_loss
    structure = BatchStructure(num_examples, batch_dim, split_fn)
    sketches = ExampleSketches(
        module,
        layout,
        sketch=sketch,
        loss_fn=loss_fn,
        engine=engine,
        weight_fn=weight_fn,
        reduction=reduction,
        structure=structure,
    )
    make = ExampleRows(sketches, row_fn)
    parts = [make(without_index(batch), batch_ids(batch, index_key, structure=structure)) for batch in batches]
    if not parts:
        raise ValueError("sketch_gradients got no batches; pass a list of them or a data loader.")
    return SketchedGradients.cat(parts)


class ExampleRows:
    """A function from a batch and the ids of its examples to their rows.

    The rows have the fingerprint of the weights that the module had when this object was made.

    Args:
        sketches: Computes the sketched gradients.
        row_fn: As in `sketch_gradients`.
    """

    def __init__(self, sketches: ExampleSketches, row_fn: RowFn | None = None):
        weights = list(sketches.parameters.values())
        self.sketches, self.row_fn, self.device = sketches, row_fn, weights[0].device
        self.fingerprint = fingerprint(weights)

    def __call__(self, batch: Any, ids: Column) -> SketchedGradients:
        """Return the rows, on the CPU."""
        module = self.sketches.module
        with preserve_state(module):
            batch = on_device(differentiable(batch), self.device)
            rows, losses = self.sketches(batch)
            columns = {"example_id": ids, "fingerprint": torch.full((len(ids),), self.fingerprint)}
            if losses is not None:
                columns["loss"] = losses.float().cpu()
            if self.row_fn is not None:
                with torch.no_grad():
                    losses, probabilities = self.row_fn(module, batch)
                columns |= {"loss": losses.float().cpu(), "prob_true": probabilities.float().cpu()}
        return SketchedGradients(rows.cpu(), self.sketches.sketch, columns)
