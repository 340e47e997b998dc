"""The row of an optimizer step: the sketch of the gradient that the step is made from."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch._lightning import Trainer, gradient_scale, loss_scale
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks._optimizers import groups_of_step, one_rate
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, SketchedGradients


class StepRows:
    """Collects what belongs to the next step; gives its row.

    Args:
        module: that is trained.
        layout: of its parameters.
        sketch: of the layout's vector.
    """

    def __init__(self, module: nn.Module, layout: Layout, sketch: Sketch):
        self.layout, self.sketch = layout, sketch
        self.parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        self.loss: Tensor | None = None
        self.ids: list[Tensor] = []
        self.steps_done = -1
        self.pending: dict[int, SketchedGradients] = {}

    def begin_batch(self, trainer: Trainer, ids: Tensor) -> None:
        """The next batch; the first after a step begins the next step."""
        if trainer.global_step != self.steps_done:
            self.steps_done, self.loss, self.ids = trainer.global_step, None, []
        self.ids.append(ids)

    def add_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """The loss of a batch, divided by the number of accumulated ones and scaled, as it goes backward."""
        loss = loss.detach().float() / loss_scale(trainer)
        self.loss = loss if self.loss is None else self.loss + loss

    def add_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer, wanted: bool) -> None:
        """The step that this optimizer is about to do, from its own parameters' gradients; if it is wanted."""
        summed, self.loss = self.loss, None
        if not wanted:
            return
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = {name: p.grad for name, p in self.parameters.items() if id(p) in own}
        row = self.layout.sketch(self.sketch, gradients) / gradient_scale(trainer, optimizer)
        loss = torch.nan if summed is None else trainer.strategy.reduce(summed, reduce_op="mean")
        step = trainer.global_step + 1
        columns: dict[str, Any] = {
            "step": step,
            "epoch": trainer.current_epoch,
            "lr": one_rate(groups_of_step(trainer, [optimizer])),
            "loss": float(loss),
            "fingerprint": self._fingerprint(),
        }
        # A closure that is called several times, as by LBFGS, leaves the row of its last call.
        self.pending[step] = SketchedGradients(
            row[None].float(), self.sketch, {key: torch.tensor([value]) for key, value in columns.items()}
        )

    def _fingerprint(self) -> int:
        """Of the weights; 0, not known, where no rank has all of them."""
        parameters = list(self.parameters.values())
        return 0 if any(hasattr(p, "placements") for p in parameters) else fingerprint(parameters)

    def done(self, trainer: Trainer) -> list[SketchedGradients]:
        """The rows of the steps that are done, with the ids of their examples where they are known."""
        if not self.pending:
            return []
        rows, self.pending = list(self.pending.values()), {}
        ids = torch.cat(self.ids)
        if (ids == UNKNOWN_ID).all():
            return rows
        ids = _of_all_ranks(trainer, ids)
        return [SketchedGradients(r.sketches, r.sketch, {**r.columns, "example_ids": ids[None]}) for r in rows]


def _of_all_ranks(trainer: Trainer, ids: Tensor) -> Tensor:
    """The ids of every rank's examples, one after the other; ranks may have different numbers of them."""
    if trainer.world_size == 1:
        return ids
    device = trainer.strategy.root_device
    counts = trainer.strategy.all_gather(torch.tensor([len(ids)], device=device)).flatten()
    filled = torch.full((int(counts.max()),), UNKNOWN_ID, device=device)
    filled[: len(ids)] = ids.to(device)
    every = trainer.strategy.all_gather(filled)
    return torch.cat([every[rank, :count] for rank, count in enumerate(counts.tolist())]).cpu()
