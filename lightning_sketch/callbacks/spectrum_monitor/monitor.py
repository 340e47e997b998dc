"""The callback that logs the spectrum of the loss's curvature during training."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_sketch._lightning import (
    BarText,
    CallbackBase,
    LightningModule,
    Trainer,
    log_scalars,
    muted_loggers,
    print_on_rank_zero,
    state_key,
    steps_done,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import OutputLossName
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.callbacks._optimizers import UNKNOWN, LastStep, check_preconditioner, preconditioned, stability
from lightning_sketch.callbacks.spectrum_monitor import _logging as logging
from lightning_sketch.callbacks.spectrum_monitor._console import Console
from lightning_sketch.callbacks.spectrum_monitor._estimator import Curvature, InitialWeights, SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement, Stage, appended, of_training
from lightning_sketch.callbacks.spectrum_monitor._probe_batches import ProbeBatches
from lightning_sketch.callbacks.spectrum_monitor._scalars import Keys
from lightning_sketch.callbacks.spectrum_monitor._validate import check_arguments, check_preconditioned, check_trainer
from lightning_sketch.curvature import Stability
from lightning_sketch.curvature.hessian import HVP
from lightning_sketch.curvature.result import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EVALUATIONS = ("validate", "test")


class SpectrumMonitor(CallbackBase):
    """Log the eigenvalues of the loss's curvature, every epoch or every given number of steps.

    The matrix is the Hessian of the mean training loss over a few fixed batches, in evaluation mode and float32, with
    respect to the parameters that are trainable at the time. A loss that draws random numbers (a variational
    autoencoder, diffusion, augmentation, masking) is that of fixed draws, the same in all measurements. Eigenvalues are
    in units of loss per squared parameter.

    It logs to every logger of the Trainer, and to `trainer.callback_metrics`, under `hessian/`: `lambda_max`,
    `lambda_min`, `rneg` (|most negative| / largest), `num_outliers` (eigenvalues above 20 % of the largest),
    `stability_ratio` (lambda_max over the optimizer's edge of stability: above 1 its steps diverge along that
    eigenvector), `critical_learning_rate` (at which the last step would have raised the loss; NaN where it was not
    downhill; a lower bound where `critical_exact` is 0) and `critical_sharpness` (2 over it), `sharpness_lr`
    (lambda_max times the learning rate, for SGD), `trace`; `rneg_error`, `trace_sem` (the standard error),
    `frobenius_norm`, `num_outliers_exact` (0 if there may be more outliers), `gradient_in_top_k` and
    `gradient_in_outliers` (shares of the gradient in these eigenvectors), `overlap` (of the top eigenvectors with those
    of the last measurement), `loss`, `seconds`; and the single eigenvalues, `hessian_eigenvalues/top_01` ...,
    `hessian_eigenvalues/bottom_01` .... With `over_batches` also `data_error`, the standard error of lambda_max that is
    due to the choice of batches; with `density_probes` also `negative_mass`, `effective_rank`, and the density as a
    histogram in W&B and TensorBoard. W&B also gets a figure per measurement and a table at the end; beside the file of
    a CSVLogger each measurement is saved in safetensors. `monitor.history` contains all measurements, with residuals;
    `monitor.plot()` draws them. The step of all of these is the number of optimizer steps done.

    One sentence says what that means for the learning rate, in the console, in W&B's summary and as `verdict` of a
    measurement. Adam and its like have an edge only with `preconditioner="optimizer"`. The critical learning rate is
    that of the weights before the last step, which are copied if the number of batches of an epoch is known.

    An eigenvalue that has not converged is logged as NaN. In `trainer.callback_metrics` every key exists from the start
    of training, NaN until the first measurement, and keeps the last value between measurements, so that other callbacks
    can monitor it. To these an epoch without a measurement is one without an improvement: the patience of EarlyStopping
    and ReduceLROnPlateau must be longer. In a file name of ModelCheckpoint write "lambda_max={hessian/lambda_max:.3f}"
    with `auto_insert_metric_name=False`, or the slash in the inserted name makes a folder.

    Training is unaffected: the final weights are the same, bit for bit, with and without the monitor.
    A measurement costs at most `num_matvecs` products over `num_batches` batches, a quarter as many (at least 8) to
    search for copies of eigenvalues, 3 as a check, and 32 for each of `density_probes`, each about three gradients; and
    memory for about six vectors of the parameters' size. Its actual cost is printed.

    Under DDP each rank has its own batches, and products are averaged over the ranks. Under ModelParallelStrategy
    (FSDP2, tensor parallel) vectors stay sharded as the parameters are, and products are differences of gradients in
    the precision of the training, whose error `residuals` include: four gradients each, some thirty more to choose
    their step, and memory for eight vectors of a rank's shards. In evaluation mode Hugging Face models do not
    checkpoint activations; `mode="train"` does.

    Args:
        curvature: "hessian"; "ggn", the Gauss-Newton matrix, which is never negative; or "fisher", the empirical
            Fisher matrix, which is slow unless `loss_fn` returns one loss per example.
        method: "lanczos" for the full matrix, with sketched Krylov vectors; or "projected", the paper's own, for its
            sketch: off by 8 to 18 % at dim 512, by 4 to 7 % at 2048, and logged under `hessian_projected/`.
        top_k: The number of largest eigenvalues to compute.
        bottom_k: The number of smallest eigenvalues to compute; 0 for "ggn" and "fisher", whose smallest are zeros.
        num_matvecs: The maximal number of products of one measurement; it stops early when the eigenvalues converge.
        dim: The size of the sketches, at least 2 (`num_matvecs` + 32 `density_probes`).
        tol: The largest relative residual of an eigenvalue that counts as converged.
        density_probes: The number of further random starts, for the density of all eigenvalues; 3 is usual.
        data: "train" measures on the first batches of the first epoch, of which copies are made.
        num_batches: The number of these batches; the first measurement waits until all have been seen.
        parameters: Which parameters to include, as a shell pattern on their names, e.g. "blocks.*.attn.*".
        every_n_epochs: The number of epochs between measurements; 1 if neither interval is set.
        every_n_train_steps: The number of optimizer steps between measurements, instead of epochs.
        at_start: Whether to measure the initial weights too, logged at step 0; a copy of them is stored until all
            `num_batches` batches have been seen.
        loss_fn: (module, batch) -> mean loss; the module's own `training_step` if None, without its logging.
        stages: When to measure: "fit" while training; "validate" and "test" at the end of `trainer.validate` and
            `trainer.test`, the training loss on the first batches of their data loader, e.g. the spectrum of a
            checkpoint. These measurements are appended to the history too, with their `stage`; `plot()` leaves them out
            if there are any of training.
        name: The prefix of the log keys and a part of the checkpoint key; the curvature if None. Two monitors of the
            same curvature in one Trainer need two names.
        on_error: What to do if a measurement fails after the sanity check on the first batch: "warn" logs NaN and
            continues training, "raise" stops it.
        seed: The seed of the start vectors and the sketches.
        per_layer: Whether to log the top eigenvalue and the trace of each layer's own block too, under
            `hessian_layers/`: True for every module with parameters of its own, or a list of patterns; with
            `density_probes` the negative mass and the density too. Costs up to 42 products per layer, and 16 more for
            each probe after the first.
        model_fn: (module, batch) -> output, for "ggn"; see `GGN` for its default.
        output_loss_fn: (output, batch) -> mean loss, for "ggn"; or "cross_entropy", "binary_cross_entropy" or
            "squared_error". See `GGN` for its default.
        weight_fn: batch -> its weight in the mean; its number of examples if None. For a mean over tokens `num_labels`.
        micro_batch_size: The maximal number of examples to differentiate at once; halved when memory runs out.
        hvp: How Hessian products are computed, see `Hessian`.
        num_examples: The number of examples in a batch, or batch -> this number, if its tensors have different lengths.
        batch_dim: The axis of the examples, 1 for (time, batch, ...).
        preconditioner: "optimizer" for P^-1/2 H P^-1/2, with the diagonal P by which Adam, AdamW, NAdam, Adamax,
            RMSprop or Adagrad divides its steps, logged under `hessian_preconditioned/`: the matrix whose largest
            eigenvalue these optimizers' edge of stability is one of. Costs one more vector.
        mode: "eval", or "train" for modules that return a loss only in training mode, or for the curvature with live
            dropout and the batch's own statistics; running statistics are restored.
        noise_samples: The number of draws of random numbers that a loss is averaged over, if it draws any.
        over_batches: Whether to measure how far lambda_max depends on the choice of batches, as `spectrum` does, and
            that of each batch alone, a histogram in W&B. Needs two batches; nearly doubles the cost.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before training, if the Trainer or the module is not supported; FSDP1 and DeepSpeed
            are not.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[SpectrumMonitor()])
        trainer.fit(model, datamodule=data)
    """

    def __init__(
        self,
        curvature: Curvature = "hessian",
        *,
        method: Method = "lanczos",
        top_k: int = 10,
        bottom_k: int = 3,
        num_matvecs: int = 96,
        dim: int = 1024,
        tol: float = 1e-2,
        density_probes: int = 0,
        data: Literal["train"] = "train",
        num_batches: int = 4,
        parameters: str = "*",
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        name: str | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        stages: Sequence[Stage] = ("fit",),
        seed: int = 0,
        per_layer: bool | list[str] = False,
        model_fn: Callable[[Any, Any], Any] | None = None,
        output_loss_fn: OutputLossName | Callable[[Tensor, Any], Tensor] | None = None,
        weight_fn: Callable[[Any], float] | None = None,
        micro_batch_size: int | None = None,
        hvp: HVP = "auto",
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
        preconditioner: Literal["optimizer"] | None = None,
        mode: Mode = "eval",
        noise_samples: int = 1,
        over_batches: bool = False,
    ):
        super().__init__()
        check_arguments(on_error, data, stages, every_n_epochs, every_n_train_steps, num_batches, over_batches)
        check_preconditioned(preconditioner, stages, at_start)
        self.estimator = SpectrumEstimator(
            curvature=curvature,
            method=method,
            top_k=top_k,
            bottom_k=bottom_k,
            num_matvecs=num_matvecs,
            dim=dim,
            tol=tol,
            density_probes=density_probes,
            parameters=parameters,
            loss_fn=loss_fn,
            seed=seed,
            per_layer=per_layer,
            model_fn=model_fn,
            output_loss_fn=output_loss_fn,
            weight_fn=weight_fn,
            num_examples=num_examples,
            batch_dim=batch_dim,
            micro_batch_size=micro_batch_size,
            hvp=hvp,
            mode=mode,
            noise_samples=noise_samples,
            over_batches=over_batches,
        )
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs or (None if every_n_train_steps else 1)
        kinds = [curvature, *([] if method == "lanczos" else [method]), *(["preconditioned"] if preconditioner else [])]
        self.name, self.preconditioner = name or "_".join(kinds), preconditioner
        self.at_start, self.on_error, self.stages = at_start, on_error, tuple(stages)

        self.history: list[Measurement] = []
        self._probes = ProbeBatches(num_batches)  # of training; replaced at each fit
        self._evaluated = ProbeBatches(num_batches)  # of trainer.validate or trainer.test; replaced at each
        self._keys = Keys.of(self.name, self.estimator)
        self._stage: Stage | None = None  # what runs now, if it is measured
        self._continues = False  # whether the history goes on
        self._before: tuple[str, str] | None = None  # which earlier batches, and their fingerprint
        self._last_step = -1
        self._missed = False  # whether a measurement was due before all batches had been seen
        self._resumed_inside = False  # whether the batches of this epoch began in its middle
        self._initial: tuple[InitialWeights, Stability] | None = None
        self._stability = UNKNOWN
        self._last = LastStep(self.every_n_train_steps, self.every_n_epochs)
        cadence = "every_n_train_steps" if self.every_n_train_steps else "every_n_epochs"
        self._console = Console(self.name, cadence, getattr(self, cadence), top_k)

    def __repr__(self) -> str:
        kind = f"{self.name!r}, {self._console.cadence}={self._console.every}, num_batches={self._probes.num_batches}"
        return f"{type(self).__name__}({kind}): {len(self.history)} measurements"

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; monitors with different names have different keys."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the history and a fingerprint of the probe batches; nothing of the parameters' size."""
        batches = self._probes.fingerprint if self._probes.complete else (self._before or (None, None))[1]
        return {"history": [m.state() for m in self.history], "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history from a checkpoint; one that is evaluated replaces no history that is there."""
        if self.history and self._stage != "fit":
            return
        self.history = [Measurement.of_state(m) for m in state["history"]]
        self._continues = True
        self._before = ("before the checkpoint", state["batches"]) if state["batches"] else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the Trainer and the module, and discard the probe batches of an earlier run."""
        self._stage = next((known for known in self.stages if known == stage), None)
        if self._stage is None:
            self._console.unasked(partial(print_on_rank_zero, trainer), stage)
            return
        if self._stage == "fit":
            self._continues = trainer.global_step > 0  # a second fit; a checkpoint is loaded after this hook
            again = self._continues and self._probes.complete
            self._before = ("of the last fit", self._probes.fingerprint) if again else None
            self._probes, self._initial = ProbeBatches(self._probes.num_batches), None
        self._evaluated = ProbeBatches(self._probes.num_batches)
        check_trainer(trainer, pl_module, self.name, self.estimator, self.every_n_epochs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the pattern matches trainable parameters, and begin a new history unless a fit is continued."""
        if self._stage != "fit":
            return
        if self.preconditioner:
            check_preconditioner(trainer)
        self._last = LastStep(self.every_n_train_steps, self.every_n_epochs)
        self._keys = Keys.of(self.name, self.estimator, Layout.of(pl_module, self.estimator.parameters))
        earlier = [] if self._continues else of_training(self.history)
        if earlier and trainer.is_global_zero:
            self._console.discarded(len(earlier))
        self.history = [m for m in self.history if m not in earlier]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count steps and time, and give other callbacks the keys with the values of the last measurement."""
        if self._stage != "fit":
            return
        self._last_step = trainer.global_step
        self._console.start()
        if self.estimator.mode == "eval":
            self._console.batch_norm(partial(print_on_rank_zero, trainer), pl_module)
        last = of_training(self.history)[-1:]
        logging.tell_callbacks(trainer, self._keys.values(*last) if last else self._keys.all_nan())
        logging.declare(trainer, self._keys, self.estimator)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the first batches; on the very first, take three products as a sanity check."""
        if self._stage != "fit":
            return
        # schedulers change the rate before the epoch ends
        self._stability = stability(trainer, preconditioned=self.preconditioner is not None)
        self._last.batch_starts(trainer, pl_module, batch_idx, self._stability.lr)
        if self._probes.complete:
            return
        self._probes.offer(batch)
        if len(self._probes.batches) == 1:
            self._resumed_inside = batch_idx > 0
            self._sanity_check(trainer, pl_module, self._probes)
            if self.at_start and trainer.global_step == 0:
                self._initial = InitialWeights(pl_module), self._stability
        if self._probes.complete:
            self._on_probes_complete(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is due, unless some of the probe batches are still missing."""
        step = trainer.global_step
        if not self.every_n_train_steps or step % self.every_n_train_steps or step == self._last_step:
            return
        self._last_step = step  # under gradient accumulation a step has several batches
        if self._probes.complete:
            self._measure_and_log(trainer, pl_module, steps_done(trainer, in_batch=True))
        else:
            self._missed = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if it is due."""
        if self._stage != "fit":
            return
        if not self._probes.complete:
            if self._resumed_inside:  # the rest of an epoch is not its first batches
                self._probes, self._resumed_inside = ProbeBatches(self._probes.num_batches), False
                return
            self._probes.close()
            self._on_probes_complete(trainer, pl_module)
            if self._missed:
                self._measure_and_log(trainer, pl_module, steps_done(trainer))
        self._missed = False
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure_and_log(trainer, pl_module, steps_done(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log all measurements as one table, to loggers that have tables."""
        if trainer.is_global_zero and self._stage == "fit":
            logging.log_table(trainer.loggers, self.name, self.history)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the first batches under `trainer.validate` or `trainer.test`, if that is to be measured."""
        if self._stage in _EVALUATIONS and dataloader_idx == 0:
            self._evaluated.offer(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the module under `trainer.validate` or `trainer.test`, if that was asked for."""
        if self._stage in _EVALUATIONS:
            self._evaluated.close()
            self._keys = Keys.of(self.name, self.estimator, Layout.of(pl_module, self.estimator.parameters))
            logging.declare(trainer, self._keys, self.estimator)
            self._measure_and_log(trainer, pl_module, steps_done(trainer))

    on_test_batch_start, on_test_end = on_validation_batch_start, on_validation_end

    def measure(
        self,
        pl_module: LightningModule,
        *,
        epoch: int = 0,
        step: int = 0,
        distributed: bool = False,
        on_product: Callable[[int, int], None] | None = None,
    ) -> Measurement:
        """Measure the spectrum of a module with its present weights, on the probe batches of the last fit.

        Without a fit, on those of the last `trainer.validate` or `trainer.test` that was measured.

        Args:
            pl_module: The module to measure.
            epoch: The epoch that is recorded.
            step: The optimizer step that is recorded.
            distributed: Whether to average products over ranks, which must all call this.
            on_product: Called with the number of products done and their maximum, after each product.

        Raises:
            ValueError: If there are no probe batches, or the matrix cannot be multiplied.
        """
        probes = (self._probes if self._probes.batches else self._evaluated).on_device(pl_module.device)
        precondition = partial(preconditioned, pl_module.trainer) if self.preconditioner else None
        return self.estimator.measure(pl_module, probes, epoch, step, distributed, on_product, precondition)

    def plot(self) -> "Figure":
        """Draw the eigenvalues over all measurements, as a matplotlib figure.

        Raises:
            ValueError: If there is no measurement yet.
            ImportError: If matplotlib is missing.
        """
        if not self.history:
            raise ValueError("nothing to plot: there is no measurement yet; run trainer.fit first.")
        return logging.over_time(of_training(self.history) or self.history, self.estimator, self.name)

    def plot_layers(self) -> "Figure":
        """Draw the top eigenvalue and the trace of each layer at the last measurement, as a matplotlib figure.

        Raises:
            ValueError: If no layers were measured.
            ImportError: If matplotlib is missing.
        """
        if not self.history or not self.history[-1].layers:
            raise ValueError("no layers to plot; use SpectrumMonitor(per_layer=True), then trainer.fit.")
        return logging.by_layer(self.history[-1], self.name)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note by how much the gradient of the step will be clipped, if a measurement comes right after it."""
        if self._last.weights:
            self._last.before_optimizer_step(trainer, optimizer)

    def _sanity_check(self, trainer: Trainer, pl_module: LightningModule, probes: ProbeBatches) -> None:
        """Take three products on the batches that are there, and let their errors pass."""
        with muted_loggers(trainer):
            self.estimator.check(pl_module, probes.on_device(pl_module.device), trainer.world_size > 1)

    def _on_probes_complete(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check all probe batches, and measure the initial weights if that was asked for."""
        batches = self._probes.on_device(pl_module.device)
        self.estimator.check_weights(pl_module, batches, trainer.world_size > 1)
        # under DDP a checkpoint contains the state of rank zero only
        if trainer.is_global_zero and self._before is not None and self._before[1] != self._probes.fingerprint:
            self._console.other_batches(self._before[0])
        if self._initial is not None:
            (initial, stability_then), self._initial = self._initial, None
            now, self._stability = self._stability, stability_then
            with initial.loaded_into(pl_module):
                self._measure_and_log(trainer, pl_module, 0)
            self._stability = now

    def _measure_and_log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure, and log the result under `step`, or NaN where it fails; but in evaluations errors are raised."""
        evaluates = self._stage in _EVALUATIONS
        probes = self._evaluated if evaluates else self._probes
        scalars, measured = self._keys.all_nan(), None
        try:
            if evaluates:
                self._sanity_check(trainer, pl_module, probes)
            with muted_loggers(trainer), BarText(trainer) as bar:
                measured = self.estimator.measure(
                    pl_module,
                    probes.on_device(pl_module.device),
                    trainer.current_epoch,
                    step,
                    trainer.world_size > 1,
                    lambda done, total: bar.show(f"{self.name} {done}/{total}: "),
                    partial(preconditioned, trainer, groups=self._last.groups) if self.preconditioner else None,
                    (lambda matrix: self._last.critical(matrix, trainer.global_step))
                    if step and not evaluates
                    else None,
                )
        except Exception as error:
            if self.on_error == "raise" or evaluates:
                raise
            warnings.warn(f"{self.name}: no measurement at step {step}: {error}", stacklevel=2)
        else:
            measured = replace(measured, stage=self._stage or "fit")
            now = self.estimator.compared(self._last.of_clipped(self._stability))
            self.history, measured = appended(self.history, measured, now, self.estimator.top_k)
            scalars = self._keys.values(measured)
            self._console.measured(partial(print_on_rank_zero, trainer), measured)
        log_scalars(trainer, scalars | {"epoch": trainer.current_epoch}, step)
        if measured is not None and trainer.is_global_zero:
            logging.log_figures(trainer.loggers, self.name, measured, self._keys.density, self.on_error)
        logging.tell_callbacks(trainer, scalars)
        self._console.resume()
