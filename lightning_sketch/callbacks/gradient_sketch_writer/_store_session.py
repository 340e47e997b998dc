"""The store of a writer: where it is, what its rows are, and which run resumes which."""

import atexit
import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from lightning_sketch._lightning import Trainer, is_dev_run, print_on_rank_zero
from lightning_sketch.attribution.row_arguments import recorded, remember
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.store.format import Run, RunStage, Snapshot, begin_run, create_store, read_runs
from lightning_sketch.store.maintenance import erase
from lightning_sketch.store.row_store import RowStore
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients, Stage
from lightning_sketch.store.spec import DTYPES, Dtype, StoreSpec
from lightning_sketch.store.writer import RowAppender

# Whether a row of a fit is of an optimizer step or of a training example.
Granularity = Literal["step", "example"]

_NORMALIZATION: dict[Granularity, str] = {
    "step": "fit: gradient of the step's mean loss; else: gradient of the example's own loss",
    "example": "gradient of the example's own loss",
}


OnError = Literal["raise", "warn"]


class StoreRun:
    """A run that writes to a store, with the appender of this rank.

    Args:
        rank: The rank of this process.
        snapshot: The store.
        run: The run.
        on_error: Whether rows that cannot be written end the training, or are left out from then on.
        failure: Why nothing can be written, with on_error="warn".
    """

    def __init__(self, rank: int, snapshot: Snapshot, run: Run, on_error: OnError, failure: OSError | None = None):
        self.snapshot, self.folder, self.spec = snapshot, snapshot.path, snapshot.spec
        self.run, self.stage, self.rank, self.on_error = run, run.stage, rank, on_error
        self.warned = self.failed = False
        self.appender: RowAppender | None = None
        with self._failing():
            if failure is not None:
                raise failure
            self.appender = RowAppender.open(snapshot.path, rank=self.rank, run=run.number)

    @property
    def rows(self) -> int:
        """The number of rows that this rank has put."""
        return 0 if self.appender is None else self.appender.rows

    def put(self, rows: SketchedGradients, stage: Stage | None = None, **columns: float | int) -> None:
        """Append rows to the store.

        Args:
            rows: The rows.
            stage: The stage that is recorded; that of the run if None.
            **columns: Values that all rows get in these columns.
        """
        count = len(rows)
        columns |= {"stage": STAGES.index(stage or self.stage), "rank": self.rank}
        filled = {key: rows.columns[key].new_full((count,), value) for key, value in columns.items()}
        if self.appender is not None and not self.failed:
            with self._failing():
                self.appender.put(SketchedGradients(rows.sketches, rows.sketch, {**rows.columns, **filled}))

    def doubt_scale(self) -> None:
        """Mark the rows that were put as of unknown scale."""
        if self.appender is not None and not self.failed:
            with self._failing():
                self.appender.doubt_scale()

    def keep(self, write: Callable[[], Any]) -> None:
        """Write a file that rows rely on beside them, by calling a function."""
        if self.appender is not None and not self.failed:
            with self._failing():
                write()

    def say_replaced(self, name: str, fingerprint: int, trainer: Trainer) -> None:
        """Print that rows at the same weights are there, and what becomes of them."""
        if self.appender is None or self.failed:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows that are missing, which whoever opens the store is told
            columns = RowStore.open(self.folder).metadata()
        there = (columns["fingerprint"] == fingerprint) & (columns["stage"] == STAGES.index(self.stage))
        if there.any():
            print_on_rank_zero(
                trainer,
                f"{name}: {int(there.sum())} rows of {self.stage} at these weights are there; rows of other examples "
                "are added to them, rows of equal ids and loader replace them, and rows without ids replace all",
            )

    def flush(self) -> None:
        """Wait until all rows are on the disk."""
        if self.appender is not None and not self.failed:
            with self._failing():
                self.appender.flush()

    def close(self) -> None:
        """Write all rows, and end the run."""
        if self.appender is not None:
            with contextlib.suppress(RuntimeError) if self.failed else self._failing():
                self.appender.close()
            if self.failed:
                self._mark()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Within the context, say an error in place of raising it with on_error="warn"; nothing is written then."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if self.on_error == "raise":
                raise
            self.failed = True
            self._mark()
            warnings.warn(f"training goes on without rows (on_error='warn'): {error}", stacklevel=4)

    def _mark(self) -> None:
        """Record that rows are missing, if that at least can be written."""
        own = {"attempt": self.run.number, "run": self.run.id, "store": self.snapshot.store}
        with contextlib.suppress(OSError, ValueError):
            if self.appender is not None and _is_in(self.folder, own):  # it may be another store by now
                replace(self.run, incomplete=True).write(self.snapshot)

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
    one_step = trainer.lightning_module.automatic_optimization  # by batch; else the module steps as often as it likes
    steps = trainer.estimated_stepping_batches if one_step else -1
    rows: int | None = None
    if steps not in (-1, float("inf")):
        rows = max(0, int(steps) - trainer.global_step) // every_n_train_steps * rows_per_step
    bound = "up to " if rows_per_step > 1 else ""  # the last batches of an epoch may be smaller
    print_on_rank_zero(trainer, f"{name}: {described_size(run, rows, bound)}, to {run.folder}")


