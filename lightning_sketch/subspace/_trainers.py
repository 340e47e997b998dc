"""A new Trainer for each run: one that has fitted would do no step more."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch._lightning import LightningModule, Trainer, trainer_class

_COPIED = ("callbacks", "strategy", "plugins", "profiler")


class Trainers:
    """Gives a Trainer for each dimension.

    Args:
        trainer_fn: dim -> Trainer, or a dict of arguments.
        module: tells which of Lightning's namespaces a Trainer of arguments is from.
    """

    def __init__(self, trainer_fn: Callable[[int], Trainer] | dict[str, Any], module: LightningModule):
        self.trainer_fn, self.kind = trainer_fn, trainer_class(module)
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()  # none is kept alive for this
        self.waiting: dict[int, list[Trainer]] = {}

    def check(self, dims: list[int]) -> None:
        """Make one for each of these, to be taken later.

        Raises:
            MisconfigurationException: if two are the same, or share a logger.
        """
        for dim in dims:
            self.waiting.setdefault(dim, []).append(self._make(dim))

    def peek(self, dim: int) -> Trainer:
        """The one that `take` will give."""
        if not self.waiting.get(dim):
            self.check([dim])
        return self.waiting[dim][0]

    def take(self, dim: int) -> Trainer:
        """One that has not been taken."""
        self.peek(dim)
        return self.waiting[dim].pop(0)

    def folder(self, dim: int) -> Path:
        """Where the loggers of a Trainer write, or it itself."""
        trainer = self.peek(dim)
        saved = next((logger.save_dir for logger in trainer.loggers if logger.save_dir), None)
        return Path(saved or trainer.default_root_dir)

    def _make(self, dim: int) -> Trainer:
        trainer = self._of_arguments(dim) if isinstance(self.trainer_fn, dict) else self.trainer_fn(dim)
        if not isinstance(trainer, Trainer):
            raise MisconfigurationException(
                f"trainer_fn({dim}) gave {type(trainer).__name__}, no Trainer; use lambda dim: Trainer(...)."
            )
        if trainer.state.fn is not None or trainer in self.seen:
            raise MisconfigurationException(
                f"trainer_fn({dim}) gave a Trainer that is in use; make a new one each time: lambda dim: Trainer(...)."
            )
        if any(logger in self.seen for logger in trainer.loggers):
            raise MisconfigurationException(
                "trainer_fn gave two Trainers one logger, which holds one run; make the logger in trainer_fn too."
            )
        self.seen.update([trainer, *trainer.loggers])
        return trainer

    def _of_arguments(self, dim: int) -> Trainer:
        arguments = dict(self.trainer_fn)
        if callable(arguments.get("logger")):
            arguments["logger"] = arguments["logger"](dim)
        return self.kind(**{name: copy.deepcopy(x) if name in _COPIED else x for name, x in arguments.items()})
