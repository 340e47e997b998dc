"""Store sketched gradients while training, and at checkpoints."""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sketch._lightning import CallbackBase, LightningModule, Trainer, batches_done, state_key
from lightning_sketch.attribution.sketch_gradients import ExampleRows, RowFn
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import training_step_loss
from lightning_sketch.callbacks._optimizers import one_rate
from lightning_sketch.callbacks._validate import check_rows
from lightning_sketch.callbacks.gradient_sketch_writer._checkpoint_rows import CheckpointRows
from lightning_sketch.callbacks.gradient_sketch_writer._example_ids import BatchNumbers
from lightning_sketch.callbacks.gradient_sketch_writer._example_rows import TrainingExamples
from lightning_sketch.callbacks.gradient_sketch_writer._fallback import left_by_hooks, without
from lightning_sketch.callbacks.gradient_sketch_writer._step_rows import StepRows
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import ROWS, StoreRun, StoreSession
from lightning_sketch.callbacks.spectrum_monitor._logging import log_scalars
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.per_example.example_sketches import ENGINES, ONE_BY_ONE, ExampleSketches
from lightning_sketch.per_example.reduction import REDUCTIONS
from lightning_sketch.per_example.rules.normalization import couples
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID
from lightning_sketch.store.spec import DTYPES
from lightning_sketch.subspace import SubspaceModule


