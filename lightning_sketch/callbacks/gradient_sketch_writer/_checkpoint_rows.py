"""Rows of the examples that a Trainer validates, tests or predicts on: at one set of weights, into a store."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch._lightning import Trainer, evaluated_loader, muted_loggers
from lightning_sketch.attribution.sketch_gradients import ExampleRows
from lightning_sketch.callbacks._optimizers import groups_of_step, one_rate
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import DuplicateFinder, StoreRun
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID


class CheckpointRows:
    """Writes the rows of batches of examples, with the moment of the weights.

    Args:
        rows: makes them.
        run: whose store they go to.
        stage: that they are of; "queries" for validation examples while training.
        moment: `step`, `epoch` and `lr` of a checkpoint that was loaded; the Trainer's own if empty.
        hashed: whether examples are numbered by their contents.
    """

    def __init__(
        self, rows: ExampleRows, run: StoreRun, stage: str, moment: Mapping[str, float | int], hashed: bool = False
    ):
        self.rows, self.run, self.stage, self.moment, self.hashed = rows, run, stage, moment, hashed
        self.copies: dict[int, DuplicateFinder] = {}

    def write(self, trainer: Trainer, batch: Any, ids: Tensor, loader: int) -> None:
        """A row for each example of a batch from the data loader with this number."""
        if loader not in self.copies:  # another loader's batches may be made otherwise
            self.rows.sketches.structure = replace(self.rows.sketches.structure)
        with muted_loggers(trainer):
            rows = self.rows(batch, ids)
        if loader not in self.copies:
            self.copies[loader] = DuplicateFinder(evaluated_loader(trainer, loader), trainer.global_rank)
            self._check_numbers(ids, loader)
        rows.columns["padded"][:] = self.copies[loader].among(len(rows))
        rows.columns["dataloader"] = torch.full_like(ids, loader)
        rate = one_rate(groups_of_step(trainer, trainer.optimizers))
        now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "lr": rate}
        self.run.put(rows, self.stage, **(self.moment or now))

    def _check_numbers(self, ids: Tensor, loader: int) -> None:
        """Two data sets have two examples of number 0; those of the same contents are the same."""
        if loader == 1 and not self.hashed and (ids != UNKNOWN_ID).any():
            warnings.warn(
                "the examples of several data loaders are written, which may have the same numbers; scores add up "
                "rows of one number. Ask store.where(dataloader=0), or use index_key='hash'.",
                stacklevel=2,
            )
