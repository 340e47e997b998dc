"""The store of a writer: where it is, what its rows are, and which run resumes which."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_sketch._lightning import Trainer, print_on_rank_zero
from lightning_sketch.attribution import GradientStore
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks._validate import Granularity
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.store.lineage import Run, RunStage, read_runs
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients, Stage
from lightning_sketch.store.spec import DTYPES, Dtype, StoreSpec
from lightning_sketch.store.writer import RowAppender

_NORMALIZATION: dict[Granularity, str] = {
    "step": "fit: gradient of the step's mean loss; else: gradient of the example's own loss",
    "example": "gradient of the example's own loss",
}


class StoreRun:
    """A run that writes to a store, with the appender of this rank.

    Args:
        trainer: The Trainer, whose ranks all write.
        folder: The folder of the store.
        spec: The spec of its rows.
        stage: "fit", "validate", "test" or "predict".
        parent: The number of the run that a fit resumes, at the Trainer's step; None if it does not resume.

    Raises:
        ValueError: If the store has another spec, or the parent does not exist.
        MisconfigurationException: If the fit does not resume, and the store contains another fit.
    """

    def __init__(self, trainer: Trainer, folder: Path, spec: StoreSpec, stage: RunStage, parent: int | None = None):
        parent_step = None if parent is None else trainer.global_step
        run: Run | None = None
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                if stage == "fit" and parent is None:
                    _check_fresh(folder)
                store = GradientStore.create(folder, spec)
                run = store.begin_run(stage, parent=parent, parent_step=parent_step, world_size=trainer.world_size)
            except (ValueError, OSError, MisconfigurationException) as error:  # else the other ranks would wait forever
                failure = error
        run, failure = trainer.strategy.broadcast((run, failure))
        if failure is not None:
            raise failure
        assert run is not None
        self.run = run
        self.folder, self.spec, self.stage, self.warned = folder, spec, stage, False
        self.appender: RowAppender = GradientStore.open(folder).appender(run, trainer.global_rank)

    def put(self, rows: SketchedGradients, stage: Stage | None = None, **columns: float | int) -> None:
        """Append rows to the store.

        Args:
            rows: The rows.
            stage: The stage that is recorded; that of the run if None.
            **columns: Values that all rows get in these columns.
        """
        count = len(rows)
        columns |= {"stage": STAGES.index(stage or self.stage), "rank": self.appender.rank}
        filled = {key: rows.columns[key].new_full((count,), value) for key, value in columns.items()}
        self.appender.put(SketchedGradients(rows.sketches, rows.sketch, {**rows.columns, **filled}))

    def check_covers(self, layout: Layout) -> None:
        """Warn, once, of parameters that are trainable now but were frozen when the store was opened."""
        new = set(layout.names) - set(self.spec.parameters.names) - set(self.spec.left_out)
        if new and not self.warned:
            self.warned = True
            warnings.warn(
                f"{len(new)} parameters are trained now that were frozen when the store was opened, and rows do not "
                f"cover them: {', '.join(sorted(new)[:10])}. Write each phase of training to a store of its own, or "
                "make them trainable from the start, at a learning rate of 0.",
                stacklevel=2,
            )


def _say_size(trainer: Trainer, name: str, run: StoreRun, every_n_train_steps: int, rows_per_step: int) -> None:
    """Print how much a fit is going to write: the size of a row, and the number of rows if that is known."""
    row = run.spec.sketch["dim"] * DTYPES[run.spec.dtype].itemsize
    sizes = f"{row / 1e3:.1f} kB a row"
    steps = trainer.estimated_stepping_batches
    if steps not in (-1, float("inf")):
        rows = max(0, int(steps) - trainer.global_step) // every_n_train_steps * rows_per_step
        bound = "up to " if rows_per_step > 1 else ""  # the last batches of an epoch may be smaller
        sizes = f"{bound}{rows:,} rows of {row / 1e3:.1f} kB, {rows * row / 1e6:,.1f} MB"
    print_on_rank_zero(trainer, f"{name}: {sizes}, to {run.folder}")


def _default_folder(trainer: Trainer, name: str) -> Path:
    """Return a folder beside that of ModelCheckpoint: below save_dir, name and version of the first logger."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / name
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / name


def _check_fresh(folder: Path) -> None:
    """Check that a store contains no fit yet, as a fit that does not resume requires.

    Raises:
        MisconfigurationException: If there is one.
    """
    fits = [run.number for run in read_runs(folder) if run.stage == "fit"]
    if fits:
        raise MisconfigurationException(
            f"{folder} contains the rows of {len(fits)} fits, and this one starts at its first step; resume with "
            "trainer.fit(ckpt_path=...), or use another dirpath."
        )


