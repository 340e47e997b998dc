"""A store, opened by all ranks of a Trainer for one of its runs."""

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_sketch._lightning import Trainer, say
from lightning_sketch.attribution import GradientStore
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.store.lineage import Attempt, read_attempts
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients
from lightning_sketch.store.spec import DTYPES, StoreSpec
from lightning_sketch.store.writer import RowAppender


class StoreRun:
    """One attempt, and this rank's appender.

    Args:
        trainer: whose ranks write.
        folder: of the store.
        spec: of its rows.
        stage: "fit", "validate", "test" or "predict".
        parent: attempt that a fit goes on from, at the trainer's step.

    Raises:
        ValueError: if the store has another spec, or not this parent.
        MisconfigurationException: if a fit from its first step finds another there.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        spec: StoreSpec,
        stage: str,
        parent: int | None = None,
    ):
        parent_step = None if parent is None else trainer.global_step
        attempt, failure = None, None
        if trainer.is_global_zero:
            try:
                if stage == "fit" and parent is None:
                    check_fresh(folder)
                store = GradientStore.create(folder, spec)
                attempt = store.begin_attempt(stage, parent, parent_step, trainer.world_size)
            except (ValueError, OSError, MisconfigurationException) as error:  # the other ranks would wait for ever
                failure = error
        attempt, failure = trainer.strategy.broadcast((attempt, failure))
        if failure is not None:
            raise failure
        self.attempt: Attempt = attempt
        self.folder, self.spec, self.stage, self.warned = folder, spec, stage, False
        self.appender: RowAppender = GradientStore.open(folder).appender(attempt, trainer.global_rank)

    def put(self, rows: SketchedGradients, stage: str | None = None, **columns: float | int) -> None:
        """Append rows, with the same values for all of them in these columns."""
        count = len(rows)
        columns |= {"stage": STAGES.index(stage or self.stage), "rank": self.appender.rank}
        filled = {key: rows.columns[key].new_full((count,), value) for key, value in columns.items()}
        self.appender.put(SketchedGradients(rows.sketches, rows.sketch, {**rows.columns, **filled}))

    def check_covers(self, layout: Layout) -> None:
        """Warn, once, of parameters that are trained now and were not when the store was opened."""
        more = set(layout.names) - set(self.spec.parameters.names) - set(self.spec.left_out)
        if more and not self.warned:
            self.warned = True
            warnings.warn(
                f"{len(more)} parameters are trained now that were frozen when the store was opened, and rows do not "
                f"cover them: {', '.join(sorted(more)[:10])}. Write each phase of training to a store of its own, or "
                "let them be trainable from the start, at a learning rate of 0.",
                stacklevel=2,
            )


def say_size(trainer: Trainer, name: str, run: StoreRun, every_n_train_steps: int, rows_a_step: int) -> None:
    """What a fit is going to write: how many rows, where the number of steps is known."""
    row = run.spec.sketch["dim"] * DTYPES[run.spec.dtype].itemsize
    sizes = f"{row / 1e3:.1f} kB a row"
    steps = trainer.estimated_stepping_batches
    if steps not in (-1, float("inf")):
        rows = max(0, int(steps) - trainer.global_step) // every_n_train_steps * rows_a_step
        most = "up to " if rows_a_step > 1 else ""  # a last batch, or window of batches, may be smaller
        sizes = f"{most}{rows:,} rows of {row / 1e3:.1f} kB, {rows * row / 1e6:,.1f} MB"
    say(trainer, f"{name}: {sizes}, to {run.folder}")


def default_folder(trainer: Trainer, name: str) -> Path:
    """Where ModelCheckpoint would put its files: below save_dir, name and version of the first logger."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / name
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / name


def check_fresh(folder: Path) -> None:
    """Refuse to begin a fit, from its first step, in a folder that holds one.

    Raises:
        MisconfigurationException: with the ways out.
    """
    fits = [attempt.number for attempt in read_attempts(folder) if attempt.stage == "fit"]
    if fits:
        raise MisconfigurationException(
            f"{folder} holds the rows of {len(fits)} fits, and this one begins at its first step; resume it with "
            "trainer.fit(ckpt_path=...), or use another dirpath."
        )


class Copies:
    """Finds the examples that a distributed sampler hands out twice, so that all ranks have as many.

    Place j of rank r is number j R + r of R ranks' common order; the numbers from the data set's length on are copies.

    Args:
        loader: of the batches, or several loaders together, of which nothing is known.
        rank: of this process.
    """

    def __init__(self, loader: Any, rank: int):
        sampler = getattr(loader, "sampler", None)
        known = isinstance(sampler, DistributedSampler) and not sampler.drop_last
        self.own = len(sampler.dataset) if known else None
        self.rank, self.ranks = rank, sampler.num_replicas if known else 1
        self.seen = 0

    def among(self, count: int) -> Bool[Tensor, " count"]:
        """Which of the next `count` examples are copies."""
        places = torch.arange(self.seen, self.seen + count)
        self.seen += count
        if self.own is None:
            return torch.zeros(count, dtype=torch.bool)
        return places * self.ranks + self.rank >= self.own