class GradientSketchWriter(CallbackBase):
    """Store one sketched gradient per optimizer step, and one per example at a checkpoint, for questions asked later.

    While training, a row is S times the gradient that the step is made from: of the accumulated batches, averaged over
    the ranks, unscaled, before clipping; with its step, epoch, learning rate, loss, and the ids of its examples. Under
    `trainer.validate`, `test` or `predict` with a data loader it is S times the gradient of each example's own training
    loss, in evaluation mode, with the example's id. `GradientStore.open(writer.dirpath)` reads them.

    Rows are written by a thread, in files that are whole or not there; `kill -9` loses at most what was not flushed, a
    minute's rows, and nothing that a checkpoint counts on. `trainer.fit(ckpt_path=...)` goes on in the same store, and
    each step has its row once, whatever was interrupted.

    Training is not touched: final weights are the same, bit for bit, with and without the writer.

    Args:
        dirpath: folder of the store; beside ModelCheckpoint's if None, and on resuming that of the checkpoint.
        dim: numbers in a row; at most the number of parameters, to which it is cut.
        sketch: kind of the map, as in `make_sketch`.
        per: "step" for a row per optimizer step; "example" for a row per training example, from the same backward pass,
            in the mode and precision of training, for every batch of a recorded step. Needs the examples' numbers. What
            hooks cannot split, as a recurrent layer, is served by `fallback`, or left out by name, in a warning and in
            the store's spec; in batch norm's training mode a row is a share of a batch in which examples are coupled,
            and marked so.
        every_n_train_steps: optimizer steps between two rows while training.
        parameters: which parameters, as a shell pattern on their names.
        index_key: where a batch keeps the numbers of its examples: a key or a place in it, or "hash" for numbers made
            of their contents, which are others wherever these are drawn anew. An `IndexedDataset` needs none.
        queries: "val" to write the validation examples' rows too, each time that they are looked at while training, so
            that TracIn needs no saved checkpoints.
        dtype: of the stored numbers: "bfloat16", "float16" or "float32".
        loss_fn: (module, batch) -> mean loss, or one loss per example, for rows of examples at a checkpoint; the
            module's own `training_step` if None, its logging silenced.
        name: of the folder and of the log keys, and part of the checkpoint key; "sketches" if None.
        seed: of the sketch.
        row_fn: (module, batch) -> losses, probabilities of the true labels, one each, at a checkpoint.
        weight_fn: batch -> its weight in a mean over batches, see `sketch_gradients`.
        reduction: "mean", or "sum" if the loss adds up examples.
        engine: for rows of examples at a checkpoint, see `sketch_gradients`.
        fallback: for what hooks cannot split with per="example": "loop", a pass more for each example, before its batch
            is trained on; "vmap", many at once, where the loss can be vectorized; None to leave it out. These passes
            are in evaluation mode and float32, hence without dropout and batch statistics.
        num_examples: how many examples a batch has, or batch -> how many, see `sketch_gradients`.
        batch_dim: the axis of the examples, see `sketch_gradients`.
        split_fn: batch -> batches of one example, see `sketch_gradients`.

    Raises:
        ValueError: if an argument is out of its range.
        MisconfigurationException: before training, if the Trainer or the module does not fit, or a fit is there.
        RuntimeError: at the next hook, if a file could not be written; rows committed before are intact.

    Example::

        writer = GradientSketchWriter()
        trainer = Trainer(max_epochs=10, callbacks=[writer])
        trainer.fit(model, datamodule=data)
        trainer.validate(model, train_loader)  # a row per training example, at the final weights
        store = GradientStore.open(writer.dirpath)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        dim: int = 4096,
        sketch: str = "block_srht",
        per: str = "step",
        every_n_train_steps: int = 1,
        parameters: str = "*",
        index_key: str | int | None = None,
        queries: str | None = None,
        dtype: str = "bfloat16",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        name: str | None = None,
        seed: int = 0,
        row_fn: RowFn | None = None,
        weight_fn: Callable[[Any], float] | None = None,
        reduction: str = "mean",
        engine: str = "auto",
        fallback: str | None = None,
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
        split_fn: Callable[[Any], Iterable[Any]] | None = None,
    ):
        super().__init__()
        for argument, value, known in (
            ("sketch", sketch, KINDS),
            ("per", per, ROWS),
            ("queries", queries, ("val", None)),
            ("dtype", dtype, DTYPES),
            ("reduction", reduction, REDUCTIONS),
            ("engine", engine, ENGINES),
            ("fallback", fallback, (*ONE_BY_ONE, None)),
        ):
            if value not in known:
                raise ValueError(
                    f"GradientSketchWriter({argument}={value!r}) is not known; use {', '.join(map(repr, known))}."
                )
        if dim < 1 or every_n_train_steps < 1:
            raise ValueError(f"need dim and every_n_train_steps >= 1, got {dim} and {every_n_train_steps}.")
        self.per, self.every_n_train_steps, self.parameters = per, every_n_train_steps, parameters
        self.loss_fn, self.row_fn, self.weight_fn, self.reduction = loss_fn, row_fn, weight_fn, reduction
        self.engine, self.fallback, self.queries, self.name = engine, fallback, queries, name or "sketches"

        self._store = StoreSession(dirpath, self.name, per, dtype, kind=sketch, dim=dim, seed=seed)
        self._structure = partial(BatchStructure, num_examples, batch_dim, split_fn)
        self._structure()  # refuses what is out of range
        self._numbers = BatchNumbers(index_key, self._structure)
        self._moment: dict[str, Any] = {}
        self._run: StoreRun | None = None
        self._steps: StepRows | None = None
        self._training: TrainingExamples | None = None
        self._checkpoint: CheckpointRows | None = None

    @property
    def dirpath(self) -> str | None:
        """Folder of the store; None until it is known."""
        return self._store.dirpath

    @property
    def state_key(self) -> str:
        """Two writers with two names have two keys."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Which attempt was writing where; nothing else: rank 0's state is what every rank gets back."""
        return self._store.resumed or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the attempt of a checkpoint."""
        self._store.resumed = dict(state) or None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the moment of a checkpoint that is looked at."""
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        rate = math.nan if isinstance(pl_module, SubspaceModule) else one_rate(groups)  # there they are not those of w
        self._moment = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"], "lr": rate}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; from here on take the index off the batches of an `IndexedDataset`."""
        check_rows(trainer, pl_module, stage, self.per, self.loss_fn is not None)
        if stage == "fit" and trainer.global_step == 0:
            self._store.resumed = None  # a checkpoint is loaded after this
        self._moment = {}
        self._numbers.attach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Commit what is there."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Commit the rows of the steps that were done; the error that stopped training is the one to see."""
        try:
            self._close()
        except RuntimeError as error:
            if error is not exception:
                warnings.warn(str(error), stacklevel=2)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store."""
        if self.per == "step" and not trainer.fast_dev_run:
            layout = Layout.of(pl_module, self.parameters)
            self._run = self._store.fit(trainer, layout, self.every_n_train_steps)
            self._steps = StepRows(pl_module, layout, self._run.spec.operator)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whose turn it is."""
        if trainer.fast_dev_run:
            return
        ids = self._numbers(batch) if self.per == "example" or self._numbers.known else torch.tensor([UNKNOWN_ID])
        if batch_idx == 0 and self._run is not None:
            self._run.check_covers(Layout.of(pl_module, self.parameters))
        if self._steps is not None:
            self._steps.begin_batch(trainer, ids)
            return
        if self._training is None:
            self._training = self._begin_examples(trainer, pl_module, batch)
        self._training.begin_batch(trainer, batch, ids, self._is_turn(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss."""
        if self._steps is not None:
            self._steps.add_loss(trainer, loss)
        if self._training is not None:
            self._training.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The rows of the batch's examples."""
        rows = self._training.done(trainer) if self._training is not None else None
        if rows is not None:
            self._run.put(rows)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Sketch the gradient."""
        if self._steps is not None:
            self._steps.add_step(trainer, optimizer, self._is_turn(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand over the rows of the steps that are done; rank 0 writes them, the others have the same."""
        if self._steps is None:
            return
        for row in self._steps.done(trainer):
            if trainer.is_global_zero:
                self._run.put(row)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the number of rows."""
        if self._run is not None:
            scalars = {f"{self.name}/rows": float(self._run.appender.rows)}
            log_scalars(trainer.loggers, scalars, batches_done(trainer) - 1)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What the checkpoint counts on is on the disk, on every rank, before it is written."""
        if self._run is not None:
            self._run.appender.flush()
            trainer.strategy.barrier()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store, or prepare for the queries."""
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)
        elif self._run is not None and self.queries and not trainer.sanity_checking:
            self._checkpoint = self._rows_at(pl_module, self._run, "queries")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Done with these weights."""
        self._checkpoint = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store."""
        if not trainer.fast_dev_run:
            self._run = self._store.look(trainer, Layout.of(pl_module, self.parameters))
            self._checkpoint = self._rows_at(pl_module, self._run, self._run.stage)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A row for each example."""
        if self._checkpoint is not None:
            self._checkpoint.write(trainer, batch, self._numbers(batch, dataloader_idx), dataloader_idx)

    on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def _is_turn(self, trainer: Trainer) -> bool:
        return (trainer.global_step + 1) % self.every_n_train_steps == 0

    def _begin_examples(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> TrainingExamples:
        """On the first batch: see what hooks serve, and open the store for that."""
        layout, structure = Layout.of(pl_module, self.parameters), self._structure()
        weights = self.weight_fn, self.reduction, structure
        left = left_by_hooks(trainer, pl_module, layout, batch, *weights, self.fallback)
        told: dict[str, Any] = {"contribution": bool(couples(pl_module))}
        if self.fallback is None:
            layout, told["left_out"] = without(layout, left), left
        examples = structure.count(batch) * trainer.accumulate_grad_batches * trainer.world_size
        self._run = self._store.fit(trainer, layout, self.every_n_train_steps, examples, **told)
        sketch = self._run.spec.operator
        return TrainingExamples(trainer, pl_module, layout, sketch, *weights, self.fallback, left)

    def _rows_at(self, pl_module: LightningModule, run: StoreRun, stage: str) -> CheckpointRows:
        """Rows of examples at the module's present weights."""
        layout, sketch, loss_fn = run.spec.parameters, run.spec.operator, self.loss_fn or training_step_loss
        own = ExampleSketches(
            pl_module,
            layout,
            sketch=sketch,
            loss_fn=loss_fn,
            engine=self.engine,
            weight_fn=self.weight_fn,
            reduction=self.reduction,
            structure=self._structure(),
        )
        return CheckpointRows(ExampleRows(own, self.row_fn), run, stage, self._moment, self._numbers.hashed)

    def _close(self) -> None:
        self._numbers.detach()
        if self._training is not None:
            self._training.stop()
        run, self._run, self._steps, self._training, self._checkpoint = self._run, None, None, None, None
        if run is not None:
            run.appender.close()
