"""Checks before training that a callback supports the Trainer and the module."""

from typing import Literal

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_sketch._lightning import LightningModule, Trainer, callbacks_of

# Whether a row of a fit is of an optimizer step or of a training example.
Granularity = Literal["step", "example"]

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_trainer(trainer: Trainer, pl_module: LightningModule, name: str, has_loss_fn: bool) -> None:
    """Check that a spectrum can be measured.

    Args:
        trainer: The Trainer that runs the fit.
        pl_module: The module that is trained.
        name: The prefix of the monitor's log keys.
        has_loss_fn: Whether the user passes a loss instead of `training_step`.

    Raises:
        MisconfigurationException: If the strategy shards parameters, the loss or the parameters are unknown, or another
            callback would stop training at an eigenvalue that is logged as NaN.
    """
    sharded = [kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in _SHARDED]
    if sharded:
        raise MisconfigurationException(
            f"SpectrumMonitor cannot measure under {sharded[0]}: sharded parameters have no second derivatives in "
            "PyTorch. Train with strategy='ddp', or save checkpoints and measure them in one process: "
            "Trainer(callbacks=[SpectrumMonitor()]).validate(model, dataloader)."
        )
    if not has_loss_fn and not pl_module.automatic_optimization:
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
        is_our_key = key.startswith((f"{name}/", f"{name}_eigenvalues/", f"{name}_layers/"))
        if is_our_key and getattr(callback, "check_finite", False):
            raise MisconfigurationException(
                f"{type(callback).__name__}(monitor={key!r}, check_finite=True) would stop training at the first "
                "eigenvalue that has not converged, which is logged as NaN; set check_finite=False."
            )


def check_rows(trainer: Trainer, pl_module: LightningModule, stage: str, per: Granularity, has_loss_fn: bool) -> None:
    """Check that sketched gradients can be written.

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
