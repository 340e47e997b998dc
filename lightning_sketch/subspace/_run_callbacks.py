"""The callbacks of the runs of a search: the metric before training, the last and the best one, and checkpoints."""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states

from lightning_sketch._lightning import CallbackBase, CheckpointBase, LightningModule, train_for
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.subspace._ledger import Entry
from lightning_sketch.subspace.result import Mode, reaches

_RATES = 200  # steps of schedulers that are compared
_KEY = "intrinsic_dimension/"  # of what is returned in `callback_metrics`, which come back from spawned processes


class Start(CallbackBase):
    """Stop a fit before its first step, and return the metric then, and hashes of the data and of the optimizer."""

    def __init__(self, monitor: str):
        self.monitor, self.logged, self.value = monitor, list[str](), dict[str, float]()

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """End training now, after the optimizer and its schedulers have been made for its real length."""
        self.limits = trainer.max_steps, trainer.max_epochs
        train_for(trainer, 0)

    def on_sanity_check_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Validate as usual, since some modules log nothing during a sanity check."""
        trainer.validating = True

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Take the metric, before it is deleted at the end of the sanity check."""
        self.logged = list(trainer.callback_metrics)
        if self.monitor in trainer.callback_metrics:
            self.value = {"value": _mean(trainer, self.monitor)}

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Return what was found."""
        set_seeds(0)
        data = [_contents(loaders) for loaders in (trainer.train_dataloader, trainer.val_dataloaders)]
        optimizer = description(trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])
        hashes = {"data": content_hash(repr(data)), "optimizer": content_hash(optimizer)}
        _return(trainer, {**self.value, **hashes, "never": _never_validates(trainer, *self.limits)})


class Validations(CheckpointBase):
    """Remember the last and the best value of the metric, and save a checkpoint after each validation.

    From a checkpoint at the end of an epoch, training goes on as it would have without an interruption. Within an epoch
    Lightning reads the data from their beginning, in another order.

    Args:
        monitor: The metric.
        mode: "max" or "min".
        entry: Where checkpoints are saved; None for none.
    """

    def __init__(self, monitor: str, mode: Mode, entry: Entry | None):
        self.monitor, self.mode, self.entry = monitor, mode, entry
        self.values: dict[str, float] = {}
        self.state: dict[str, Any] = {}  # what Lightning does not save

    def state_dict(self) -> dict[str, Any]:
        """Return the values, random numbers, metrics that other callbacks may need, and whether training is to stop."""
        return {"values": self.values, **self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values now, and the rest when training starts."""
        self.state = dict(state)
        self.values = self.state.pop("values")

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Restore what a checkpoint contains, after the data have been set up."""
        if self.state:
            _set_rng_states(self.state["random"])
            trainer.callback_metrics.update(self.state["metrics"])
            trainer.should_stop = self.state["stop"]

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Take the metric, and save a checkpoint, unless this is Lightning's sanity check."""
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value, best = _mean(trainer, self.monitor), self.values.get("best", math.nan)
        best = value if math.isnan(best) or reaches(value, best, self.mode) else best
        self.values = {"value": value, "best": best, "validated": trainer.global_step}
        if self.entry is None:
            return
        states = _collect_rng_states()
        kind, keys, *rest = states["numpy"]
        states["numpy"] = (kind, keys.tolist(), *rest)  # which torch loads with weights_only=True
        self.state = {"random": states, "metrics": dict(trainer.callback_metrics), "stop": trainer.should_stop}
        path = self.entry.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero and (before := self.entry.seal(path)) is not None:
            trainer.strategy.remove_checkpoint(before)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Return the values."""
        _return(trainer, {**self.values, "steps": trainer.global_step})


def set_seeds(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers."""
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed)


def _mean(trainer: Any, monitor: str) -> float:
    """Return the mean of the metric over ranks, each of which logs its own; the finder uses the same mean."""
    metric, strategy = trainer.callback_metrics[monitor], trainer.strategy
    return float(strategy.reduce(metric.clone().to(strategy.root_device), reduce_op="mean"))


def _return(trainer: Any, values: Mapping[str, float | int]) -> None:
    """Put numbers where they come back even from a process that Lightning spawned for the fit."""
    trainer.callback_metrics.update({_KEY + name: torch.tensor(value) for name, value in values.items()})


def returned(trainer: Any) -> dict[str, Any]:
    """Return the numbers that a callback of a fit has returned."""
    found = trainer.callback_metrics.items()
    return {name.removeprefix(_KEY): value.item() for name, value in found if name.startswith(_KEY)}


def description(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> str:
    """Return the classes and options of optimizers and schedulers, and the rates of the first steps; these are taken.

    The rates are there since a scheduler's state does not contain the functions that it calls.
    """
    options = [
        [type(optimizer).__qualname__, {k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")}]
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    states = [[type(one).__qualname__, {k: _plain(v) for k, v in one.state_dict().items()}] for one in schedulers]
    rates = []
    with warnings.catch_warnings(), suppress(ValueError):  # OneCycleLR ends with one
        warnings.simplefilter("ignore")  # the optimizer does not step
        for _ in range(_RATES if optimizers else 0):
            for scheduler in schedulers:
                if "metrics" not in signature(scheduler.step).parameters:
                    scheduler.step()
            rates.append([_plain(group["lr"]) for one in optimizers for group in one.param_groups])
    return repr([options, states, rates])


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _contents(loaders: Any) -> list[Any]:
    """Return the length of each loader, its batch size, and hashes of three of its examples, if they can be indexed.

    Examples are indexed rather than drawn, since drawing a batch would change the order of later ones.
    """
    if isinstance(loaders, Mapping | list | tuple):
        return [_contents(one) for one in (loaders.values() if isinstance(loaders, Mapping) else loaders)]
    found, data = [sized_len(loaders), getattr(loaders, "batch_size", None)], getattr(loaders, "dataset", None)
    with suppress(Exception):  # data sets of any kind: whatever cannot be indexed is not compared
        found += [content_hash(data[i]) for i in (0, len(data) // 2, len(data) - 1)]  # type: ignore[index, arg-type]
    return found


def _never_validates(trainer: Any, max_steps: int, max_epochs: int) -> bool:
    """Return whether training ends before its first validation, as far as that is known."""
    batches, every, epochs = trainer.num_training_batches, trainer.val_check_batch, trainer.check_val_every_n_epoch
    if every is None or (math.isinf(batches) and (math.isinf(every) or epochs not in (None, 1))):
        return False
    first = min(every, batches) + ((epochs - 1) * batches if epochs > 1 else 0) if epochs else every
    last = [max_steps * trainer.accumulate_grad_batches] if max_steps >= 0 else []
    return first > min([*last, *([max_epochs * batches] if max_epochs >= 0 else [])], default=math.inf)
