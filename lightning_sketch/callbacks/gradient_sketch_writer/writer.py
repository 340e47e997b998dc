"""The callback that stores sketched gradients during training and at checkpoints."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sketch._arguments import check_loss_fn, check_patterns, whole_number
from lightning_sketch._lightning import (
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    callbacks_of,
    common_lr,
    log_scalars,
    muted_loggers,
    param_groups,
    state_key,
)
from lightning_sketch.attribution.preconditioner import Preconditioner
from lightning_sketch.attribution.sketch_gradients import ExampleRows, RowFn
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import training_step_loss
from lightning_sketch.callbacks.gradient_sketch_writer._arriving import ArrivingRows
from lightning_sketch.callbacks.gradient_sketch_writer._checkpoint_rows import CheckpointRows
from lightning_sketch.callbacks.gradient_sketch_writer._example_rows import (
    Fallback,
    TrainingExamples,
    unsupported_by_hooks,
)
from lightning_sketch.callbacks.gradient_sketch_writer._examples import ExampleIds, UserColumns
from lightning_sketch.callbacks.gradient_sketch_writer._preconditioned import (
    Choice,
    StepPreconditioner,
    of_checkpoint,
)
from lightning_sketch.callbacks.gradient_sketch_writer._step_rows import StepRows
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import (
    Granularity,
    OnError,
    StoreRun,
    StoreSession,
)
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.per_example.example_sketches import ENGINES, Engine, ExampleSketches
from lightning_sketch.per_example.rules.normalization import couples
from lightning_sketch.per_example.weights import Reduction, Weighings
from lightning_sketch.store.sketched_gradients import NONE, UNKNOWN_ID, Stage
from lightning_sketch.store.spec import DTYPES, Dtype

_MOST_ARRIVING = 64  # batches of rows on their way from a device; of more, the first are waited for


class GradientSketchWriter(CallbackBase):
    """Store one sketched gradient per optimizer step, or per training example, and one per example at a checkpoint.

    During training, a row is S times the gradient that the step uses: averaged over the accumulated batches and the
    ranks, unscaled, before clipping; with its step, epoch, learning rate, loss, and the ids of its examples. Under
    `trainer.validate`, `test` or `predict` with a data loader it is S times the gradient of each example's own training
    loss, in evaluation mode, with the example's id, its weight in a mean over its batch, and the learning rate of the
    last step. `GradientStore.open(writer.dirpath)` reads them.

    How the loss weighs the examples of a batch is found, and checked, see `sketch_gradients`: on every batch; in
    training on each of the first 32, on a quarter of the later ones, which are drawn, and on those with a new size or a
    class that came in none before. Where that fails in training, rows have `scale_known` False, those of the fit that
    were written before too.

    A thread writes the rows to files that are complete or absent; `kill -9` loses at most the rows of the last minute,
    and none that a checkpoint relies on. `trainer.fit(ckpt_path=...)` resumes in the same store, and each step has
    exactly one row however often the fit was interrupted.

    Training is unaffected: the final weights are the same, bit for bit, with and without the writer. A row takes `dim`
    numbers on the disk, and that of a step the time of a pass over the gradient and of one over the weights; where
    numba is missing (`pip install lightning-sketch[fast]`), a CPU takes five to eight times as long for the first.

    Args:
        dirpath: The folder of the store. If None it is beside that of ModelCheckpoint, or, when a fit resumes, the one
            that the checkpoint names. If it has a store already, the rows are added to that. Under `fast_dev_run` it is
            a temporary folder, deleted at the end of the process.
        dim: The numbers in a row; reduced to the number of parameters if there are fewer.
        sketch: The kind of the sketch S, as in `make_sketch`.
        per: "step" for a row per optimizer step; "example" for a row per training example, from the same backward pass,
            in the mode and precision of training, for every batch of a recorded step. Needs ids of the examples.
            Parameters that hooks do not support, such as those of a recurrent layer, are covered by `fallback`, or
            named in a warning and in the store's spec. In batch norm's training mode a row is a share of a batch whose
            examples are coupled, and marked so. Costs a forward pass of four examples for each batch that is checked.
        every_n_train_steps: The number of optimizer steps between two rows during training.
        parameters: Which parameters to include, as shell patterns of their names.
        index_key: The key or position of the ids in a batch, numbers or strings, or "hash" for ids that are hashes of
            the examples' contents, which differ each time where augmentation is random. An `IndexedDataset` needs none.
        queries: "val" to write rows of the validation examples too, at each validation during training, so that TracIn
            needs no saved checkpoints.
        dtype: The type of the stored numbers: "bfloat16", "float16" or "float32".
        loss_fn: (module, batch) -> mean loss, or one loss per example, for rows of examples at a checkpoint; the
            module's own `training_step` if None, without its logging.
        name: The name of the folder, the prefix of the log keys and a part of the checkpoint key; "sketches" if None.
            Two writers in one Trainer need two names.
        seed: The seed of the sketch.
        row_fn: (module, batch) -> (losses, probabilities of the true labels), each (examples,), stored at a checkpoint,
            where they are not known without it, see `sketch_gradients`.
        weight_fn: batch -> its weight in a mean over batches, such as the sum of its class weights, where none of the
            usual ways fits.
        reduction: "mean" or "sum", what the loss does over the examples of a batch; found by itself if None.
        engine: How rows of examples at a checkpoint are computed, see `sketch_gradients`.
        fallback: What per="example" does for parameters that hooks do not support: "loop" takes one more pass per
            example, before its batch is trained on; "vmap" vectorizes these passes, if the loss supports it; None omits
            the parameters. These passes are in evaluation mode and float32, without dropout and batch statistics.
        num_examples: The number of examples in a batch, or batch -> this number, see `sketch_gradients`.
        batch_dim: The axis of the examples, see `sketch_gradients`.
        split_fn: batch -> batches of one example, see `sketch_gradients`.
        columns_fn: batch -> {name: values}, columns of your own, such as the source or the class of each example: a
            number, boolean or string for each example, or one for all. The row of a step has the value of the first
            rank's last batch, if that is the same for all its examples. `store.where(source="wiki")` selects by them.
        overwrite: Whether the first fit deletes the store that the folder has, unless it resumes it.
        on_error: What to do if rows cannot be written, as on a full disk: "raise" ends the training at the next file;
            "warn" goes on without rows, and the store says that some are missing.
        preconditioner: What gradients are multiplied by before they are sketched, so that the products of rows are
            influence, with a damping for each layer: the better choice for language models, not for small images.
            "ekfac" fits it to the data loader of `trainer.validate`, in two passes before its rows are written, and the
            store keeps it (3 to 5 n numbers); "kfac" in one; or what `fit_preconditioner` returned. "optimizer" is the
            diagonal of Adam: rows of training are S P_t^-1 g with that of their step, whose products with plain queries
            are how much the step lowers a loss (with per="example" over the batch size); at a checkpoint it is that of
            the optimizer that trained. With "ekfac" and "kfac" the rows of training, and those of queries="val", are
            plain. Rows of Adam's steps are of clipped gradients; with per="example" P_t has the clipping of the step
            before in it, and under DDP the gradient of its own rank.

    Raises:
        ValueError: If an argument is out of its range; before training, if the folder has a store of other rows or, on
            resuming, of another training.
        MisconfigurationException: Before training, if the Trainer or the module is not supported.
        RuntimeError: At the next hook, if a file could not be written; rows that were committed before are intact.

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
        *,
        dim: int = 4096,
        sketch: str = "block_srht",
        per: Granularity = "step",
        every_n_train_steps: int = 1,
        parameters: str | list[str] = "*",
        index_key: str | int | None = None,
        queries: Literal["val"] | None = None,
        dtype: Dtype = "bfloat16",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        name: str | None = None,
        seed: int = 0,
        row_fn: RowFn | None = None,
        weight_fn: Callable[[Any], float] | None = None,
        reduction: Reduction | None = None,
        engine: Engine = "auto",
        fallback: Fallback | None = None,
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
        split_fn: Callable[[Any], Iterable[Any]] | None = None,
        columns_fn: Callable[[Any], Mapping[str, Any]] | None = None,
        overwrite: bool = False,
        on_error: OnError = "raise",
        preconditioner: Choice | None = None,
    ):
        super().__init__()
        for argument, value, known in (
            ("sketch", sketch, KINDS),
            ("per", per, get_args(Granularity)),
            ("queries", queries, ("val", None)),
            ("dtype", dtype, DTYPES),
            ("reduction", reduction, (*get_args(Reduction), None)),
            ("engine", engine, ENGINES),
            ("fallback", fallback, (*get_args(Fallback), None)),
            ("on_error", on_error, get_args(OnError)),
        ):
            if value not in known:
                raise ValueError(
                    f"GradientSketchWriter({argument}={value!r}) is not known; use {', '.join(map(repr, known))}."
                )
        if not (preconditioner in ("ekfac", "kfac", "optimizer", None) or isinstance(preconditioner, Preconditioner)):
            raise ValueError(
                f"GradientSketchWriter(preconditioner={preconditioner!r}) is not known; use 'ekfac', 'kfac', "
                "'optimizer', None, or what fit_preconditioner returned."
            )
        if preconditioner == "optimizer" and fallback is not None:
            raise ValueError("fallback takes its passes before the step, whose preconditioner they lack; leave it out.")
        if columns_fn is not None and not callable(columns_fn):
            raise ValueError(f"columns_fn={columns_fn!r} is no function; pass lambda batch: {{'source': ...}}.")
        whole_number(dim, "dim", usual=4096)
        whole_number(every_n_train_steps, "every_n_train_steps", usual=1)
        check_patterns(parameters)
        if loss_fn is not None:
            check_loss_fn(loss_fn)
        self.per, self.every_n_train_steps, self.parameters = per, every_n_train_steps, parameters
        self.loss_fn, self.row_fn, self.weight_fn, self.reduction = loss_fn, row_fn, weight_fn, reduction
        self.engine, self.fallback, self.queries, self.name = engine, fallback, queries, name or "sketches"
        self.preconditioner = preconditioner

        self._arguments = {  # that queries inherit
            "loss_fn": loss_fn,
            "row_fn": row_fn,
            "weight_fn": weight_fn,
            "reduction": reduction,
            "num_examples": num_examples,
            "batch_dim": batch_dim,
            "split_fn": split_fn,
        }
        self._session = StoreSession(
            dirpath,
            name=self.name,
            per=per,
            dtype=dtype,
            kind=sketch,
            dim=dim,
            seed=seed,
            overwrite=overwrite,
            on_error=on_error,
            arguments=self._arguments,
        )
        self._structure = partial(BatchStructure, num_examples, batch_dim, split_fn)
        self._structure()  # raises if an argument is out of its range
        self._example_ids = ExampleIds(index_key, self._structure)
        self._own_columns = UserColumns(columns_fn)
        self._position: dict[str, Any] = {}
        self._optimizer_states: list[Mapping[str, Any]] = []
        self._lr = math.nan  # of the last optimizer step
        self._run: StoreRun | None = None
        self._arriving: deque[ArrivingRows] = deque()
        self._steps: StepRows | None = None
        self._training: TrainingExamples | None = None
        self._checkpoint: CheckpointRows | None = None

    @property
    def dirpath(self) -> str | None:
        """The folder of the store; None until it is known."""
        return self._session.dirpath

    @property
    def lineage(self) -> int | None:
        """The number of the fit that was written last, for `GradientStore.open(writer.dirpath, writer.lineage)`."""
        return self._session.resumed["attempt"] if self._session.resumed else None

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; writers with different names have different keys."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the run that writes and its folder; nothing else, since every rank gets rank 0's state back."""
        return {**self._session.resumed, "lr": self._lr} if self._session.resumed else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember the run that a checkpoint belongs to, for a fit that resumes."""
        state = dict(state)
        self._lr = state.pop("lr", math.nan)
        self._session.resumed = state or None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step, epoch and learning rate of a checkpoint, for the rows at its weights."""
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        # A scheduler has set the rate of the next step already.
        lr = (own or {}).get("lr", math.nan if checkpoint.get("lr_schedulers") else common_lr(groups))
        self._session.measured = own
        self._optimizer_states = checkpoint.get("optimizer_states", []) if self.preconditioner == "optimizer" else []
        self._position = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"], "lr": lr}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the Trainer and the module, and start to remove the ids from the batches of an `IndexedDataset`."""
        _check(trainer, pl_module, stage, self.per, self.loss_fn is not None)
        _check_alone(trainer, self)
        if stage == "fit" and trainer.global_step == 0:  # the checkpoint is loaded after this hook
            self._session.resumed, self._lr = None, math.nan
        self._position, self._session.measured, self._optimizer_states = {}, self._session.resumed, []
        self._example_ids.attach(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Commit all rows and close the store."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Commit the rows of the steps that were done; an error of the writer itself becomes a warning."""
        try:
            self._close()
        except RuntimeError as error:
            if str(error) != str(exception):
                warnings.warn(str(error), stacklevel=2)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store for rows of steps."""
        if self.per == "step":
            layout = Layout.of(pl_module, self.parameters)
            self._run = self._session.open_fit(trainer, layout, self.every_n_train_steps)
            named = dict(zip(layout.names, layout.parameters(pl_module), strict=True))
            own = StepPreconditioner(trainer, named) if self.preconditioner == "optimizer" else None
            self._steps = StepRows(pl_module, layout, self._run.spec.operator, own)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect the ids of the examples, and attach hooks if rows of examples are recorded in this step."""
        has_ids = self.per == "example" or self._example_ids.known
        ids = self._example_ids(batch) if has_ids else torch.tensor([UNKNOWN_ID])
        if batch_idx == 0 and self._run is not None:
            self._run.check_covers(Layout.of(pl_module, self.parameters))
        if self._steps is not None:
            self._steps.begin_batch(trainer, ids, self._own_columns(batch, None))
            return
        if self._training is None:
            self._training = self._begin_examples(trainer, pl_module, batch)
        own = self._own_columns(batch, len(ids))
        self._training.begin_batch(trainer, batch, ids, own, self._is_recorded(trainer))
        if self._training.doubt and self._run is not None:
            self._training.doubt = False
            self._put_arrived(wait=True)
            self._run.doubt_scale()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Collect the loss."""
        if self._steps is not None:
            self._steps.add_loss(trainer, loss)
        if self._training is not None:
            self._training.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the rows of the batch's examples."""
        rows = self._training.take_rows(trainer) if self._training is not None else None
        if rows is not None:
            self._arriving.append(rows)
        self._put_arrived()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Sketch the gradient of the step."""
        self._lr = common_lr(param_groups(trainer.optimizers))
        if self._steps is not None:
            self._steps.add_step(trainer, optimizer, self._is_recorded(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the rows of the steps that are done; rank 0 writes them, since all ranks have the same ones."""
        if self._steps is not None:
            rows = self._steps.take_rows(trainer)
            self._arriving.extend(rows if trainer.is_global_zero else [])
            self._put_arrived()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the number of rows."""
        if self._run is not None:
            self._put_arrived(wait=True)
            scalars = {f"{self.name}/rows": float(self._run.rows)}
            log_scalars(trainer, scalars, batches_done(trainer) - 1)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Commit, on every rank, the rows that the checkpoint relies on, before it is written."""
        if self._run is not None:
            self._put_arrived(wait=True)
            self._run.flush()
            trainer.strategy.barrier()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store under `trainer.validate`, or prepare to store queries."""
        self._put_arrived(wait=True)  # before the rows of queries, and a wait for the end of the validation
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)
        elif self._run is not None and self.queries and not trainer.sanity_checking:
            self._checkpoint = self._checkpoint_rows(trainer, pl_module, self._run, "queries")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was held back, and drop what was prepared for the present weights."""
        if self._checkpoint is not None:
            self._checkpoint.finish()
            if trainer.state.fn != "fit" and self._run is not None:  # rank 0 may read the store at once
                self._run.flush()
                trainer.strategy.barrier()
        self._checkpoint = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store for rows at a checkpoint."""
        self._run = self._session.open_checkpoint(trainer, Layout.of(pl_module, self.parameters))
        self._checkpoint = self._checkpoint_rows(trainer, pl_module, self._run, self._run.stage)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store a row for each example of the batch."""
        if self._checkpoint is not None:
            ids = self._example_ids(batch, dataloader_idx)
            own = self._own_columns(batch, len(ids))
            self._checkpoint.write(trainer, batch, ids, dataloader_idx, own)

    on_test_end = on_predict_end = on_validation_end
    on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def _is_recorded(self, trainer: Trainer) -> bool:
        """Return whether the step under way gets a row."""
        return (trainer.global_step + 1) % self.every_n_train_steps == 0

    def _begin_examples(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> TrainingExamples:
        """Find on the first batch which parameters hooks support, and open the store for those."""
        layout = Layout.of(pl_module, self.parameters)
        weighings = Weighings(pl_module, self.weight_fn, self.reduction, self._structure())
        unsupported = unsupported_by_hooks(trainer, pl_module, layout, batch, weighings, self.fallback)
        left_out = unsupported if self.fallback is None else {}
        layout = layout.without(left_out)
        self._run = self._session.open_fit(
            trainer,
            layout,
            self.every_n_train_steps,
            rows_per_step=weighings.structure.count(batch) * trainer.accumulate_grad_batches * trainer.world_size,
            left_out=left_out,
            contribution=bool(couples(pl_module)),
        )
        sketch = self._run.spec.operator
        own = self.preconditioner == "optimizer"
        return TrainingExamples(trainer, pl_module, layout, sketch, weighings, self.fallback, unsupported, own)

    def _checkpoint_rows(
        self, trainer: Trainer, pl_module: LightningModule, run: StoreRun, stage: Stage
    ) -> CheckpointRows:
        """Return the writer of rows of examples at the module's present weights; all ranks call it."""
        layout, sketch, loss_fn = run.spec.parameters, run.spec.operator, self.loss_fn or training_step_loss
        found = None if stage == "queries" else self._preconditioner(trainer, pl_module, run)
        sketches = ExampleSketches(
            pl_module,
            layout,
            sketch=sketch,
            loss_fn=loss_fn,
            engine=self.engine,
            weight_fn=self.weight_fn,
            reduction=self.reduction,
            structure=self._structure(),
            gradient_map=None if found is None else found.of(layout, module_fingerprint(pl_module)),
        )
        rows = ExampleRows(sketches, self.row_fn, preconditioner=NONE if found is None else found.id)
        first = trainer.strategy.broadcast(rows.fingerprint)
        if rows.fingerprint != first:
            warnings.warn(
                f"rank {trainer.global_rank} has other buffers than rank 0, such as statistics of batch norm, so that "
                "its rows are of a slightly different model; use sync_batchnorm=True, or load a checkpoint.",
                stacklevel=2,
            )
            rows.fingerprint = first  # that of the checkpoint, with which queries are made
        if trainer.is_global_zero and stage != "queries":
            run.say_replaced(self.name, rows.fingerprint, trainer)
        now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "lr": self._lr}
        return CheckpointRows(rows, run, stage, self._position or now, self._example_ids.hashed)

    def _preconditioner(self, trainer: Trainer, pl_module: LightningModule, run: StoreRun) -> Preconditioner | None:
        """Return the preconditioner of rows at the module's present weights; all ranks call it."""
        if self.preconditioner is None:
            return None
        fit_options = {name: value for name, value in self._arguments.items() if name != "row_fn"}
        with muted_loggers(trainer):
            return of_checkpoint(self.preconditioner, trainer, pl_module, run, self._optimizer_states, **fit_options)

    def _close(self) -> None:
        """Remove all hooks, and commit the rows."""
        self._example_ids.detach()
        if self._training is not None:
            self._training.stop()
        try:
            self._put_arrived(wait=True)
        finally:
            self._arriving.clear()
            run, self._run, self._steps, self._training, self._checkpoint = self._run, None, None, None, None
            if run is not None:
                run.close()

    def _put_arrived(self, wait: bool = False) -> None:
        """Store the rows that have arrived from the device, in their order; if `wait`, all of them."""
        while self._run is not None and self._arriving:
            if not (wait or self._arriving[0].are_here or len(self._arriving) > _MOST_ARRIVING):
                return
            self._run.put(self._arriving.popleft().get())


def _check_alone(trainer: Trainer, writer: GradientSketchWriter) -> None:
    """Refuse two writers of one folder, whose fits would replace each other there.

    Raises:
        MisconfigurationException: If there are two.
    """
    writers = [other for other in callbacks_of(trainer) if isinstance(other, GradientSketchWriter)]
    if writer.dirpath is not None and sum(other.dirpath == writer.dirpath for other in writers) > 1:
        raise MisconfigurationException(
            f"two GradientSketchWriters write to {writer.dirpath}, where only the rows of one would be found; pass "
            "each its own dirpath."
        )


def _check(trainer: Trainer, pl_module: LightningModule, stage: str, per: Granularity, has_loss_fn: bool) -> None:
    """Check before training that sketched gradients can be written.

    Args:
        trainer: The Trainer that runs the stage.
        pl_module: The module whose gradients are written.
        stage: "fit", "validate", "test" or "predict".
        per: Whether a row of a fit is of a step or of an example.
        has_loss_fn: Whether the user passes a loss instead of `training_step`.

    Raises:
        MisconfigurationException: If the strategy shards the parameters that a row needs whole, or the loss of an
            example is unknown.
    """
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    needs_whole = stage != "fit" or per == "example"
    if "DeepSpeedStrategy" in kinds or "FSDPStrategy" in kinds or ("ModelParallelStrategy" in kinds and needs_whole):
        raise MisconfigurationException(
            f"GradientSketchWriter cannot write rows of {stage} under {type(trainer.strategy).__name__}: an example's "
            "gradient needs whole parameters. Of sharded ones only the gradients of steps under ModelParallelStrategy "
            "are sketched. Use strategy='ddp', or one device."
        )
    if per == "example" and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} uses manual optimization, so it is unknown which backward pass is of "
            "the examples' losses. Use GradientSketchWriter(per='step')."
        )
    if stage != "fit" and not has_loss_fn and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} uses manual optimization, so its training_step need not return the loss; pass "
            "GradientSketchWriter(loss_fn=lambda module, batch: ...)."
        )
