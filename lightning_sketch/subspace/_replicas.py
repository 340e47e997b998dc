"""Replicas of a model: modules that start from the same weights."""

import copy
import re
from collections.abc import Callable

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sketch._arguments import kind_of
from lightning_sketch._lightning import LightningModule, Trainer, unwrapped
from lightning_sketch._private import required
from lightning_sketch.autodiff.fingerprint import fingerprint


class Replicas:
    """Make identically initialized replicas of a model.

    Args:
        model: A module, or a function that makes one, which may be compiled.

    Attributes:
        first: The reference model, which is never trained.
        fingerprint: A fingerprint of its parameters.

    Raises:
        TypeError: If `model` is neither, or is a compiled module.
    """

    def __init__(self, model: LightningModule | Callable[[], LightningModule]):
        if hasattr(model, "_orig_mod") or (isinstance(model, LightningModule) and required(model, "_compiler_ctx")):
            raise TypeError("a compiled module cannot be copied; pass a function: lambda: torch.compile(Module()).")
        if isinstance(model, nn.Module) and not isinstance(model, LightningModule):
            raise TypeError(
                f"model must be a LightningModule or a function that makes one, got {kind_of(model)}; put it into a "
                "LightningModule, whose training_step the runs take."
            )
        self._model = model
        self.first = _with_parameters(model) if isinstance(model, LightningModule) else _made_by(model)
        self.fingerprint = fingerprint(list(self.first.parameters()))

    @property
    def name(self) -> str:
        """Class and hyper-parameters of the model, without the memory addresses in the names of functions."""
        return re.sub(r" at 0x[0-9a-f]+", "", f"{type(self.first).__name__} {dict(self.first.hparams)}")

    def new(self) -> LightningModule:
        """Return a new replica with the weights and buffers of the reference model."""
        if isinstance(self._model, LightningModule):
            return copy.deepcopy(self.first)
        made = _made_by(self._model)
        with torch.no_grad():  # without state dicts, since a module may save only a part of itself
            for tensors in (nn.Module.parameters, nn.Module.buffers):
                for mine, theirs in zip(tensors(made), tensors(self.first), strict=True):
                    mine.copy_(theirs)
        return made


def refuse_different_starts(trainer: Trainer, mine: int) -> None:
    """Check that all ranks start from the same weights.

    Args:
        trainer: The Trainer, whose processes are running.
        mine: The fingerprint of this rank's weights.

    Raises:
        MisconfigurationException: If another rank has another fingerprint.
    """
    prints = trainer.strategy.all_gather(torch.tensor([mine], device=trainer.strategy.root_device)).flatten()
    if (prints != mine).any():
        raise MisconfigurationException(
            f"the ranks start from different weights, with fingerprints {prints.tolist()}; call seed_everything before "
            "the module is made."
        )


def _made_by(make: Callable[[], LightningModule]) -> LightningModule:
    module = unwrapped(make())
    if not isinstance(module, LightningModule):
        raise TypeError(
            f"model must be a LightningModule or a function that makes one, it gave {kind_of(module)}; return "
            "the LightningModule."
        )
    return _with_parameters(module)


def _with_parameters(module: LightningModule) -> LightningModule:
    """Call `configure_model` of a module without parameters; Lightning requires that it can be called again."""
    if not any(True for _ in module.parameters()):
        module.configure_model()
    return module
