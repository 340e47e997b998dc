"""Store sketched gradients while training, and at checkpoints."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sketch._compat import (
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    changed_batches,
    evaluated_loader,
    muted_loggers,
    say,
    state_key,
)
from lightning_sketch.attribution import StoreSpec, batch_ids
from lightning_sketch.attribution.indexed_dataset import Indexed, without_index
from lightning_sketch.attribution.sketch_gradients import ExampleRows, RowFn
from lightning_sketch.attribution.spec import DTYPES
from lightning_sketch.callbacks.example_rows import TrainingExamples
from lightning_sketch.callbacks.fits import check_rows
from lightning_sketch.callbacks.log_spectrum import log_scalars
from lightning_sketch.callbacks.second_pass import SecondPass, left_by_hooks, without
from lightning_sketch.callbacks.step_rows import StepRows, one_rate
from lightning_sketch.callbacks.store_run import Copies, StoreRun, check_fresh, default_folder
from lightning_sketch.gradients import copied, training_step_loss
from lightning_sketch.gradients.engines import ONE_BY_ONE
from lightning_sketch.gradients.norms import couples
from lightning_sketch.operators.kinds import KINDS, make_sketch
from lightning_sketch.params import Layout

_MEANING = {
    "step": "fit: gradient of the step's mean loss; else: gradient of the example's own loss",
    "example": "gradient of the example's own loss",
}


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
            of their contents. An `IndexedDataset` needs none.
        queries: "val" to write the validation examples' rows too, each time that they are looked at while training, so
            that TracIn needs no saved checkpoints.
        dtype: of the stored numbers: "bfloat16", "float16" or "float32".
        loss_fn: (module, batch) -> mean loss, or one loss per example, for rows of examples; the module's own
            `training_step` if None, its logging silenced.
        name: of the folder and of the log keys, and part of the checkpoint key; "sketches" if None.
        seed: of the sketch.
        row_fn: (module, batch) -> losses, probabilities of the true labels, one each, for rows of examples.
        weight_fn: batch -> its weight in a mean over batches, see `sketch_gradients`.
        reduction: "mean", or "sum" if the loss adds up examples.
        engine: for rows of examples at a checkpoint, see `sketch_gradients`.
        fallback: for what hooks cannot split while training: "loop", a pass more for each example, before the batch is
            trained on; "vmap", the same for many at once, where the loss can be vectorized; None to leave it out. These
            passes are in evaluation mode and float32, hence without dropout and batch statistics.

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
    ):
        super().__init__()
        for argument, value, known in (
            ("sketch", sketch, KINDS),
            ("per", per, _MEANING),
            ("queries", queries, ("val", None)),
            ("dtype", dtype, DTYPES),
            ("fallback", fallback, (*ONE_BY_ONE, None)),
        ):
            if value not in known:
                raise ValueError(
                    f"GradientSketchWriter({argument}={value!r}) is not known; use {', '.join(map(repr, known))}."
                )
        if dim < 1 or every_n_train_steps < 1:
            raise ValueError(f"need dim and every_n_train_steps >= 1, got {dim} and {every_n_train_steps}.")
        self.dirpath = None if dirpath is None else str(dirpath)
        self.dim, self.kind, self.per, self.every_n_train_steps = dim, sketch, per, every_n_train_steps
        self.parameters, self.index_key, self.queries, self.dtype = parameters, index_key, queries, dtype
        self.loss_fn, self.row_fn, self.weight_fn, self.reduction = loss_fn, row_fn, weight_fn, reduction
        self.name, self.seed, self.engine, self.fallback = name or "sketches", seed, engine, fallback

        self._asked = self.dirpath
        self._resumed: dict[str, Any] | None = None
        self._moment: dict[str, Any] = {}
        self._run: StoreRun | None = None
        self._steps: StepRows | None = None
        self._training: TrainingExamples | None = None
        self._examples: ExampleRows | None = None
        self._copies: dict[int, Copies] = {}
        self._index: Tensor | None = None
        self._attached = ExitStack()

    @property
    def state_key(self) -> str:
        """Two writers with two names have two keys."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Which attempt was writing where; nothing else: rank 0's state is what every rank gets back."""
        return self._resumed or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the attempt of a checkpoint."""
        self._resumed = dict(state) or None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the moment of a checkpoint that is looked at."""
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        self._moment = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"], "lr": one_rate(groups)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; from here on take the index off the batches of an `IndexedDataset`."""
        check_rows(trainer, pl_module, stage, self.per, self.loss_fn is not None)
        if stage == "fit" and trainer.global_step == 0:
            self._resumed = None  # a checkpoint is loaded after this
        self._moment = {}
        self._attached.close()
        self._attached.enter_context(changed_batches(pl_module, self._take_index))

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
        self._begin_epoch(trainer)  # a fit that is resumed within an epoch does not start one
        if trainer.fast_dev_run:
            return
        if self.per == "step":
            spec = self._open_fit(trainer, Layout.of(pl_module, self.parameters))
            self._steps = StepRows(pl_module, spec.parameters, spec.operator)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whose turn it is."""
        if self._steps is not None:
            self._steps.begin_batch(trainer, self._ids(batch))
        if self.per == "example" and not trainer.fast_dev_run:
            if self._training is None:
                self._begin_examples(trainer, pl_module, batch)
            ids = self._ids(batch)
            copies = self._train_copies.among(len(ids))
            if (trainer.global_step + 1) % self.every_n_train_steps == 0:
                self._training.begin_batch(batch, ids)
                self._padded = copies

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
            rows.columns["padded"][:] = self._padded
            self._run.put(rows)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Sketch the gradient."""
        if self._steps is not None:
            self._steps.add_step(trainer, optimizer, (trainer.global_step + 1) % self.every_n_train_steps == 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand over the rows of the steps that are done; rank 0 writes them, the others have the same."""
        if self._steps is None:
            return
        for row in self._steps.done(trainer):
            if trainer.is_global_zero:
                self._run.put(row)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A sampler begins anew."""
        self._begin_epoch(trainer)

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
            self._look(trainer, pl_module)
        elif self._run is not None and self.queries and not trainer.sanity_checking:
            self._examples = self._rows_at(pl_module, StoreSpec.read(self._run.folder))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store."""
        self._look(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store."""
        self._look(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A row for each example."""
        self._write_examples(trainer, batch, dataloader_idx, "queries" if trainer.state.fn == "fit" else None)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A row for each example."""
        self._write_examples(trainer, batch, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A row for each example."""
        self._write_examples(trainer, batch, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Done with these weights."""
        self._examples = None

    def _begin_epoch(self, trainer: Trainer) -> None:
        self._train_copies = Copies(trainer.train_dataloader, trainer.global_rank)

    def _open_fit(self, trainer: Trainer, layout: Layout, **options: Any) -> StoreSpec:
        """The store of a fit, new or gone on with."""
        parent = self._resumed if trainer.global_step > 0 else None
        if self._asked is None and parent is not None and Path(parent["dirpath"]).exists():
            self.dirpath = parent["dirpath"]
        spec = self._open(trainer, layout, "fit", parent["attempt"] if parent else None, **options)
        self._resumed = {"attempt": self._run.attempt.number, "dirpath": self.dirpath}
        self._say_size(trainer, spec)
        return spec

    def _open(
        self, trainer: Trainer, layout: Layout, stage: str, parent: int | None = None, **options: Any
    ) -> StoreSpec:
        """The store's folder, its spec, and an attempt in it, on all ranks."""
        if self.dirpath is None:
            self.dirpath = trainer.strategy.broadcast(str(default_folder(trainer, self.name)))
        if stage == "fit" and parent is None:
            check_fresh(Path(self.dirpath))
        sketch = make_sketch(self.kind, n=layout.n, dim=min(self.dim, layout.n), seed=self.seed)
        spec = StoreSpec.of(sketch, layout, dtype=self.dtype, normalization=_MEANING[self.per], **options)
        step = trainer.global_step if parent is not None else None
        self._run = StoreRun(trainer, Path(self.dirpath), spec, stage, parent, step)
        return spec

    def _begin_examples(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """On the first batch: see what hooks serve, and open the store for that."""
        layout = Layout.of(pl_module, self.parameters)
        left = left_by_hooks(trainer, pl_module, layout, batch, self.weight_fn, self.reduction, self.fallback)
        if self.fallback is None:
            layout = without(layout, left)
        left_out = left if self.fallback is None else {}
        spec = self._open_fit(trainer, layout, left_out=left_out, contribution=bool(couples(pl_module)))
        second = None
        if left and self.fallback is not None:
            second = SecondPass(trainer, pl_module, layout, spec.operator, left, self.fallback)
        self._training = TrainingExamples(pl_module, layout, spec.operator, self.weight_fn, self.reduction, second)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for the rows of a checkpoint's examples."""
        if trainer.fast_dev_run:
            return
        layout, options = Layout.of(pl_module, self.parameters), {}
        if self.per == "example" and self.dirpath is not None and (Path(self.dirpath) / "spec.json").exists():
            there = StoreSpec.read(Path(self.dirpath))  # goes on with what could be served while training
            layout, options = there.parameters, {"left_out": there.left_out, "contribution": there.contribution}
        self._examples = self._rows_at(pl_module, self._open(trainer, layout, trainer.state.fn.value, **options))

    def _rows_at(self, pl_module: LightningModule, spec: StoreSpec) -> ExampleRows:
        """Rows of examples at the module's present weights."""
        self._copies = {}
        loss_fn = self.loss_fn or training_step_loss
        return ExampleRows(
            pl_module,
            spec.operator,
            lambda module, batch: loss_fn(module, copied(batch)),  # a step may change its batch in place
            self.row_fn,
            self.engine,
            list(spec.parameters.names),
            self.weight_fn,
            self.reduction,
        )

    def _write_examples(self, trainer: Trainer, batch: Any, loader: int, stage: str | None = None) -> None:
        if self._examples is None:
            return
        with muted_loggers(trainer):
            rows = self._examples(batch, self._ids(batch))
        if loader not in self._copies:
            self._copies[loader] = Copies(evaluated_loader(trainer, loader), trainer.global_rank)
        rows.columns["padded"][:] = self._copies[loader].among(len(rows))
        rate = one_rate([group for optimizer in trainer.optimizers for group in optimizer.param_groups])
        now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "lr": rate}
        self._run.put(rows, stage, **(self._moment or now))

    def _take_index(self, batch: Any) -> Any:
        self._index = batch_ids(batch, None) if isinstance(batch, Indexed) else None
        return without_index(batch)

    def _ids(self, batch: Any) -> Tensor:
        return batch_ids(batch, self.index_key) if self._index is None else self._index

    def _say_size(self, trainer: Trainer, spec: StoreSpec) -> None:
        steps = trainer.estimated_stepping_batches
        row = spec.sketch["dim"] * DTYPES[self.dtype].itemsize
        if self.per == "example" or steps in (-1, float("inf")):
            say(trainer, f"{self.name}: {row / 1e3:.1f} kB a row, to {self.dirpath}")
            return
        rows = max(0, int(steps) - trainer.global_step) // self.every_n_train_steps
        say(trainer, f"{self.name}: {rows:,} rows of {row / 1e3:.1f} kB, {rows * row / 1e6:,.1f} MB, to {self.dirpath}")

    def _close(self) -> None:
        self._attached.close()
        if self._training is not None:
            self._training.stop()
        run, self._run, self._steps, self._training, self._examples = self._run, None, None, None, None
        if run is not None:
            run.appender.close()