def described_size(run: StoreRun, rows: int | None, bound: str = "") -> str:
    """Describe how much this number of rows will take."""
    row = run.spec.sketch["dim"] * DTYPES[run.spec.dtype].itemsize
    if rows is None:
        return f"{row / 1e3:.1f} kB a row"
    return f"{bound}{rows:,} rows of {row / 1e3:.1f} kB, {rows * row / 1e6:,.1f} MB"


def _default_folder(trainer: Trainer, name: str) -> Path:
    """Return a folder beside that of ModelCheckpoint: below save_dir, name and version of the first logger."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / name
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / name


class StoreSession:
    """Open the store of a writer on all ranks, anew for each call of the Trainer.

    Args:
        dirpath: The folder of the store. If None it is beside that of ModelCheckpoint, or, when a fit resumes, the one
            that the checkpoint names. A relative one is below the present working directory, also if that changes.
        name: The name of the folder if `dirpath` is None.
        per: Whether a row of a fit is of a step or of an example.
        dtype: The type of the stored numbers.
        kind: The kind of the sketch.
        dim: The numbers in a row; reduced to the number of parameters if there are fewer.
        seed: The seed of the sketch.
        overwrite: Whether the first fit deletes the store that its folder has, unless it resumes it.
        on_error: Whether rows that cannot be written end the training, or are left out from then on.
        arguments: The arguments that rows are computed with, which queries inherit.

    Attributes:
        dirpath: The folder of the store that was opened last.
        resumed: The number (`attempt`) and the UUID (`run`) of the fit that writes now, or that a checkpoint belongs
            to, with the folder (`dirpath`) and the UUID (`store`) of its store.
        measured: The same of the fit at whose weights a validation takes its rows, if it is known.
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
        overwrite: bool,
        on_error: OnError,
        arguments: Mapping[str, Any],
    ):
        self.arguments = arguments
        self.dirpath = self._requested = None if dirpath is None else os.path.abspath(Path(dirpath).expanduser())
        self.name, self.per, self.dtype = name, per, dtype
        self.kind, self.dim, self.seed = kind, dim, seed
        self.overwrite, self.on_error = overwrite, on_error
        self.resumed: dict[str, Any] | None = None
        self.measured: dict[str, Any] | None = None
        self._throw_away: str | None = None

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
        opened = self._open(trainer, layout, "fit", parent, left_out=left_out, contribution=contribution)
        self.resumed = None
        if opened.run.number:
            identity = {"run": opened.run.id, "store": opened.snapshot.store}
            self.resumed = {"attempt": opened.run.number, "dirpath": self.dirpath, **identity}
        _say_size(trainer, self.name, opened, every_n_train_steps, rows_per_step)
        return opened

    def open_checkpoint(self, trainer: Trainer, layout: Layout) -> StoreRun:
        """Open the store for rows at a checkpoint, with the layout of the rows of training if these are of examples."""
        left_out: Mapping[str, str] | None = None
        contribution = False
        if self.per == "example" and self.dirpath is not None and _has_store(self.dirpath):
            spec = Snapshot.read(Path(self.dirpath)).spec
            layout, left_out, contribution = spec.parameters, spec.left_out, spec.contribution
        assert trainer.state.fn is not None
        stage = cast(RunStage, trainer.state.fn.value)
        return self._open(trainer, layout, stage, self.measured, left_out=left_out, contribution=contribution)

    def _open(
        self,
        trainer: Trainer,
        layout: Layout,
        stage: RunStage,
        parent: Mapping[str, Any] | None = None,
        *,
        left_out: Mapping[str, str] | None,
        contribution: bool,
    ) -> StoreRun:
        """Begin a run in the store, creating the store if there is none; rank 0 decides, and all ranks write."""
        spec = StoreSpec.of(
            make_sketch(self.kind, n=layout.n, dim=min(self.dim, layout.n), seed=self.seed),
            layout,
            dtype=self.dtype,
            normalization=_NORMALIZATION[self.per],
            left_out=left_out,
            contribution=contribution,
        )
        decided: tuple[Snapshot, Run] | None = None
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                decided = self._begin(trainer, spec, stage, parent)
            except (ValueError, OSError, RuntimeError) as error:  # else the other ranks would wait forever
                failure = error
        decided, failure = trainer.strategy.broadcast((decided, failure))
        if decided is None:
            if failure is not None and not (isinstance(failure, OSError) and self.on_error == "warn"):
                raise failure
            nothing = Snapshot(Path(self.dirpath or self.name), spec, ""), Run(0, stage)
            return StoreRun(trainer.global_rank, *nothing, self.on_error, cast(OSError, failure))
        snapshot, run = decided
        self.dirpath = str(snapshot.path)
        remember(run.id, self.arguments)
        self.overwrite &= is_dev_run(trainer) or stage != "fit"
        return StoreRun(trainer.global_rank, snapshot, run, self.on_error)

    def _begin(
        self, trainer: Trainer, spec: StoreSpec, stage: RunStage, parent: Mapping[str, Any] | None
    ) -> tuple[Snapshot, Run]:
        """Find or create the store, on rank 0, and record the run.

        Raises:
            ValueError: If the store has another spec, or is another one than that of the checkpoint.
            CorruptFile: If a file of the store is not what was written.
        """
        return begin(
            self._folder(trainer, parent),
            spec,
            stage,
            parent,
            step=trainer.global_step,
            world_size=trainer.world_size,
            optimizers=trainer.optimizers if stage == "fit" else [],
            arguments=self.arguments,
            overwrite=self.overwrite,
            say=lambda text: print_on_rank_zero(trainer, f"{self.name}: {text}"),
        )

    def _folder(self, trainer: Trainer, parent: Mapping[str, Any] | None) -> Path:
        """Return the folder of the store."""
        if is_dev_run(trainer):
            if self._throw_away is None:
                self._throw_away = tempfile.mkdtemp(prefix="lightning_sketch_")
                atexit.register(shutil.rmtree, self._throw_away, ignore_errors=True)
                print_on_rank_zero(
                    trainer,
                    f"{self.name}: under fast_dev_run rows go to {self._throw_away}, which is deleted at the end of "
                    "the process.",
                )
            return Path(self._throw_away)
        if self._throw_away is not None and self.dirpath == self._throw_away:
            self.dirpath = self._requested
        if self._requested is None and parent is not None:
            # where it was written, or, if all was moved, beside the checkpoint as Lightning places both
            beside = [Path(trainer.ckpt_path).parents[i] / self.name for i in (0, 1)] if trainer.ckpt_path else []
            for folder in (Path(parent["dirpath"]), *beside):
                if _is_in(folder, parent):
                    return folder.absolute()
        return Path(self.dirpath or os.path.abspath(_default_folder(trainer, self.name)))


