"""Where a writer's store is, what its rows are, and which attempt goes on from which."""

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
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.store.lineage import Run, read_runs
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients
from lightning_sketch.store.spec import DTYPES, StoreSpec
from lightning_sketch.store.writer import RowAppender

_MEANING = {
    "step": "fit: gradient of the step's mean loss; else: gradient of the example's own loss",
    "example": "gradient of the example's own loss",
}
ROWS = tuple(_MEANING)


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
                attempt = store.begin_run(stage, parent, parent_step, trainer.world_size)
            except (ValueError, OSError, MisconfigurationException) as error:  # the other ranks would wait for ever
                failure = error
        attempt, failure = trainer.strategy.broadcast((attempt, failure))
        if failure is not None:
            raise failure
        self.attempt: Run = attempt
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
    fits = [attempt.number for attempt in read_runs(folder) if attempt.stage == "fit"]
    if fits:
        raise MisconfigurationException(
            f"{folder} holds the rows of {len(fits)} fits, and this one begins at its first step; resume it with "
            "trainer.fit(ckpt_path=...), or use another dirpath."
        )


class DuplicateFinder:
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


class StoreSession:
    """Opens the store of a Trainer's run, on all ranks.

    Args:
        dirpath: its folder; beside ModelCheckpoint's if None, and on resuming that of the checkpoint.
        name: of the folder beside ModelCheckpoint's.
        per: "step" or "example", what the rows of a fit are.
        dtype: of the stored numbers.
        sketch: fields of the map but its `n`; `dim` is cut to it.

    Attributes:
        dirpath: of what was opened last.
        resumed: number and folder of the attempt that a checkpoint says to go on from, or that goes on now.
    """

    def __init__(self, dirpath: str | Path | None, name: str, per: str, dtype: str, **sketch: Any):
        self.dirpath = self._asked = None if dirpath is None else str(dirpath)
        self.name, self.per, self.dtype, self.sketch = name, per, dtype, sketch
        self.resumed: dict[str, Any] | None = None

    def fit(
        self, trainer: Trainer, layout: Layout, every_n_train_steps: int, rows_a_step: int = 1, **told: Any
    ) -> StoreRun:
        """For training: a new store, or the one to go on with; says how large it will be.

        Args:
            trainer: that trains.
            layout: of what rows cover.
            every_n_train_steps: between steps that have rows.
            rows_a_step: how many they have.
            told: other fields of the spec.
        """
        parent = self.resumed if trainer.global_step > 0 else None
        if self._asked is None and parent is not None and Path(parent["dirpath"]).exists():
            self.dirpath = parent["dirpath"]
        run = self._open(trainer, layout, "fit", parent["attempt"] if parent else None, **told)
        self.resumed = {"attempt": run.attempt.number, "dirpath": self.dirpath}
        say_size(trainer, self.name, run, every_n_train_steps, rows_a_step)
        return run

    def look(self, trainer: Trainer, layout: Layout) -> StoreRun:
        """For a checkpoint's examples, of what rows of examples cover that were written while training."""
        told: dict[str, Any] = {}
        if self.per == "example" and self.dirpath is not None and (Path(self.dirpath) / "spec.json").exists():
            there = StoreSpec.read(Path(self.dirpath))
            layout, told = there.parameters, {"left_out": there.left_out, "contribution": there.contribution}
        return self._open(trainer, layout, trainer.state.fn.value, **told)

    def _open(self, trainer: Trainer, layout: Layout, stage: str, parent: int | None = None, **told: Any) -> StoreRun:
        if self.dirpath is None:
            self.dirpath = trainer.strategy.broadcast(str(default_folder(trainer, self.name)))
        sketch = make_sketch(**{**self.sketch, "n": layout.n, "dim": min(self.sketch["dim"], layout.n)})
        spec = StoreSpec.of(sketch, layout, dtype=self.dtype, normalization=_MEANING[self.per], **told)
        return StoreRun(trainer, Path(self.dirpath), spec, stage, parent)
