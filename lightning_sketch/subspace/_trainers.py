"""Trainers for the runs of a search, each used for one fit."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch._lightning import LightningModule, Trainer, trainer_class

_COPIED = ("callbacks", "strategy", "plugins", "profiler")


class Trainers:
    """Make a new Trainer for each run, and check that Trainers and loggers are not shared.

    Args:
        trainer_fn: A function from dim to a Trainer, or a dict of the Trainer's arguments.
        module: The module to train, which determines the Lightning namespace of Trainers made from arguments.
    """

    def __init__(self, trainer_fn: Callable[[int], Trainer] | dict[str, Any], module: LightningModule):
        self.trainer_fn, self.trainer_class = trainer_fn, trainer_class(module)
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()  # weak, so that finished Trainers are freed
        self.waiting: dict[int, list[Trainer]] = {}

    def make(self, dims: list[int]) -> None:
        """Make a Trainer for each of these dims, to be taken later.

        Raises:
            MisconfigurationException: If `trainer_fn` does not make new Trainers, or two of them share a logger.
        """
        for dim in dims:
            self.waiting.setdefault(dim, []).append(self._make(dim))

    def peek(self, dim: int) -> Trainer:
        """Return the Trainer that `take` will return next."""
        if not self.waiting.get(dim):
            self.make([dim])
        return self.waiting[dim][0]

    def take(self, dim: int) -> Trainer:
        """Return a Trainer that has not been taken before."""
        self.peek(dim)
        return self.waiting[dim].pop(0)

    def folder(self, dim: int) -> Path:
        """Return the folder of the first logger that writes files, or the Trainer's default folder."""
        trainer = self.peek(dim)
        saved = next((logger.save_dir for logger in trainer.loggers if logger.save_dir), None)
        return Path(saved or trainer.default_root_dir)

    def _make(self, dim: int) -> Trainer:
        given = self.trainer_fn
        trainer = self._from_arguments(given, dim) if isinstance(given, dict) else given(dim)
        if not isinstance(trainer, Trainer):
            raise MisconfigurationException(
                f"trainer_fn({dim}) returned {type(trainer).__name__}, not a Trainer; use lambda dim: Trainer(...)."
            )
        if trainer.state.fn is not None or trainer in self.seen:
            raise MisconfigurationException(
                f"trainer_fn({dim}) returned a Trainer that is already in use; make a new one each time: "
                "lambda dim: Trainer(...)."
            )
        if any(logger in self.seen for logger in trainer.loggers):
            raise MisconfigurationException(
                "trainer_fn gave two Trainers the same logger, which can log one run only; make the logger in "
                "trainer_fn too."
            )
        self.seen.update([trainer, *trainer.loggers])
        return trainer

    def _from_arguments(self, given: dict[str, Any], dim: int) -> Trainer:
        arguments = dict(given)
        if callable(arguments.get("logger")):
            arguments["logger"] = arguments["logger"](dim)
        return self.trainer_class(**{name: copy.deepcopy(x) if name in _COPIED else x for name, x in arguments.items()})
