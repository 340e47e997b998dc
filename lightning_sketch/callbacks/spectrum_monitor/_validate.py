"""Checks before training that a spectrum can be measured."""

from collections.abc import Sequence
from typing import Any, get_args

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_sketch._arguments import whole_number
from lightning_sketch._lightning import LightningModule, Trainer, callbacks_of
from lightning_sketch.callbacks.spectrum_monitor._estimator import SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._measurement import Stage

_REFUSED = ("FSDPStrategy", "DeepSpeedStrategy")


def check_arguments(
    on_error: str,
    data: str,
    stages: Sequence[Stage],
    every_n_epochs: int | None,
    every_n_train_steps: int | None,
    num_batches: int,
    over_batches: bool,
) -> None:
    """Check the arguments of a SpectrumMonitor that say when and on what it measures.

    Raises:
        ValueError: If one is out of its range.
    """
    whole_number(num_batches, "num_batches", usual=4)
    if over_batches and num_batches < 2:
        raise ValueError(
            f"over_batches=True leaves out one batch after the other, got num_batches={num_batches}; use 4 or more."
        )
    if on_error not in ("warn", "raise"):
        raise ValueError(f"SpectrumMonitor(on_error={on_error!r}) is not known; use 'warn' or 'raise'.")
    if data != "train":
        raise ValueError(
            f"SpectrumMonitor(data={data!r}) is not known; use 'train', or stages=['validate'] and "
            "trainer.validate(model, dataloader) for other data."
        )
    if isinstance(stages, str) or not stages or not set(stages) <= set(get_args(Stage)):
        raise ValueError(
            f"SpectrumMonitor(stages={stages!r}) is not known; use a list of one or more of {list(get_args(Stage))}."
        )
    if every_n_epochs is not None and every_n_train_steps is not None:
        raise ValueError(
            f"set every_n_epochs or every_n_train_steps, got both ({every_n_epochs} and {every_n_train_steps}); "
            "use two monitors with two names to have both."
        )
    for argument, value in {"every_n_epochs": every_n_epochs, "every_n_train_steps": every_n_train_steps}.items():
        if value is not None:
            whole_number(value, argument)


def check_preconditioned(preconditioner: str | None, stages: Sequence[Stage], at_start: bool) -> None:
    """Check that the state of an optimizer is there whenever a SpectrumMonitor measures with it.

    Raises:
        ValueError: If the preconditioner is unknown, or there is no such state at one of these times.
    """
    if preconditioner not in (None, "optimizer"):
        raise ValueError(f"SpectrumMonitor(preconditioner={preconditioner!r}) is not known; use 'optimizer' or None.")
    if preconditioner and set(stages) != {"fit"}:
        raise ValueError(
            f"preconditioner='optimizer' needs the optimizer that trains, got stages={list(stages)}; use "
            "stages=['fit'], and a second SpectrumMonitor for the others."
        )
    if preconditioner and at_start:
        raise ValueError(
            "preconditioner='optimizer' needs an optimizer that has taken a step, got at_start=True; leave one of them "
            "out, or use two monitors."
        )


def check_trainer(
    trainer: Trainer,
    pl_module: LightningModule,
    name: str,
    estimator: SpectrumEstimator,
    every_n_epochs: int | None,
) -> None:
    """Check that a spectrum can be measured.

    Args:
        trainer: The Trainer that runs the fit.
        pl_module: The module that is trained.
        name: The prefix of the monitor's log keys.
        estimator: What the monitor estimates.
        every_n_epochs: The number of epochs between measurements; None if it is not known.

    Raises:
        MisconfigurationException: If the strategy shards parameters in a way that is not supported, the loss or the
            parameters are unknown, or another callback would stop training at an eigenvalue that is logged as NaN, or
            between two measurements.
    """
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    refused = [kind for kind in kinds if kind in _REFUSED]
    if refused:
        raise MisconfigurationException(
            f"SpectrumMonitor cannot measure under {refused[0]}, which hides the parameters' shards. Train with "
            "ModelParallelStrategy (FSDP2, tensor parallel) or strategy='ddp', or save checkpoints and measure them in "
            "one process: Trainer(callbacks=[SpectrumMonitor(stages=['validate'])]).validate(model, dataloader)."
        )
    if "ModelParallelStrategy" in kinds:
        _check_sharded(estimator)
    if not estimator.loss_fn and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} uses manual optimization, so its training_step need not return the loss; pass "
            "SpectrumMonitor(loss_fn=lambda module, batch: ...)."
        )
    if any(p.is_meta for p in pl_module.parameters()) and not is_overridden("configure_model", pl_module):
        raise MisconfigurationException(
            f"parameters of {type(pl_module).__name__} are on the meta device; create them in configure_model."
        )
    for callback in callbacks_of(trainer):
        key = getattr(callback, "monitor", None) or ""
        if key.startswith(tuple(f"{name}{section}/" for section in ("", "_eigenvalues", "_layers"))):
            _check_stopping(trainer, callback, key, every_n_epochs or 1)


def _check_sharded(estimator: SpectrumEstimator) -> None:
    """Refuse what a Hessian of sharded parameters cannot do: all of it needs second derivatives, or whole vectors."""
    asked = {
        f"curvature={estimator.curvature!r}": estimator.curvature != "hessian",
        f"method={estimator.method!r}": estimator.method != "lanczos",
        f"hvp={estimator.hvp!r}": estimator.hvp not in ("auto", "finite_differences"),
        "over_batches=True": estimator.over_batches,
        f"micro_batch_size={estimator.micro_batch_size}": estimator.micro_batch_size is not None,
    }
    for argument, refused in asked.items():
        if refused:
            raise MisconfigurationException(
                f"SpectrumMonitor({argument}) is not possible under ModelParallelStrategy, where products are "
                "differences of gradients that all ranks compute together; leave it out, or measure a checkpoint in "
                "one process."
            )


def _check_stopping(trainer: Trainer, callback: Any, key: str, every_n_epochs: int) -> None:
    """Refuse an EarlyStopping that would stop training for another reason than the values that are measured."""
    kind = type(callback).__name__
    if getattr(callback, "check_finite", False):
        raise MisconfigurationException(
            f"{kind}(monitor={key!r}, check_finite=True) would stop training at the first eigenvalue that has not "
            "converged, which is logged as NaN; set check_finite=False."
        )
    patience = getattr(callback, "patience", every_n_epochs)
    if trainer.check_val_every_n_epoch == 1 and patience < every_n_epochs:
        raise MisconfigurationException(
            f"{kind}(monitor={key!r}, patience={patience}) counts epochs, and would stop training between two "
            f"measurements of SpectrumMonitor(every_n_epochs={every_n_epochs}); set patience to {every_n_epochs} for "
            f"each measurement that may bring no improvement, e.g. {3 * every_n_epochs}."
        )
