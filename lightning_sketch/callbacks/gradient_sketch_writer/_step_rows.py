"""The row of an optimizer step: the sketch of the gradient that the step uses."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, common_lr, gradient_scale, loss_scale, param_groups
from lightning_sketch.autodiff.fingerprint import Known, module_fingerprint_on_device
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks.gradient_sketch_writer._arriving import ArrivingRows
from lightning_sketch.callbacks.gradient_sketch_writer._preconditioned import StepPreconditioner
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store.sketched_gradients import NONE, OF_STEP, UNKNOWN_ID, Column, keys_of


class StepRows:
    """Collect losses and example ids of the batches of a step, and compute its row.

    Args:
        module: The module that is trained.
        layout: The parameters that rows cover.
        sketch: The sketch of the layout's vector.
        preconditioner: What gradients are divided by, if they are.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, sketch: Sketch, preconditioner: StepPreconditioner | None = None
    ):
        self.preconditioner = preconditioner
        self.module, self.layout, self.sketch = module, layout, sketch
        self.parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        self.loss: Tensor | None = None
        self.ids: list[Tensor] = []
        self.own: Mapping[str, Column] = {}
        self.steps_done = self.epoch = -1
        self.frozen: Known = {}
        self.pending: dict[int, ArrivingRows] = {}

    def begin_batch(self, trainer: Trainer, ids: Column, own: Mapping[str, Column]) -> None:
        """Add the ids and the user's columns of the next batch; the first batch after a step begins the next step.

        Of the columns of several accumulated batches the last ones remain.
        """
        if trainer.global_step != self.steps_done:
            self.steps_done, self.loss, self.ids = trainer.global_step, None, []
        keys = keys_of(ids)
        if keys.ndim > 1:  # of packed documents
            keys = keys[keys != UNKNOWN_ID].unique()
        self.ids.append(keys)
        self.own = own

    def add_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """Add the loss of a batch as it is differentiated: divided by the number of accumulated batches, and scaled."""
        loss = loss.detach().float() / loss_scale(trainer)
        self.loss = loss if self.loss is None else self.loss + loss

    def add_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer, recorded: bool) -> None:
        """Compute the row of the step that an optimizer is about to take, from the gradients of its parameters.

        Args:
            trainer: The Trainer that runs the fit.
            optimizer: The optimizer.
            recorded: Whether the step gets a row.
        """
        summed, self.loss = self.loss, None
        if not recorded:
            return
        if self.epoch != trainer.current_epoch:
            self.epoch = trainer.current_epoch
            self.frozen.clear()
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = {name: p.grad for name, p in self.parameters.items() if id(p) in stepped}
        scale = gradient_scale(trainer, optimizer)
        if self.preconditioner is not None:
            unscaled = {name: None if g is None else g / scale for name, g in gradients.items()}
            gradients, scale = self.preconditioner.divided(self.preconditioner.clip(unscaled, scale)), 1.0
        row = self.layout.sketch(self.sketch, gradients) / scale
        loss: Any = torch.nan if summed is None else trainer.strategy.reduce(summed, reduce_op="mean")
        step = trainer.global_step + 1
        columns: dict[str, Any] = {
            "step": step,
            "epoch": trainer.current_epoch,
            "lr": common_lr(param_groups([optimizer])),
            "loss": loss,
            "fingerprint": module_fingerprint_on_device(self.module, self.frozen),
            "preconditioner": NONE if self.preconditioner is None else OF_STEP,
        }
        # If a closure is called several times, as by LBFGS, the row of its last call remains.
        self.pending[step] = ArrivingRows(
            row[None].float(),
            self.sketch,
            {**{key: torch.as_tensor(value).view(1) for key, value in columns.items()}, **self.own},
        )

    def take_rows(self, trainer: Trainer) -> list[ArrivingRows]:
        """Return the rows of the steps that are done, with the ids of their examples if these are known."""
        if not self.pending:
            return []
        rows, self.pending = list(self.pending.values()), {}
        ids = torch.cat(self.ids)
        if (ids == UNKNOWN_ID).all():
            return rows
        ids = _gather_ids(trainer, ids)
        for row in rows:
            row.columns["example_ids"] = ids[None]
        return rows


def _gather_ids(trainer: Trainer, ids: Tensor) -> Tensor:
    """Gather the ids of all ranks' examples, in order of rank; ranks may have different numbers of examples."""
    if trainer.world_size == 1:
        return ids
    device = trainer.strategy.root_device
    counts = trainer.strategy.all_gather(torch.tensor([len(ids)], device=device)).flatten()
    filled = torch.full((int(counts.max()),), UNKNOWN_ID, device=device)
    filled[: len(ids)] = ids.to(device)
    gathered = trainer.strategy.all_gather(filled)
    return torch.cat([gathered[rank, :count] for rank, count in enumerate(counts.tolist())]).cpu()
