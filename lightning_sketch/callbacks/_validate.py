"""Refuse a Trainer or a module that a callback does not fit, before training starts."""

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_sketch._lightning import LightningModule, Trainer

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_trainer(trainer: Trainer, pl_module: LightningModule, name: str, has_loss_fn: bool) -> None:
    """Raise MisconfigurationException, with the way out."""
    sharded = [kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in _SHARDED]
    if sharded:
        raise MisconfigurationException(
            f"SpectrumMonitor cannot measure under {sharded[0]}: sharded parameters have no second derivatives in "
            "PyTorch. Train with strategy='ddp', or save checkpoints and measure them in one process: "
            "Trainer(callbacks=[SpectrumMonitor()]).validate(model, dataloader)."
        )
    if not has_loss_fn and not pl_module.automatic_optimization:
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
        ours = key.startswith((f"{name}/", f"{name}_eigenvalues/", f"{name}_layers/"))
        if ours and getattr(callback, "check_finite", False):
            raise MisconfigurationException(
                f"{type(callback).__name__}(monitor={key!r}, check_finite=True) would stop training at the first "
                "eigenvalue that has not converged, which is logged as NaN; set check_finite=False."
            )


def check_rows(trainer: Trainer, pl_module: LightningModule, stage: str, per: str, has_loss_fn: bool) -> None:
    """Raise MisconfigurationException if gradients cannot be written, with the way out."""
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    whole = stage != "fit" or per == "example"
    if "DeepSpeedStrategy" in kinds or "FSDPStrategy" in kinds or ("ModelParallelStrategy" in kinds and whole):
        raise MisconfigurationException(
            f"GradientSketchWriter cannot write rows of {stage} under {type(trainer.strategy).__name__}: an example's "
            "gradient needs whole parameters, and only the gradients of steps under ModelParallelStrategy are sketched "
            "where their shards are. Use strategy='ddp', or one device."
        )
    if per == "example" and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes by hand: which backward pass is that of an example's loss is "
            "not known. Use GradientSketchWriter(per='step')."
        )
    if stage != "fit" and not has_loss_fn and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes by hand, so its training_step need not return the loss; pass "
            "GradientSketchWriter(loss_fn=lambda module, batch: ...)."
        )
