"""Log the spectrum of a loss's curvature while training."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch._lightning import (
    BarText,
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    muted_loggers,
    say,
    state_key,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.callbacks._optimizers import UNKNOWN, Stability, stability
from lightning_sketch.callbacks._validate import check_trainer
from lightning_sketch.callbacks.spectrum_monitor._estimator import InitialWeights, SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._logging import (
    by_layer,
    log_figures,
    log_scalars,
    log_table,
    over_time,
)
from lightning_sketch.callbacks.spectrum_monitor._measurement import Keys, Measurement
from lightning_sketch.callbacks.spectrum_monitor._probe_batches import ProbeBatches


class SpectrumMonitor(CallbackBase):
    """Log the eigenvalues of the loss's curvature, per epoch or every so many steps.

    The Hessian is that of the mean training loss over a few fixed batches, in evaluation mode and float32,
    with respect to the parameters that are trainable at that moment. Units: loss per squared parameter.
    `trainer.validate(model, dataloader)` takes the spectrum of a checkpoint, on the first batches of that loader.

    Logs to every logger of the Trainer, and to `trainer.callback_metrics`, under `hessian/`: `lambda_max`,
    `lambda_min`, `rneg` (|most negative| / largest), `rneg_error`, `num_outliers` (eigenvalues above 20 % of the
    largest), `trace`, `trace_sem` (its standard error), `gradient_in_top_k` and `gradient_in_outliers` (shares of the
    gradient in these eigenvectors; `gradient_chance` is that of a random direction), `overlap` (of the top
    eigenvectors with the last ones), `sharpness_lr` (lambda_max times the learning rate), `loss`, `seconds`; and the
    ranks, `hessian_eigenvalues/top_01` ..., `hessian_eigenvalues/bottom_01` .... With `density_probes` also
    `negative_mass`, `effective_rank`, and the density as a histogram in W&B and TensorBoard. W&B also gets a picture
    per measurement and a table at the end; beside a CSV file everything lies in safetensors. A number that has not
    converged is logged as NaN. `monitor.history` holds all of it, with residuals; `monitor.plot()` draws it.

    Training is not touched: final weights are the same, bit for bit, with and without the monitor.
    A measurement costs at most 1.25 `num_matvecs` + 32 `density_probes` + 6 products over `num_batches` batches, each
    about three gradients, and memory for about six vectors of the parameters' size. What it took is printed.

    Under DDP each rank keeps its own batches, and products are averaged over the ranks.

    Args:
        curvature: "hessian"; "ggn", the Gauss-Newton matrix, which is never negative; or "fisher", the empirical
            Fisher matrix, which is slow unless `loss_fn` returns one loss per example.
        method: "lanczos": on the full matrix, with sketched Krylov vectors; or "projected", the paper's own, on its
            sketch: off by 8 to 18 % at dim 512, by 4 to 7 % at 2048, and logged under `hessian_projected/`.
        top_k: how many of the largest eigenvalues are wanted.
        bottom_k: how many of the smallest; none for "ggn" and "fisher", whose smallest are zeros.
        num_matvecs: most products of one measurement; it stops early when the wanted ones are known.
        dim: size of the sketches, at least 2 (`num_matvecs` + 32 `density_probes`).
        tol: largest relative residual of an eigenvalue that counts as converged.
        density_probes: further starts, for the density of all eigenvalues; 3 is usual.
        data: "train": the first batches of the first epoch, kept.
        num_batches: how many of them; nothing is measured before all are known.
        parameters: which parameters, as a shell pattern on their names, e.g. "blocks.*.attn.*".
        every_n_epochs: epochs between two measurements; 1 if neither cadence is set.
        every_n_train_steps: optimizer steps between two measurements, instead of epochs.
        at_start: measure the initial weights too, logged at step 0; until `num_batches` batches are known, a
            copy of them is kept.
        loss_fn: (module, batch) -> mean loss; the module's own `training_step` if None, its logging silenced.
        name: prefix of the log keys and part of the checkpoint key; the curvature if None.
        on_error: what to do if a measurement fails later than on the first batch: "warn" logs NaN and
            lets training go on, "raise" stops it.
        seed: of the start vectors and the sketches.
        per_layer: also log the top eigenvalue and the trace of each layer's own block, under `hessian_layers/`: True
            for every module that holds parameters, or a list of patterns. Costs up to 46 products a layer.
        model_fn: (module, batch) -> output, and
        output_loss_fn: (output, batch) -> mean loss: for "ggn"; see `GGN` for what is taken by default, and checked.
        weight_fn: batch -> its weight; its number of examples if None. For a mean over tokens `num_labels`.
        num_examples: how many examples a batch has, or batch -> how many, where its tensors do not agree on that.
        batch_dim: the axis of the examples, 1 for (time, batch, ...).
        micro_batch_size: most examples differentiated at once; halved by itself when memory runs out.
        hvp: how Hessian products are made, see `Hessian`.

    Raises:
        ValueError: if an argument is out of its range.
        MisconfigurationException: before training, if the Trainer or the module does not fit.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[SpectrumMonitor()])
        trainer.fit(model, datamodule=data)
    """

    def __init__(
        self,
        curvature: str = "hessian",
        method: str = "lanczos",
        top_k: int = 10,
        bottom_k: int = 3,
        num_matvecs: int = 96,
        dim: int = 1024,
        tol: float = 1e-2,
        density_probes: int = 0,
        data: str = "train",
        num_batches: int = 4,
        parameters: str = "*",
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        name: str | None = None,
        on_error: str = "warn",
        seed: int = 0,
        per_layer: bool | list[str] = False,
        model_fn: Callable[[Any, Any], Any] | None = None,
        output_loss_fn: Callable[[Tensor, Any], Tensor] | None = None,
        weight_fn: Callable[[Any], float] | None = None,
        micro_batch_size: int | None = None,
        hvp: str = "auto",
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
        self.instrument = SpectrumEstimator(
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
        self._kept = ProbeBatches(num_batches)  # made anew at each fit
        self._last_step = -1
        self._initial: tuple[InitialWeights, Stability] | None = None
        self._stability = UNKNOWN
        self._resumed_from: str | None = None
        self._clock = 0.0

    @property
    def state_key(self) -> str:
        """Two monitors with two names have two keys."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The history and a fingerprint of the batches; nothing of the parameters' size."""
        batches = self._kept.fingerprint if self._kept.complete else self._resumed_from
        return {"history": [m.state() for m in self.history], "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        self.history = [Measurement.of_state(m) for m in state["history"]]
        self._resumed_from = state["batches"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; forget an earlier fit."""
        if stage not in ("fit", "validate"):
            return
        goes_on = stage == "fit" and trainer.global_step > 0  # a checkpoint is loaded after this
        self._resumed_from = self._kept.fingerprint if goes_on and self._kept.complete else None
        self._kept, self._initial = ProbeBatches(self._kept.num_batches), None
        if not goes_on:
            self.history = []
        check_trainer(trainer, pl_module, self.name, self.instrument.loss_fn is not None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without trainable parameters, or none of that name."""
        Layout.of(pl_module, self.instrument.parameters)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps before this one are done."""
        self._last_step = trainer.global_step
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batches; on the very first, take three products, so that what cannot work fails now."""
        self._stability = stability(trainer)  # schedulers move on before the epoch ends
        if self._kept.complete:
            return
        self._kept.offer(batch)
        if len(self._kept.batches) == 1:
            self._first_look(trainer, pl_module)
            if self.at_start and trainer.global_step == 0:
                self._initial = InitialWeights(pl_module), stability(trainer)
        if self._kept.complete:
            self._data_known(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time; before all batches are known there is nothing to measure on."""
        step = trainer.global_step
        if not self.every_n_train_steps or step % self.every_n_train_steps or step == self._last_step:
            return
        self._last_step = step  # under gradient accumulation a step has several batches
        if self._kept.complete:
            self._measure_and_log(trainer, pl_module, batches_done(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if it is time."""
        if not self._kept.complete:
            self._kept.close()
            self._data_known(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            # one less, as Lightning does where it logs the means of the epoch
            self._measure_and_log(trainer, pl_module, batches_done(trainer) - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All numbers as one table, for loggers that have tables."""
        if trainer.is_global_zero:
            log_table(trainer.loggers, self.name, self.history)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Under `trainer.validate`: keep the first batches."""
        if self._validates(trainer) and dataloader_idx == 0 and not self._kept.complete:
            self._kept.offer(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under `trainer.validate`: measure the module as it is."""
        if self._validates(trainer):
            self._kept.close()
            self._stability = UNKNOWN
            self._measure_and_log(trainer, pl_module, trainer.global_step, look=True)

    def measure(
        self, pl_module: LightningModule, epoch: int = 0, step: int = 0, distributed: bool = False, on_product=None
    ) -> Measurement:
        """The spectrum of the module as it is now, on the kept batches."""
        batches = self._kept.on_device(pl_module.device)
        return self.instrument.measure(pl_module, batches, epoch, step, distributed, on_product)

    def plot(self):
        """The eigenvalues over all measurements, as a matplotlib figure.

        Raises:
            ValueError: if nothing was measured yet.
            ImportError: if matplotlib is missing.
        """
        if not self.history:
            raise ValueError("nothing to plot: no measurement was taken yet; run trainer.fit first.")
        return over_time(self.history, self.instrument, self.name)

    def plot_layers(self):
        """The top eigenvalue and the trace of each layer at the last measurement, as a matplotlib figure.

        Raises:
            ValueError: if no layers were measured.
            ImportError: if matplotlib is missing.
        """
        if not self.history or not self.history[-1].layers:
            raise ValueError("no layers to plot; use SpectrumMonitor(per_layer=True), then trainer.fit.")
        return by_layer(self.history[-1], self.name)

    def _first_look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with muted_loggers(trainer):
            self.instrument.check(pl_module, self._kept.on_device(pl_module.device), trainer.world_size > 1)

    def _data_known(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = self._kept.on_device(pl_module.device)
        self.instrument.check_weights(pl_module, batches, trainer.world_size > 1)
        # under DDP a checkpoint holds what rank zero knows
        if trainer.is_global_zero and self._resumed_from not in (None, self._kept.fingerprint):
            warnings.warn(
                f"{self.name}: the first batches differ from those before the checkpoint, so that the curve is not on "
                "the same data throughout; keep the loader's order (seed_everything, or no shuffling).",
                stacklevel=2,
            )
        if self._initial is not None:
            (initial, then), self._initial = self._initial, None
            now, self._stability = self._stability, then
            with initial.in_place(pl_module):
                self._measure_and_log(trainer, pl_module, 0, step=0)
            self._stability = now

    def _measure_and_log(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        logged: int,
        step: int | None = None,
        look: bool = False,
    ) -> None:
        step = trainer.global_step if step is None else step
        since = time.perf_counter() - self._clock
        scalars, measured = self._keys.nothing_known(), None
        scalars |= {key: math.nan for key in trainer.callback_metrics if key.startswith(f"{self.name}_layers/")}
        try:
            if look:
                self._first_look(trainer, pl_module)
            with muted_loggers(trainer), BarText(trainer) as bar:
                measured = self.measure(
                    pl_module,
                    trainer.current_epoch,
                    step,
                    trainer.world_size > 1,
                    lambda done, of: bar.show(f"{self.name} {done}/{of}: "),
                )
        except Exception as error:
            if self.on_error == "raise" or look:
                raise
            warnings.warn(f"{self.name}: no measurement at step {step}: {error}", stacklevel=2)
        else:
            earlier = [m for m in self.history if m.step < step]
            measured = measured.after(earlier, self._stability, self.instrument.top_k)
            self.history = [m.kept(0) for m in earlier] + [measured.kept(self.instrument.top_k)]
            scalars = measured.scalars(self._keys)
            cadence = "every_n_train_steps" if self.every_n_train_steps else "every_n_epochs"
            say(trainer, measured.cost(self.name, math.inf if look else since, cadence, getattr(self, cadence)))
        log_scalars(trainer.loggers, scalars, logged)
        if measured is not None and trainer.is_global_zero:
            self._log_figures(trainer, measured, logged, unique=look)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})
        self._clock = time.perf_counter()

    def _log_figures(self, trainer: Trainer, measured: Measurement, logged: int, unique: bool) -> None:
        try:
            log_figures(trainer.loggers, self.name, measured, logged, self._keys.density, unique)
        except Exception as error:  # a full disk, or a logger of another version
            if self.on_error == "raise":
                raise
            warnings.warn(f"{self.name}: no pictures or files at step {measured.step}: {error}", stacklevel=2)

    @property
    def _keys(self) -> Keys:
        return Keys(self.name, self.instrument.top_k, self.instrument.bottom_k, self.instrument.density_probes > 0)

    def _validates(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "validate"
