"""Where a writer's store is, what its rows are, and which attempt goes on from which."""

from pathlib import Path
from typing import Any

from lightning_sketch._lightning import Trainer
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks.gradient_sketch_writer._store_run import StoreRun, default_folder, say_size
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.store.spec import StoreSpec

_MEANING = {
    "step": "fit: gradient of the step's mean loss; else: gradient of the example's own loss",
    "example": "gradient of the example's own loss",
}
ROWS = tuple(_MEANING)


class Opening:
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
