"""The callback that logs the spectrum of the loss's curvature during training."""

import math
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_sketch._lightning import (
    BarText,
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    log_scalars,
    muted_loggers,
    print_on_rank_zero,
    state_key,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import OutputLossName
from lightning_sketch.callbacks._optimizers import UNKNOWN, Stability, stability
from lightning_sketch.callbacks.spectrum_monitor._estimator import Curvature, InitialWeights, SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._logging import (
    by_layer,
    log_figures,
    log_table,
    over_time,
)
from lightning_sketch.callbacks.spectrum_monitor._measurement import Keys, Measurement
from lightning_sketch.callbacks.spectrum_monitor._probe_batches import ProbeBatches
from lightning_sketch.callbacks.spectrum_monitor._validate import check_trainer
from lightning_sketch.curvature.hessian import HVP
from lightning_sketch.curvature.result import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SpectrumMonitor(CallbackBase):
    """Log the eigenvalues of the loss's curvature, every epoch or every given number of steps.

    The matrix is the Hessian of the mean training loss over a few fixed batches, in evaluation mode and float32, with
    respect to the parameters that are trainable at the time. Eigenvalues are in units of loss per squared parameter.
    `trainer.validate(model, dataloader)` measures a checkpoint on the first batches of that loader.

    It logs to every logger of the Trainer, and to `trainer.callback_metrics`, under `hessian/`: `lambda_max`,
    `lambda_min`, `rneg` (|most negative| / largest), `rneg_error`, `num_outliers` (eigenvalues above 20 % of the
    largest), `trace`, `trace_sem` (its standard error), `gradient_in_top_k` and `gradient_in_outliers` (shares of the
    gradient in these eigenvectors; `gradient_chance` is that of a random direction), `overlap` (of the top
    eigenvectors with those of the last measurement), `sharpness_lr` (lambda_max times the learning rate), `loss`,
    `seconds`; and the single eigenvalues, `hessian_eigenvalues/top_01` ..., `hessian_eigenvalues/bottom_01` .... With
    `density_probes` also `negative_mass`, `effective_rank`, and the density as a histogram in W&B and TensorBoard. W&B
    also gets a figure per measurement and a table at the end; beside the file of a CSVLogger each measurement is saved
    in safetensors. An eigenvalue that has not converged is logged as NaN. `monitor.history` contains all measurements,
    with residuals; `monitor.plot()` draws them.

    Training is unaffected: the final weights are the same, bit for bit, with and without the monitor.
    A measurement costs at most 1.25 `num_matvecs` + 32 `density_probes` + 6 products over `num_batches` batches, each
    about three gradients, and memory for about six vectors of the parameters' size. Its actual cost is printed.

    Under DDP each rank has its own batches, and products are averaged over the ranks.

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
        name: The prefix of the log keys and a part of the checkpoint key; the curvature if None.
        on_error: What to do if a measurement fails after the sanity check on the first batch: "warn" logs NaN and
            continues training, "raise" stops it.
        seed: The seed of the start vectors and the sketches.
        per_layer: Whether to log the top eigenvalue and the trace of each layer's own block too, under
            `hessian_layers/`: True for every module with parameters of its own, or a list of patterns. Costs up to 46
            products per layer.
        model_fn: (module, batch) -> output, for "ggn"; see `GGN` for its default.
        output_loss_fn: (output, batch) -> mean loss, for "ggn"; or "cross_entropy", "binary_cross_entropy" or
            "squared_error". See `GGN` for its default.
        weight_fn: batch -> its weight in the mean; its number of examples if None. For a mean over tokens `num_labels`.
        micro_batch_size: The maximal number of examples to differentiate at once; halved when memory runs out.
        hvp: How Hessian products are computed, see `Hessian`.
        num_examples: The number of examples in a batch, or batch -> this number, if its tensors have different lengths.
        batch_dim: The axis of the examples, 1 for (time, batch, ...).

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before training, if the Trainer or the module is not supported.

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
        seed: int = 0,
        per_layer: bool | list[str] = False,
        model_fn: Callable[[Any, Any], Any] | None = None,
        output_loss_fn: OutputLossName | Callable[[Tensor, Any], Tensor] | None = None,
        weight_fn: Callable[[Any], float] | None = None,
        micro_batch_size: int | None = None,
        hvp: HVP = "auto",
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
    ):
        super().__init__()
        if on_error not in ("warn", "raise"):
            raise ValueError(f"SpectrumMonitor(on_error={on_error!r}) is not known; use 'warn' or 'raise'.")
        if data != "train":
            raise ValueError(
                f"SpectrumMonitor(data={data!r}) is not known; use 'train', or trainer.validate(model, dataloader) for "
                "other data."
            )
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ValueError(
                f"set every_n_epochs or every_n_train_steps, got both ({every_n_epochs} and {every_n_train_steps}); "
                "use two monitors with two names to have both."
            )
        for argument, value in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
            ("num_batches", num_batches),
        ):
            if value is not None and value < 1:
                raise ValueError(f"need {argument} >= 1, got {value}.")
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
        )
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs or (None if every_n_train_steps else 1)
        self.name = name or (curvature if method == "lanczos" else f"{curvature}_{method}")
        self.at_start, self.on_error = at_start, on_error

        self.history: list[Measurement] = []
        self._probes = ProbeBatches(num_batches)  # replaced at each fit
        self._last_step = -1
        self._initial: tuple[InitialWeights, Stability] | None = None
        self._stability = UNKNOWN
        self._resumed_from: str | None = None
        self._clock = 0.0

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; monitors with different names have different keys."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the history and a fingerprint of the probe batches; nothing of the parameters' size."""
        batches = self._probes.fingerprint if self._probes.complete else self._resumed_from
        return {"history": [m.state() for m in self.history], "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history from a checkpoint."""
        self.history = [Measurement.of_state(m) for m in state["history"]]
        self._resumed_from = state["batches"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the Trainer and the module, and discard the state of an earlier fit."""
        if stage not in ("fit", "validate"):
            return
        resumes = stage == "fit" and trainer.global_step > 0  # the checkpoint is loaded after this hook
        self._resumed_from = self._probes.fingerprint if resumes and self._probes.complete else None
        self._probes, self._initial = ProbeBatches(self._probes.num_batches), None
        if not resumes:
            self.history = []
        check_trainer(trainer, pl_module, self.name, self.estimator.loss_fn is not None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the pattern matches trainable parameters."""
        Layout.of(pl_module, self.estimator.parameters)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count steps and time."""
        self._last_step = trainer.global_step
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the first batches; on the very first, take three products as a sanity check."""
        self._stability = stability(trainer)  # schedulers change the rate before the epoch ends
        if self._probes.complete:
            return
        self._probes.offer(batch)
        if len(self._probes.batches) == 1:
            self._sanity_check(trainer, pl_module)
            if self.at_start and trainer.global_step == 0:
                self._initial = InitialWeights(pl_module), stability(trainer)
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
            self._measure_and_log(trainer, pl_module, batches_done(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if it is due."""
        if not self._probes.complete:
            self._probes.close()
            self._on_probes_complete(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            # one less, as where Lightning logs the means of the epoch
            self._measure_and_log(trainer, pl_module, batches_done(trainer) - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log all measurements as one table, to loggers that have tables."""
        if trainer.is_global_zero:
            log_table(trainer.loggers, self.name, self.history)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the first batches under `trainer.validate`."""
        if self._validates(trainer) and dataloader_idx == 0 and not self._probes.complete:
            self._probes.offer(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the module under `trainer.validate`."""
        if self._validates(trainer):
            self._probes.close()
            self._stability = UNKNOWN
            self._measure_and_log(trainer, pl_module, trainer.global_step, validating=True)

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

        Args:
            pl_module: The module to measure.
            epoch: The epoch that is recorded.
            step: The optimizer step that is recorded.
            distributed: Whether to average products over ranks, which must all call this.
            on_product: Called with the number of products done and their maximum, after each product.

        Raises:
            ValueError: If there are no probe batches, or the matrix cannot be multiplied.
        """
        batches = self._probes.on_device(pl_module.device)
        return self.estimator.measure(pl_module, batches, epoch, step, distributed, on_product)

    def plot(self) -> "Figure":
        """Draw the eigenvalues over all measurements, as a matplotlib figure.

        Raises:
            ValueError: If there is no measurement yet.
            ImportError: If matplotlib is missing.
        """
        if not self.history:
            raise ValueError("nothing to plot: there is no measurement yet; run trainer.fit first.")
        return over_time(self.history, self.estimator, self.name)

    def plot_layers(self) -> "Figure":
        """Draw the top eigenvalue and the trace of each layer at the last measurement, as a matplotlib figure.

        Raises:
            ValueError: If no layers were measured.
            ImportError: If matplotlib is missing.
        """
        if not self.history or not self.history[-1].layers:
            raise ValueError("no layers to plot; use SpectrumMonitor(per_layer=True), then trainer.fit.")
        return by_layer(self.history[-1], self.name)

    def _sanity_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take three products on the batches that are there, and let their errors pass."""
        with muted_loggers(trainer):
            self.estimator.check(pl_module, self._probes.on_device(pl_module.device), trainer.world_size > 1)

    def _on_probes_complete(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check all probe batches, and measure the initial weights if that was asked for."""
        batches = self._probes.on_device(pl_module.device)
        self.estimator.check_weights(pl_module, batches, trainer.world_size > 1)
        # under DDP a checkpoint contains the state of rank zero only
        if trainer.is_global_zero and self._resumed_from not in (None, self._probes.fingerprint):
            warnings.warn(
                f"{self.name}: the first batches differ from those before the checkpoint, so the curve changes its "
                "data here; use the same order of examples in every run (seed_everything, or no shuffling).",
                stacklevel=2,
            )
        if self._initial is not None:
            (initial, stability_then), self._initial = self._initial, None
            now, self._stability = self._stability, stability_then
            with initial.loaded_into(pl_module):
                self._measure_and_log(trainer, pl_module, 0, step=0)
            self._stability = now

    def _measure_and_log(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        log_step: int,
        step: int | None = None,
        validating: bool = False,
    ) -> None:
        """Measure, and log the result under `log_step`, or NaN where it fails.

        `step` is the optimizer step that is recorded, by default the Trainer's. `validating` means `trainer.validate`:
        errors are raised and no file is replaced.
        """
        step = trainer.global_step if step is None else step
        since = time.perf_counter() - self._clock
        scalars, measured = self._keys.all_nan(), None
        scalars |= {key: math.nan for key in trainer.callback_metrics if key.startswith(f"{self.name}_layers/")}
        try:
            if validating:
                self._sanity_check(trainer, pl_module)
            with muted_loggers(trainer), BarText(trainer) as bar:
                measured = self.measure(
                    pl_module,
                    epoch=trainer.current_epoch,
                    step=step,
                    distributed=trainer.world_size > 1,
                    on_product=lambda done, total: bar.show(f"{self.name} {done}/{total}: "),
                )
        except Exception as error:
            if self.on_error == "raise" or validating:
                raise
            warnings.warn(f"{self.name}: no measurement at step {step}: {error}", stacklevel=2)
        else:
            earlier = [m for m in self.history if m.step < step]
            measured = measured.after(earlier, self._stability, self.estimator.top_k)
            self.history = [m.for_history(0) for m in earlier] + [measured.for_history(self.estimator.top_k)]
            scalars = measured.scalars(self._keys)
            cadence = "every_n_train_steps" if self.every_n_train_steps else "every_n_epochs"
            print_on_rank_zero(
                trainer, measured.cost(self.name, math.inf if validating else since, cadence, getattr(self, cadence))
            )
        log_scalars(trainer, scalars, log_step)
        if measured is not None and trainer.is_global_zero:
            self._log_figures(trainer, measured, log_step, unique=validating)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})
        self._clock = time.perf_counter()

    def _log_figures(self, trainer: Trainer, measured: Measurement, log_step: int, unique: bool) -> None:
        """Log figures, histograms and files; a failure is a warning unless `on_error` is "raise"."""
        try:
            log_figures(trainer.loggers, self.name, measured, log_step, self._keys.density, unique)
        except Exception as error:  # a full disk, or a logger of another version
            if self.on_error == "raise":
                raise
            warnings.warn(f"{self.name}: no pictures or files at step {measured.step}: {error}", stacklevel=2)

    @property
    def _keys(self) -> Keys:
        """The log keys."""
        return Keys(self.name, self.estimator.top_k, self.estimator.bottom_k, self.estimator.density_probes > 0)

    def _validates(self, trainer: Trainer) -> bool:
        """Return whether this is `trainer.validate`, not the validation of a fit."""
        return trainer.state.fn == "validate"
