"""Modules that start from the same weights."""

import copy
import re
from collections.abc import Callable

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sketch._lightning import LightningModule, Trainer, unwrapped
from lightning_sketch._private import required
from lightning_sketch.autodiff.fingerprint import fingerprint


class Replicas:
    """Of a model.

    Args:
        model: a module; or a function that makes one, which may be compiled.

    Raises:
        TypeError: if it is neither, or a module that is compiled.
    """

    def __init__(self, model: LightningModule | Callable[[], LightningModule]):
        if hasattr(model, "_orig_mod") or (isinstance(model, LightningModule) and required(model, "_compiler_ctx")):
            raise TypeError("a compiled module cannot be copied; pass a function: lambda: torch.compile(Module()).")
        self.make = None if isinstance(model, LightningModule) else model
        self.first = self._made() if self.make else _with_parameters(model)
        self.fingerprint = fingerprint(list(self.first.parameters()))

    @property
    def name(self) -> str:
        """Class and hyper-parameters, the same in each process: functions have an address in theirs."""
        return re.sub(r" at 0x[0-9a-f]+", "", f"{type(self.first).__name__} {dict(self.first.hparams)}")

    def one(self) -> LightningModule:
        """With the weights of the first."""
        if self.make is None:
            return copy.deepcopy(self.first)
        made = self._made()
        with torch.no_grad():  # not by a state dict, which a module may make of a part of itself
            for tensors in (nn.Module.parameters, nn.Module.buffers):
                for mine, theirs in zip(tensors(made), tensors(self.first), strict=True):
                    mine.copy_(theirs)
        return made

    def _made(self) -> LightningModule:
        module = unwrapped(self.make())
        if not isinstance(module, LightningModule):
            raise TypeError(f"model must be a LightningModule or a function that makes one, it gave {type(module)}.")
        return _with_parameters(module)


def refuse_different_starts(trainer: Trainer, mine: int) -> None:
    """By fingerprints of the weights.

    Raises:
        MisconfigurationException: if that of a rank is another.
    """
    prints = trainer.strategy.all_gather(torch.tensor([mine], device=trainer.strategy.root_device)).flatten()
    if (prints != mine).any():
        raise MisconfigurationException(
            f"the ranks start from different weights, with fingerprints {prints.tolist()}; call seed_everything before "
            "the module is made."
        )


def _with_parameters(module: LightningModule) -> LightningModule:
    """Lightning asks of `configure_model` that it can be called again."""
    if not any(True for _ in module.parameters()):
        module.configure_model()
    return module