def begin(
    folder: Path,
    spec: StoreSpec,
    stage: RunStage,
    parent: Mapping[str, Any] | None,
    *,
    step: int,
    world_size: int,
    optimizers: Sequence[Any],
    arguments: Mapping[str, Any],
    overwrite: bool,
    say: Callable[[str], object],
) -> tuple[Snapshot, Run]:
    """Create the store in a folder, or open the one that is there, and record a run; one process does so for all.

    Args:
        folder: The folder.
        spec: The spec of the rows.
        stage: The stage of the run.
        parent: The store and the run that a checkpoint was saved with, if one was loaded.
        step: The number of optimizer steps done.
        world_size: The number of processes that will write.
        optimizers: The optimizers that train.
        arguments: The arguments that rows are computed with, which queries inherit.
        overwrite: Whether a fit deletes the store that is there, unless it resumes it.
        say: Prints one line.

    Raises:
        ValueError: If the store has another spec, or is another one than that of the checkpoint.
        CorruptFile: If a file of the store is not what was written.
    """
    resumes = parent is not None and _is_in(folder, parent)
    if stage == "fit" and not resumes and (overwrite or _is_unused(folder, spec)) and _has_any(folder):
        say(f"deleting the store in {folder}, to begin a new one")
        erase(folder)
    lost = stage == "fit" and parent is not None and not resumes
    if lost:
        _check_new_lineage(folder, cast(Mapping[str, Any], parent), step)
    snapshot = create_store(folder, spec)
    fits = [run.number for run in read_runs(snapshot) if run.stage == "fit"]
    if stage == "fit" and fits and not resumes:
        warnings.warn(
            f"{folder} has rows of other fits, {fits}, and this one starts at step {step} without them: from now on "
            "the store shows the new fit, and what is measured at its weights. GradientStore.open(path, "
            "lineage=NUMBER) shows another one, until compact() deletes it; overwrite=True deletes all at the start.",
            stacklevel=2,
        )
    known = parent if resumes else None
    number = int(known["attempt"]) if known else None
    resumed_at = step if known and stage == "fit" else None
    origin = str(parent.get("run")) if parent is not None and lost else None
    kinds = ", ".join(dict.fromkeys(type(o).__name__ for o in optimizers))
    kept = recorded(arguments)
    return snapshot, begin_run(folder, stage, number, resumed_at, world_size, origin, kinds, kept)


