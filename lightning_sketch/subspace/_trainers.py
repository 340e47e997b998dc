"""Trainers for the runs of a search, each used for one fit."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch._lightning import LightningModule, Trainer, trainer_class

_COPIED = ("callbacks", "strategy", "plugins", "profiler")


class Trainers:
    """Make a new Trainer for each run, and check that Trainers and loggers are not shared.

    Args:
        trainer_fn: A function from dim to a Trainer, or a mapping with the Trainer's arguments.
        module: The module to train, which determines the Lightning namespace of Trainers made from arguments.
    """

    def __init__(self, trainer_fn: Callable[[int], Trainer] | Mapping[str, Any], module: LightningModule):
        self.trainer_fn, self.trainer_class = trainer_fn, trainer_class(module)
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()  # weak, so that finished Trainers are freed
        self.waiting: dict[int, Trainer] = {}

    def peek(self, dim: int) -> Any:
        """Return the Trainer that `take` will return next.

        Raises:
            MisconfigurationException: If `trainer_fn` does not make a new Trainer, or two of them share a logger.
        """
        if dim not in self.waiting:
            self.waiting[dim] = self._make(dim)
        return self.waiting[dim]

    def take(self, dim: int) -> Any:
        """Return a Trainer that has not been taken before."""
        self.peek(dim)
        return self.waiting.pop(dim)

    def folder(self, dim: int) -> Path:
        """Return the folder of the first logger that writes files, or the Trainer's default folder."""
        trainer = self.peek(dim)
        return Path(next((x.save_dir for x in trainer.loggers if x.save_dir), None) or trainer.default_root_dir)

    def _make(self, dim: int) -> Trainer:
        given = self.trainer_fn
        trainer = self._from_arguments(given, dim) if isinstance(given, Mapping) else given(dim)
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

    def _from_arguments(self, given: Mapping[str, Any], dim: int) -> Trainer:
        arguments = {name: _plain(value) for name, value in given.items()}
        if callable(arguments.get("logger")):
            arguments["logger"] = arguments["logger"](dim)
        return self.trainer_class(**{name: copy.deepcopy(x) if name in _COPIED else x for name, x in arguments.items()})


def _plain(value: Any) -> Any:
    """Return a mapping or a sequence of any type, such as Hydra's, as the dict or list that a Trainer takes."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
