"""Rows of the examples that a Trainer validates, tests or predicts on: at one set of weights, into a store."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_sketch._compat import Trainer, evaluated_loader, muted_loggers
from lightning_sketch.attribution.sketch_gradients import ExampleRows
from lightning_sketch.callbacks.step_rows import one_rate
from lightning_sketch.callbacks.store_run import Copies, StoreRun


class CheckpointRows:
    """Writes the rows of batches of examples, with the moment of the weights.

    Args:
        rows: makes them.
        run: whose store they go to.
        stage: that they are of; "queries" for validation examples while training.
        moment: `step`, `epoch` and `lr` of a checkpoint that was loaded; the Trainer's own if empty.
    """

    def __init__(self, rows: ExampleRows, run: StoreRun, stage: str, moment: Mapping[str, float | int]):
        self.rows, self.run, self.stage, self.moment = rows, run, stage, moment
        self.copies: dict[int, Copies] = {}

    def write(self, trainer: Trainer, batch: Any, ids: Tensor, loader: int) -> None:
        """A row for each example of a batch from the data loader with this number."""
        with muted_loggers(trainer):
            rows = self.rows(batch, ids)
        if loader not in self.copies:
            self.copies[loader] = Copies(evaluated_loader(trainer, loader), trainer.global_rank)
        rows.columns["padded"][:] = self.copies[loader].among(len(rows))
        rate = one_rate([group for optimizer in trainer.optimizers for group in optimizer.param_groups])
        now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "lr": rate}
        self.run.put(rows, self.stage, **(self.moment or now))
