"""Log the ends of the Hessian's spectrum while training."""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_sketch import plots
from lightning_sketch._compat import (
    BarText,
    CallbackBase,
    LightningModule,
    Trainer,
    batches_done,
    muted_loggers,
    say,
    state_key,
)
from lightning_sketch.callbacks.initial_weights import InitialWeights
from lightning_sketch.callbacks.kept_batches import KeptBatches
from lightning_sketch.callbacks.measurement import Measurement, nothing_known
from lightning_sketch.curvature import Hessian, spectrum
from lightning_sketch.curvature.checks import check_arguments, checked_defect
from lightning_sketch.curvature.lanczos import start_vector
from lightning_sketch.gradients import training_step_loss
from lightning_sketch.params import Layout


class SpectrumMonitor(CallbackBase):
    """Log the largest and smallest eigenvalues of the loss's Hessian, per epoch or every so many steps.

    The Hessian is that of the mean training loss over a few fixed batches, in evaluation mode and float32,
    with respect to the parameters that are trainable at that moment. Units: loss per squared parameter.

    Logs to every logger of the Trainer, and to `trainer.callback_metrics`: `hessian/lambda_max`,
    `hessian/lambda_min`, `hessian/rneg` (|most negative| / largest), `hessian/rneg_error`,
    `hessian/num_outliers` (eigenvalues above 20 % of the largest), `hessian/loss`, `hessian/seconds`; and the
    ranks, `hessian_eigenvalues/top_01` ..., `hessian_eigenvalues/bottom_01` .... A number that has not converged is
    logged as NaN. `monitor.history` holds everything, with residuals; `monitor.plot()` draws it.

    Training is not touched: final weights are the same, bit for bit, with and without the monitor.
    A measurement costs at most 1.25 `num_matvecs` + 6 Hessian-vector products over `num_batches` batches, each
    about two gradients, and memory for about five vectors of the parameters' size. What it took is printed.

    Args:
        curvature: "hessian".
        method: "lanczos": on the full Hessian, with sketched Krylov vectors.
        top_k: how many of the largest eigenvalues are wanted.
        bottom_k: how many of the smallest.
        num_matvecs: most Hessian-vector products of one measurement; it stops early when the wanted ones are known.
        dim: size of the sketches, at least 2 `num_matvecs`.
        tol: largest relative residual of an eigenvalue that counts as converged.
        density_probes: 0.
        data: "train": the first batches of the first epoch, kept.
        num_batches: how many of them.
        parameters: which parameters, as a shell pattern on their names, e.g. "blocks.*.attn.*".
        every_n_epochs: epochs between two measurements; 1 if neither cadence is set.
        every_n_train_steps: optimizer steps between two measurements, instead of epochs.
        at_start: measure the initial weights too, logged at step 0; until `num_batches` batches are known, a
            copy of them is kept.
        loss_fn: (module, batch) -> mean loss; the module's own `training_step` if None, its logging silenced.
        name: prefix of the log keys and part of the checkpoint key; the curvature if None.
        on_error: what to do if a measurement fails later than on the first batch: "warn" logs NaN and
            lets training go on, "raise" stops it.
        seed: of the start vector and the sketches.

    Raises:
        ValueError: if an argument is out of its range, or asks for what this version lacks.
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
    ):
        super().__init__()
        for argument, value, has in (
            ("curvature", curvature, ("hessian",)),
            ("method", method, ("lanczos",)),
            ("density_probes", density_probes, (0,)),
            ("data", data, ("train",)),
            ("on_error", on_error, ("warn", "raise")),
        ):
            if value not in has:
                choices = " or ".join(map(repr, has))
                raise ValueError(f"SpectrumMonitor({argument}={value!r}) is not in this version; use {choices}.")
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ValueError(
                f"set every_n_epochs or every_n_train_steps, got both ({every_n_epochs} and {every_n_train_steps}); "
                "use two monitors with two names to have both."
            )
        for argument, value in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
            ("num_batches", num_batches),
            ("top_k", top_k),
        ):
            if value is not None and value < 1:
                raise ValueError(f"need {argument} >= 1, got {value}.")
        check_arguments(num_matvecs, dim, top_k, bottom_k, tol)
        self.curvature, self.method, self.data, self.density_probes = curvature, method, data, density_probes
        self.top_k, self.bottom_k, self.num_matvecs, self.dim, self.tol = top_k, bottom_k, num_matvecs, dim, tol
        self.parameters, self.loss_fn, self.at_start = parameters, loss_fn, at_start
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs or (None if every_n_train_steps else 1)
        self.name, self.on_error, self.seed = name or curvature, on_error, seed

        self.history: list[Measurement] = []
        self._kept = KeptBatches(num_batches)  # made anew at each fit
        self._last_step = -1
        self._initial: InitialWeights | None = None
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
        self.history = [Measurement(**m) for m in state["history"]]
        self._resumed_from = state["batches"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; forget an earlier fit."""
        if stage != "fit":
            return
        self._kept, self._initial, self._resumed_from = KeptBatches(self._kept.num_batches), None, None
        if trainer.global_step == 0:  # a checkpoint is loaded after this
            self.history = []
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"SpectrumMonitor measures on one process in this version, got {trainer.world_size}; use devices=1."
            )
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand, so its training_step need not return the loss; pass "
                "SpectrumMonitor(loss_fn=lambda module, batch: ...)."
            )
        if any(p.is_meta for p in pl_module.parameters()) and not is_overridden("configure_model", pl_module):
            raise MisconfigurationException(
                f"parameters of {type(pl_module).__name__} are on the meta device; make them in configure_model."
            )
        for callback in trainer.callbacks:
            key = getattr(callback, "monitor", None) or ""
            ours = key.startswith((f"{self.name}/", f"{self.name}_eigenvalues/"))
            if ours and getattr(callback, "check_finite", False):
                raise MisconfigurationException(
                    f"{type(callback).__name__}(monitor={key!r}, check_finite=True) would stop training at the first "
                    "eigenvalue that has not converged, which is logged as NaN; set check_finite=False."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without trainable parameters, or none of that name."""
        Layout.of(pl_module, self.parameters)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps before this one are done."""
        self._last_step = trainer.global_step
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batches; on the very first, take three products, so that what cannot work fails now."""
        if self._kept.complete:
            return
        self._kept.offer(batch)
        if len(self._kept.batches) == 1:
            self._first_look(trainer, pl_module)
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

    def measure(self, pl_module: LightningModule, epoch: int = 0, step: int = 0, on_product=None) -> Measurement:
        """The spectrum of the module as it is now, on the kept batches."""
        start = time.perf_counter()
        hessian = self._hessian(pl_module)
        with hessian.hold():
            loss = hessian.loss()
            measured = spectrum(
                hessian,
                num_matvecs=self.num_matvecs,
                dim=self.dim,
                seed=self.seed,
                top_k=self.top_k,
                bottom_k=self.bottom_k,
                tol=self.tol,
                density_probes=self.density_probes,
                on_product=on_product,
            )
        return Measurement(**vars(measured), epoch=epoch, step=step, loss=loss, seconds=time.perf_counter() - start)

    def plot(self):
        """The eigenvalues over all measurements, as a matplotlib figure.

        Raises:
            ValueError: if nothing was measured yet.
            ImportError: if matplotlib is missing.
        """
        if not self.history:
            raise ValueError("nothing to plot: no measurement was taken yet; run trainer.fit first.")
        return plots.spectrum_over_time(
            time=[m.step for m in self.history],
            values=[m.eigenvalues.tolist() for m in self.history],
            errors=[m.residuals.tolist() for m in self.history],
            converged=[m.converged.tolist() for m in self.history],
            top_k=self.top_k,
            bottom_k=self.bottom_k,
            title=f"{self.curvature.capitalize()} eigenvalues while training",
        )

    def _hessian(self, pl_module: LightningModule) -> Hessian:
        def loss(module: torch.nn.Module, indexed: tuple[int, Any]) -> Tensor:
            index, batch = indexed[0], copy.deepcopy(indexed[1])  # a step may change its batch in place
            return self.loss_fn(module, batch) if self.loss_fn else training_step_loss(module, batch, index)

        return Hessian(loss, pl_module, self._kept.on_device(pl_module.device), parameters=self.parameters)

    def _first_look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hessian = self._hessian(pl_module)
        with muted_loggers(trainer), hessian.hold():
            checked_defect(hessian, *(start_vector(hessian, self.seed, name) for name in ("0", "defect")), random=True)
        if self.at_start and trainer.global_step == 0:
            self._initial = InitialWeights(pl_module)

    def _data_known(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed_from not in (None, self._kept.fingerprint):
            warnings.warn(
                f"{self.name}: the first batches differ from those before the checkpoint, so that the curve is not on "
                "the same data throughout; keep the loader's order (seed_everything, or no shuffling).",
                stacklevel=2,
            )
        if self._initial is not None:
            initial, self._initial = self._initial, None
            with initial.in_place(pl_module):
                self._measure_and_log(trainer, pl_module, 0, step=0)

    def _measure_and_log(
        self, trainer: Trainer, pl_module: LightningModule, logged: int, step: int | None = None
    ) -> None:
        step = trainer.global_step if step is None else step
        since = time.perf_counter() - self._clock
        scalars = nothing_known(self.name, self.top_k, self.bottom_k)
        try:
            with muted_loggers(trainer), BarText(trainer) as bar:
                measured = self.measure(
                    pl_module, trainer.current_epoch, step, lambda done, of: bar.show(f"{self.name} {done}/{of}: ")
                )
        except Exception as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"{self.name}: no measurement at step {step}: {error}", stacklevel=2)
        else:
            self.history = [m for m in self.history if m.step < step] + [measured]
            scalars = measured.scalars(self.name, self.top_k, self.bottom_k)
            cadence = "every_n_train_steps" if self.every_n_train_steps else "every_n_epochs"
            say(trainer, measured.cost(self.name, since, cadence, getattr(self, cadence)))
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=logged)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})
        self._clock = time.perf_counter()
