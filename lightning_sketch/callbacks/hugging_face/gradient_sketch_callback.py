"""The callback that stores sketched gradients while the Trainer of Hugging Face trains."""

import os
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from lightning_sketch._arguments import check_loss_fn, check_patterns, whole_number
from lightning_sketch._lightning import common_lr
from lightning_sketch.attribution.row_arguments import remember
from lightning_sketch.autodiff.fingerprint import Known, module_fingerprint_on_device
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks.gradient_sketch_writer._arriving import ArrivingRows
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import StoreRun, _is_in, begin, described_size
from lightning_sketch.callbacks.hugging_face import _trainer as hf
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.store.spec import Dtype, StoreSpec

# The name of the folder, and the key of an entry in the Trainer's log history: a checkpoint has that, and so its run.
_NAME = "gradient_sketches"
_STEPS_INSIDE = ("lomo", "layerwise")  # optimizers that step while gradients are computed


class GradientSketchCallback(TrainerCallback):
    """Store one sketched gradient per optimizer step, as `GradientSketchWriter` does in a Trainer of Lightning.

    A row is S times the gradient that the optimizer is about to use: averaged over accumulated batches and ranks,
    unscaled and clipped; with its step, epoch, learning rate, and a fingerprint of the weights.
    `GradientStore.open(callback.dirpath)` reads them: its `top_k` and `scores` with method="tracin" compare them with
    queries at checkpoints, which `sketch_gradients(model, batches)` takes with the Trainer's own loss. A step that a
    GradScaler skips has no row, or one that is not `finite`.

    The first process writes, in a thread; `kill -9` loses at most the rows of the last minute, and none before a
    checkpoint. `trainer.train(resume_from_checkpoint=...)` resumes in the same store, in which each step then has one
    row. Training is unaffected, bit for bit. A row takes `dim` numbers on the disk, the time of a pass over the
    gradient and one over the weights.

    Args:
        trainer: The Trainer.
        dirpath: The folder of the store; `gradient_sketches` in the Trainer's `output_dir` if None.
        dim: The numbers in a row; reduced to the number of parameters if there are fewer.
        sketch: The kind of the sketch S, as in `make_sketch`.
        dtype: The type of the stored numbers: "bfloat16", "float16" or "float32".
        every_n_train_steps: The number of optimizer steps between two rows.
        parameters: Which parameters to include, as shell patterns of their names.
        seed: The seed of the sketch.
        loss_fn: (module, batch) -> mean loss, for queries; what the Trainer trains if None.
        overwrite: Whether the first training deletes the store that the folder has, unless it resumes it.
        on_error: What to do if rows cannot be written, as on a full disk: "raise", or "warn" and go on without.

    Raises:
        ValueError: If an argument is out of its range. Before training, if the Trainer shards parameters, its optimizer
            steps while gradients are computed (LOMO, layerwise GaLore), or the folder has a store of other rows.
        RuntimeError: At a later step, if a file could not be written.

    Example::

        callback = GradientSketchCallback(trainer)
        trainer.add_callback(callback)
        trainer.train()
        store = GradientStore.open(callback.dirpath)
        queries = store.sketch_gradients(trainer.model, [batch])
        steps = store.top_k({trainer.state.global_step: queries}, 10, method="tracin")
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        dirpath: str | Path | None = None,
        dim: int = 1024,
        sketch: str = "block_srht",
        dtype: Dtype = "bfloat16",
        every_n_train_steps: int = 1,
        parameters: str | list[str] = "*",
        seed: int = 0,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        overwrite: bool = False,
        on_error: Literal["warn", "raise"] = "raise",
    ):
        whole_number(dim, "dim", usual=1024)
        whole_number(every_n_train_steps, "every_n_train_steps", usual=1)
        check_patterns(parameters)
        if loss_fn is not None:
            check_loss_fn(loss_fn)
        hf.check(trainer, "GradientSketchCallback")
        optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        if any(word in optimizer for word in _STEPS_INSIDE):
            raise ValueError(
                f"GradientSketchCallback needs the gradient of a whole step, got optim={optimizer!r}, which steps for "
                "each layer while gradients are computed; use another optimizer, such as its kind without layers."
            )
        self.trainer, self.overwrite, self.on_error = trainer, overwrite, on_error
        self.dirpath = os.path.abspath(Path(dirpath or Path(str(trainer.args.output_dir)) / _NAME).expanduser())
        self.every_n_train_steps, self.parameters, self.dtype = every_n_train_steps, parameters, dtype
        self._kind, self._dim, self._seed = sketch, dim, seed
        self._arguments = {"loss_fn": loss_fn or hf.loss_of(trainer)}
        self._steps = hf.BeforeSteps()
        self._run: StoreRun | None = None
        self._close: Callable[[], object] = lambda: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Open the store, a new one or that of the checkpoint."""
        self._steps.detach()
        self._close()
        hf.check(self.trainer, "GradientSketchCallback")
        if not state.is_world_process_zero:
            return
        model, optimizer = objects["model"], hf.bare(objects["optimizer"])
        self._model, self._layout = model, Layout.of(model, self.parameters)
        n = self._layout.n
        spec = StoreSpec.of(
            make_sketch(self._kind, n=n, dim=min(self._dim, n), seed=self._seed),
            self._layout,
            dtype=self.dtype,
            normalization="fit: gradient of the step's mean loss, clipped; else: gradient of the example's own loss",
        )
        folder = Path(self.dirpath)
        records = [entry[_NAME] for entry in reversed(state.log_history) if _NAME in entry]
        parent = next((record for record in records if _is_in(folder, record)), records[0] if records else None)
        snapshot, run = begin(
            folder,
            spec,
            "fit",
            parent if state.global_step else None,
            step=state.global_step,
            world_size=1,
            optimizers=[optimizer],
            arguments=self._arguments,
            overwrite=self.overwrite,
            say=lambda text: hf.say(self.trainer, text),
        )
        remember(run.id, self._arguments)
        self.overwrite = False
        record = {"attempt": run.number, "run": run.id, "store": snapshot.store, "dirpath": self.dirpath}
        state.log_history.append({_NAME: record, "epoch": state.epoch, "step": state.global_step})
        opened = self._run = StoreRun(0, snapshot, run, self.on_error)
        self._arriving = deque[ArrivingRows]()
        self._named = dict(zip(self._layout.names, self._layout.parameters(model), strict=True))
        self._frozen, self._epoch = Known(), -1
        self._close = weakref.finalize(self, _close, opened, self._arriving)  # at the end of the process, too
        self._steps.attach(optimizer, self._add_row)
        rows = max(0, state.max_steps - state.global_step) // self.every_n_train_steps
        hf.say(self.trainer, f"{_NAME}: {described_size(opened, rows)}, to {self.dirpath}")

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Commit the rows that a checkpoint relies on, before it is written."""
        if control.should_save:
            self._flush()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Commit the rows, since the Trainer may save the best model next."""
        self._flush()

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Commit the rows, if another callback asked for the checkpoint."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Commit all rows and close the store."""
        self._steps.detach()
        self._close()
        self._run = None

    def _add_row(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the row of the step that the optimizer is about to take."""
        state = self.trainer.state
        step, epoch = state.global_step + 1, hf.epoch_of(state)
        if self._run is None or step % self.every_n_train_steps:
            return
        if epoch != self._epoch:
            self._epoch = epoch
            self._frozen.clear()
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = {name: p.grad for name, p in self._named.items() if id(p) in stepped}
        operator = self._run.spec.operator
        row = self._layout.sketch(operator, gradients) / hf.gradient_scale(optimizer)
        columns: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "lr": common_lr(optimizer.param_groups),
            "fingerprint": module_fingerprint_on_device(self._model, self._frozen),
        }
        columns = {key: torch.as_tensor(value).view(1) for key, value in columns.items()}
        _put(self._run, self._arriving)  # the row before has arrived meanwhile
        self._arriving.append(ArrivingRows(row[None].float(), operator, columns))

    def _flush(self) -> None:
        if self._run is not None:
            _put(self._run, self._arriving)
            self._run.flush()


def _put(run: StoreRun, arriving: deque[ArrivingRows]) -> None:
    """Store the rows that were computed, in their order."""
    while arriving:
        run.put(arriving.popleft().get())


def _close(run: StoreRun, arriving: deque[ArrivingRows]) -> None:
    """Store the rows that were computed, and close the store."""
    try:
        _put(run, arriving)
    finally:
        run.close()