class DuplicateFinder:
    """Find the examples that a distributed sampler repeats so that all ranks have equally many.

    Of R ranks, position j of rank r is number j R + r of their common order; the numbers from the length of the data
    set on are duplicates.

    Args:
        loader: The data loader of the batches. Of other objects, such as several loaders at once, no example counts as
            a duplicate.
        rank: The rank of this process.
    """

    def __init__(self, loader: Any, rank: int):
        sampler = getattr(loader, "sampler", None)
        self.length: int | None = None  # of the data set; None if the sampler repeats no example
        self.rank, self.ranks, self.seen = rank, 1, 0
        if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            dataset: Any = sampler.dataset  # torch's Dataset does not declare __len__
            self.length, self.ranks = len(dataset), sampler.num_replicas

    def among(self, count: int) -> Bool[Tensor, " count"]:
        """Return which of the next `count` examples of this rank are duplicates."""
        positions = torch.arange(self.seen, self.seen + count)
        self.seen += count
        if self.length is None:
            return torch.zeros(count, dtype=torch.bool)
        return positions * self.ranks + self.rank >= self.length


class StoreSession:
    """Open the store of a writer on all ranks, anew for each call of the Trainer.

    Args:
        dirpath: The folder of the store. If None it is beside that of ModelCheckpoint, or, when a fit resumes, the one
            that the checkpoint names.
        name: The name of the folder if `dirpath` is None.
        per: Whether a row of a fit is of a step or of an example.
        dtype: The type of the stored numbers.
        kind: The kind of the sketch.
        dim: The numbers in a row; reduced to the number of parameters if there are fewer.
        seed: The seed of the sketch.

    Attributes:
        dirpath: The folder of the store that was opened last.
        resumed: The number (`attempt`) and the folder (`dirpath`) of the run that writes now, or of the run that a
            checkpoint belongs to.
    """

    def __init__(
        self,
        dirpath: str | Path | None,
        *,
        name: str,
        per: Granularity,
        dtype: Dtype,
        kind: str,
        dim: int,
        seed: int,
    ):
        self.dirpath = self._requested = None if dirpath is None else str(dirpath)
        self.name, self.per, self.dtype = name, per, dtype
        self.kind, self.dim, self.seed = kind, dim, seed
        self.resumed: dict[str, Any] | None = None

    def open_fit(
        self,
        trainer: Trainer,
        layout: Layout,
        every_n_train_steps: int,
        *,
        rows_per_step: int = 1,
        left_out: Mapping[str, str] | None = None,
        contribution: bool = False,
    ) -> StoreRun:
        """Open the store for training, a new one or the one to resume, and print how large it will be.

        Args:
            trainer: The Trainer that runs the fit.
            layout: The parameters that rows cover.
            every_n_train_steps: The number of steps between two that have rows.
            rows_per_step: The number of rows of such a step.
            left_out: The names of parameters that rows do not cover, with the reasons.
            contribution: Whether rows are shares of a batch whose examples are coupled.
        """
        parent = self.resumed if trainer.global_step > 0 else None
        if self._requested is None and parent is not None and Path(parent["dirpath"]).exists():
            self.dirpath = parent["dirpath"]
        number = parent["attempt"] if parent else None
        opened = self._open(trainer, layout, "fit", number, left_out=left_out, contribution=contribution)
        self.resumed = {"attempt": opened.run.number, "dirpath": self.dirpath}
        _say_size(trainer, self.name, opened, every_n_train_steps, rows_per_step)
        return opened

    def open_checkpoint(self, trainer: Trainer, layout: Layout) -> StoreRun:
        """Open the store for rows at a checkpoint, with the layout of the rows of training if these are of examples."""
        left_out: Mapping[str, str] | None = None
        contribution = False
        if self.per == "example" and self.dirpath is not None and (Path(self.dirpath) / "spec.json").exists():
            spec = StoreSpec.read(Path(self.dirpath))
            layout, left_out, contribution = spec.parameters, spec.left_out, spec.contribution
        assert trainer.state.fn is not None
        stage = cast(RunStage, trainer.state.fn.value)
        return self._open(trainer, layout, stage, left_out=left_out, contribution=contribution)

    def _open(
        self,
        trainer: Trainer,
        layout: Layout,
        stage: RunStage,
        parent: int | None = None,
        *,
        left_out: Mapping[str, str] | None,
        contribution: bool,
    ) -> StoreRun:
        """Begin a run in the store, creating the store if there is none."""
        if self.dirpath is None:
            self.dirpath = trainer.strategy.broadcast(str(_default_folder(trainer, self.name)))
        spec = StoreSpec.of(
            make_sketch(self.kind, n=layout.n, dim=min(self.dim, layout.n), seed=self.seed),
            layout,
            dtype=self.dtype,
            normalization=_NORMALIZATION[self.per],
            left_out=left_out,
            contribution=contribution,
        )
        return StoreRun(trainer, Path(self.dirpath), spec, stage, parent)