def _has_store(folder: str | Path) -> bool:
    return (Path(folder) / "spec.json").exists()


def _is_unused(folder: Path, spec: StoreSpec) -> bool:
    """Return whether a folder has a store of another spec without rows, as left by a fit that failed at once."""
    if not _has_store(folder):
        return False
    snapshot = Snapshot.read(folder)
    return snapshot.spec != spec and not any(snapshot.folder.rglob("*.safetensors"))


def _has_any(folder: Path) -> bool:
    """Return whether a folder has a store, or parts of one."""
    return any((folder / name).exists() for name in ("spec.json", "generation.json", "attempts"))


def _is_in(folder: Path, parent: Mapping[str, Any]) -> bool:
    """Return whether a folder has the store, and in it the run, that a checkpoint was saved with."""
    if not _has_store(folder):
        return False
    snapshot = Snapshot.read(folder)
    if parent.get("store") not in (None, snapshot.store):  # the first version saved neither
        return False
    ids = {run.number: run.id for run in read_runs(snapshot)}
    return parent.get("run") in (None, ids.get(int(parent["attempt"])))


def _check_new_lineage(folder: Path, parent: Mapping[str, Any], step: int) -> None:
    """Say that a fit that resumes does so without the rows of its earlier steps.

    Raises:
        ValueError: If there is another store in the folder, which was not begun for this checkpoint either.
    """
    moved = "pass its folder as dirpath to continue it"
    if _has_store(folder):
        snapshot = Snapshot.read(folder)
        if parent.get("run") not in [run.origin for run in read_runs(snapshot)]:
            there = Path(parent["dirpath"])
            gone = there == folder or not there.exists()
            way = "it is gone from there; if it was moved, " if gone else ""
            raise ValueError(
                f"the checkpoint was saved with the store {parent.get('store')} in {there}, and {folder} has another "
                f"one, {snapshot.store}, or a copy that went on without it: rows of two trainings would be mixed. "
                f"{way}{moved}, or use an empty folder, or overwrite=True, which deletes the rows that are here."
            )
    warnings.warn(
        f"the rows of steps 1 to {step} are not in {folder}: the checkpoint was saved with the store in "
        f"{parent['dirpath']}. A new lineage begins at step {step + 1}; if the old store was moved, {moved}.",
        stacklevel=2,
    )
