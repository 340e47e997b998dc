"""Rows for the examples on which a Trainer validates, tests or predicts, all at the same weights."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import RandomSampler, WeightedRandomSampler

from lightning_sketch._lightning import Trainer, evaluated_loader, muted_loggers
from lightning_sketch.attribution.sketch_gradients import ExampleRows, doubted
from lightning_sketch.callbacks.gradient_sketch_writer._examples import DuplicateFinder
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import StoreRun
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, Column, SketchedGradients, Stage, keys_of


class CheckpointRows:
    """Write a row for each example of the batches that a Trainer evaluates, with the step of the weights.

    Args:
        rows: Computes the rows of a batch.
        run: The run of the store that the rows are written to.
        stage: The stage that is recorded; "queries" for validation examples during training.
        position: The `step`, `epoch` and `lr` of the weights, lr that of the last step.
        hashed: Whether examples are identified by a hash of their contents.
    """

    def __init__(
        self,
        rows: ExampleRows,
        run: StoreRun,
        stage: Stage,
        position: Mapping[str, float | int],
        hashed: bool = False,
    ):
        self.rows, self.run, self.stage, self.position, self.hashed = rows, run, stage, position, hashed
        self.held: list[
            SketchedGradients
        ] = []  # queries, beside rows of steps in one run, which a doubt would mark too
        self.duplicates: dict[int, DuplicateFinder] = {}

    def write(self, trainer: Trainer, batch: Any, ids: Column, loader: int, own: Mapping[str, Column]) -> None:
        """Write a row for each example of a batch.

        Args:
            trainer: The Trainer that evaluates the batch.
            batch: The batch, as the Trainer got it.
            ids: The ids of its examples.
            loader: The index of the data loader that it comes from.
            own: The user's columns.
        """
        if loader not in self.duplicates:  # batches of another loader may have another structure
            self.rows.sketches.forget_batches()
        with muted_loggers(trainer):
            rows = self.rows(batch, ids)
        if loader not in self.duplicates:
            source = evaluated_loader(trainer, loader)
            self.duplicates[loader] = DuplicateFinder(source, trainer.global_rank)
            self._check_ids(ids, loader, getattr(source, "sampler", None))
        if self.rows.in_doubt and self.stage == "queries":
            self.held = [doubted(part) for part in self.held]
        elif self.rows.in_doubt:
            self.run.doubt_scale()
        places, count = self.rows.places, len(rows)
        columns = {
            **rows.columns,
            "padded": self.duplicates[loader].among(len(ids))[places],
            "dataloader": torch.full((count,), loader),
            **{name: column[places] for name, column in own.items()},
        }
        rows = SketchedGradients(rows.sketches, rows.sketch, columns)
        if self.stage == "queries":
            self.held.append(rows)
        else:
            self.run.put(rows, self.stage, **self.position)

    def finish(self) -> None:
        """Write the queries, and warn of rows that are zero or not finite."""
        for rows in self.held:
            self.run.put(rows, self.stage, **self.position)
        self.rows.warn_of_odd_rows()

    def _check_ids(self, ids: Column, loader: int, sampler: Any) -> None:
        """Warn of examples without a name or a row, and of a second data loader, which may have the same ids."""
        known = bool((keys_of(ids) != UNKNOWN_ID).any())
        drawn = isinstance(sampler, RandomSampler | WeightedRandomSampler)
        if drawn and not known:
            warnings.warn(
                "the rows of a shuffled data loader have no ids, so that answers cannot say which examples they are; "
                "load IndexedDataset(data), or pass index_key=....",
                stacklevel=2,
            )
        if drawn and sampler.replacement:
            warnings.warn(
                "the data loader draws examples with replacement, so that some have no row; validate with one that has "
                "no such sampler.",
                stacklevel=2,
            )
        if loader == 1 and not self.hashed and known:
            warnings.warn(
                "the examples of several data loaders are written, which may have the same ids, and scores add up "
                "the rows of one id. Use store.where(dataloader=0), or index_key='hash'.",
                stacklevel=2,
            )
