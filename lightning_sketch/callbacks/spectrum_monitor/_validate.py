"""Checks before training that a spectrum can be measured."""

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_sketch._lightning import LightningModule, Trainer, callbacks_of

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
