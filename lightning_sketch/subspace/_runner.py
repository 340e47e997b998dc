"""The training runs of a search, all from the same weights, each done once."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.seed import isolate_rng

from lightning_sketch._files import Busy, CorruptFile
from lightning_sketch._lightning import (
    CallbackBase,
    CheckpointBase,
    LightningModule,
    Trainer,
    close_run,
    muted_loggers,
    name_run,
    train_for,
)
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.memory import is_out_of_memory
from lightning_sketch.subspace._ledger import Entry, Ledger, Run, hashed
from lightning_sketch.subspace._optimizer import optimizers_in
from lightning_sketch.subspace._replicas import Replicas, refuse_different_starts
from lightning_sketch.subspace._trainers import Trainers
from lightning_sketch.subspace._weights import Weights
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.result import Mode, reaches
from lightning_sketch.subspace.subspace_module import SubspaceModule

_TRAINER_SETTINGS = (
    "max_steps",
    "max_epochs",
    "limit_train_batches",
    "limit_val_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
)
_KEY = "intrinsic_dimension/"  # of what callbacks return in `callback_metrics`, which come back from spawned processes
_ONLY_IN_SUBSPACES = (
    "sketch",
    "structure",
    "lr_scale",
    "optimizer_fn",
)  # options


@dataclass(frozen=True)
class _Task:
    """A run to be done: what identifies it, and how its module is made."""

    kind: str
    dim: int
    seed: int
    scale: float
    settings: Any
    make: Callable[[], LightningModule]
    finder: IntrinsicDimensionFinder | None = None

    def __str__(self) -> str:
        name = "full training" if self.kind == "full" else f"dim {self.dim}"
        return f"{name}, seed {self.seed}" + ("" if self.kind == "full" else f", rate {self.scale:g}")


class Runner:
    """Train replicas of a model: in full, in a subspace, or during a doubling search.

    Each run is trained by one process, is recorded when it ends, and is not done again. While it trains, each of its
    validations writes a checkpoint, unless the Trainer has enable_checkpointing=False.

    Args:
        trainer_fn: The argument of `IntrinsicDimensionTuner`.
        options: Arguments of `SubspaceModule`: sketch, parameters, others, optimizer_fn.
        model: A module, or a function that makes one, which may be compiled.
        data: The train loaders, the validation loaders, and the data module, each or None.
        monitor: The metric whose value at the last validation is the value of a run.
        mode: "max" if larger values of it are better, "min" if smaller ones are.

    Raises:
        TypeError: If `model` is neither, or is a compiled module.
    """

    def __init__(
        self,
        trainer_fn: Callable[[int], Trainer] | Mapping[str, Any],
        options: dict[str, Any],
        model: LightningModule | Callable[[], LightningModule],
        data: tuple[Any, Any, Any],
        monitor: str,
        mode: Mode,
    ):
        self.options, self.data, self.monitor, self.mode = options, data, monitor, mode
        self.replicas = Replicas(model)
        per_layer = options.get("structure") is not None
        weights = Weights(self.replicas.first, options["parameters"], options.get("head"), per_layer)
        self.n, self.num_layers = weights.layout.n, weights.num_layers
        self.trainers = Trainers(trainer_fn, self.replicas.first)
        self.waits: set[Path] = set()

    def begin(self, dim: int) -> float:
        """Make the first two Trainers, and return the metric before training, from a fit of no steps.

        Args:
            dim: The dimension of the first run in a subspace.

        Raises:
            MisconfigurationException: If the Trainers cannot be used, the metric is not logged, training would end
                before its first validation, or the ranks start from different weights.
        """
        trainer, _ = self.trainers.peek(self.n), self.trainers.peek(dim)
        self.ledger = Ledger(self.trainers.folder(self.n))
        start = self._start(trainer)
        refuse_different_starts(trainer, self.replicas.fingerprint)
        settings = {
            "initial weights": self.replicas.fingerprint,
            "class and hyper-parameters": self.replicas.name,
            "optimizer": [int(start["optimizer"]), self._optimizer_of_ones_own(dim)],
            "data": int(start["data"]),
            "metric": [self.monitor, self.mode],
        }
        self.shared = trainer.strategy.broadcast(hashed(settings))
        self._say(trainer)
        return float(start["value"])

    def length(self) -> int:
        """Return the number of optimizer steps of a run, as the Trainer's `max_steps` gives it.

        Raises:
            MisconfigurationException: If the Trainer has none.
        """
        steps = self.trainers.peek(self.n).max_steps
        if steps < 1:
            raise MisconfigurationException(
                "method='doubling' takes up to twice the steps of full training, which is not run if baseline is "
                "given; set their number: Trainer(max_steps=...)."
            )
        return steps

    def fit_full(self) -> Run:
        """Train the baseline: the parameters that subspaces are of, and the other ones too if others='full'."""
        settings = {name: value for name, value in self.options.items() if name not in _ONLY_IN_SUBSPACES}
        return self._all([_Task("full", self.n, 0, 1.0, settings, self._whole)])[0]

    def fit_subspace(self, dim: int, seed: int, scale: float) -> Run:
        """Train in a `dim`-dimensional subspace, with directions multiplied by `scale`."""
        return self.fit_subspaces([(dim, seed, scale)])[0]

    def fit_subspaces(self, several: Sequence[tuple[int, int, float]]) -> list[Run]:
        """Train in several subspaces, given by dim, seed and scale; those that another process trains come last."""

        def task(dim: int, seed: int, scale: float) -> _Task:
            def make() -> LightningModule:
                return SubspaceModule(self.replicas.new(), dim, seed=seed, scale=scale, **self.options)

            return _Task("fit", dim, seed, float(scale), self._compared(), make)

        return self._all([task(*one) for one in several])

    def search(self, finder: IntrinsicDimensionFinder, dim: int, max_dim: int, seed: int, scale: float) -> Run:
        """Run a doubling search from `dim` to `max_dim` at a constant learning rate."""

        def make() -> LightningModule:
            options = {"seed": seed, "max_dim": max_dim, "scale": scale, **self.options}
            return _ConstantRate(self.replicas.new(), dim, **options)

        rule = [dim, finder.target, finder.delta, finder.every_n_train_steps, finder.max_steps]
        settings = {**self._compared(), "rule": rule}
        return self._all([_Task("search", max_dim, seed, float(scale), settings, make, finder)])[0]

    def _whole(self) -> LightningModule:
        """Make a replica to be trained in full, in which the same parameters are frozen as in subspaces."""
        model = self.replicas.new()
        patterns = [self.options["parameters"], self.options.get("head") or ()]
        names = [name for given in patterns for name in ([given] if isinstance(given, str) else given)]
        trainable = {id(p) for p in Layout.of(model, names).parameters(model)}
        for parameter in model.parameters():
            if self.options["others"] == "frozen" and id(parameter) not in trainable:
                parameter.requires_grad_(False)
        return model

    def _compared(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name != "optimizer_fn"}

    def _optimizer_of_ones_own(self, dim: int) -> Any:
        """Return what identifies the optimizer of `optimizer_fn`, which is called for a module that is not trained."""
        if self.options["optimizer_fn"] is None:
            return None
        with isolate_rng():
            configured = SubspaceModule(self.replicas.new(), dim, **self.options).configure_optimizers()
        return _description(optimizers_in(configured), [])

    def _start(self, trainer: Any) -> dict[str, Any]:
        """Return the metric before training, and hashes of the data and of the optimizer, from a fit of no steps.

        It has no callbacks; if the metric is then missing, it is repeated with all but checkpoint callbacks, which
        would determine their folder in this fit.
        """
        train, val, datamodule = self.data
        callbacks, sanity = trainer.callbacks, trainer.num_sanity_val_steps
        loop, saving = trainer.fit_loop, trainer.checkpoint_callbacks
        limits = loop.epoch_loop.max_steps, loop.max_epochs
        for present in ([], [callback for callback in callbacks if callback not in saving]):
            start = _Start(self.monitor)
            trainer.callbacks, trainer.num_sanity_val_steps = [*present, start], math.inf
            try:
                with isolate_rng(), muted_loggers(trainer):
                    _seed(0)
                    trainer.fit(self.replicas.new(), train, val, datamodule=datamodule)
            finally:
                trainer.callbacks, trainer.num_sanity_val_steps = callbacks, sanity
                loop.epoch_loop.max_steps, loop.max_epochs = limits
            found = _returned(trainer)
            if "value" in found:
                break
        else:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not logged in validation, which logs "
                f"{', '.join(map(repr, start.logged)) or 'nothing'}; log it in validation_step, and leave "
                "limit_val_batches above 0."
            )
        if found["never"]:
            raise MisconfigurationException(
                "training would end before its first validation, whose metric is the value of a run; validate earlier, "
                "for instance by Trainer(val_check_interval=..., check_val_every_n_epoch=None), or train longer."
            )
        return found

    def _say(self, trainer: Any) -> None:
        """Log what a person needs to know of the runs on disk."""
        if self.ledger.first_version.exists():
            rank_zero_info(f"{self.ledger.first_version} is of an earlier version: its runs are not used; delete it.")
        if different := self.ledger.differences(self.shared) if trainer.is_global_zero else []:
            seed = "; call seed_everything before the module is made" if "initial weights" in different else ""
            rank_zero_info(
                f"the runs in {self.ledger.path} are not used: they have other {', '.join(different)}{seed}."
            )
        if not trainer.checkpoint_callbacks:
            rank_zero_info("enable_checkpointing=False: a run that is killed will begin again.")

    def _all(self, tasks: list[_Task]) -> list[Run]:
        """Do these runs, and wait for those that other processes do."""
        done: dict[int, Run] = {}
        while len(done) < len(tasks):
            before = len(done)
            for i, task in enumerate(tasks):
                if i not in done and (run := self._try(task)) is not None:
                    done[i] = run
                    gc.collect()  # modules and Trainers refer to each other, so that their memory is not freed before
            if len(done) == before:
                time.sleep(1)
        return [done[i] for i in range(len(tasks))]

    def _try(self, task: _Task) -> Run | None:
        """Return the recorded run, or train and record it; None if another process trains it.

        Raises:
            CorruptFile: If what is on disk is not what was written.
            RuntimeError: If one of several ranks runs out of memory.
        """
        trainer = self.trainers.peek(task.dim)
        limits = {name: repr(getattr(trainer, name)) for name in _TRAINER_SETTINGS}
        settings = {**self.shared, "Trainer": limits, "subspace": task.settings}
        entry = self.ledger.entry(task.kind, task.dim, task.seed, task.scale, settings)
        found: Any = None
        lock = None
        if trainer.is_global_zero and not trainer.fast_dev_run:
            try:
                found = entry.run()
                if found is None:
                    lock = entry.claim()
                    found = entry.run() or entry.checkpoint()
            except (Busy, CorruptFile, OSError) as error:
                found = error
        try:
            found = trainer.strategy.broadcast(found)  # errors as well, so that no rank waits for another one
            if isinstance(found, Busy):
                if entry.folder not in self.waits:
                    rank_zero_info(f"{task}: {found}")
                self.waits.add(entry.folder)
                return None
            if isinstance(found, Exception):
                raise found
            if isinstance(found, dict):
                run = found
            else:
                trainer = self.trainers.take(task.dim)
                run = self._fit(trainer, task, entry, found)
                failed = run["status"] == "out of memory"
                if not trainer.fast_dev_run and (trainer.is_global_zero or failed):
                    entry.record(run, self.monitor)
                if failed and trainer.world_size > 1:
                    raise RuntimeError(
                        f"rank {trainer.global_rank} of {trainer.world_size} ran out of memory at dim {task.dim}, and "
                        "the others may wait for it forever; the run is recorded, and skipped when the search is "
                        "started again."
                    )
        finally:
            if lock is not None:
                lock.release()
        earlier = f" at step {run['validated']}" if run["validated"] != run["steps"] else ""
        recorded = ", recorded before" if isinstance(found, dict) else ", resumed" if found else ""
        rank_zero_info(
            f"{task}: {self.monitor} {run['value']:.4g}{earlier}, {run['steps']} steps, {run['status']}{recorded}"
        )
        return run

    def _fit(self, trainer: Any, task: _Task, entry: Entry, checkpoint: str | None) -> Run:
        """Train a module, from a checkpoint of it if there is one, and return what is recorded of the run."""
        train, val, datamodule = self.data
        module, finder, dim, status = task.make(), task.finder, task.dim, "done"
        saves = bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run
        for callback in trainer.checkpoint_callbacks if not trainer.loggers else []:
            if getattr(callback, "dirpath", "") is None:  # without loggers all runs would share a folder
                callback.dirpath = str(entry.folder / "checkpoints")
        trainer.callbacks.append(_Validations(self.monitor, self.mode, entry if saves else None))
        if finder is not None:
            trainer.callbacks.insert(0, finder)
            if finder.max_steps is not None:
                train_for(trainer, finder.max_steps)
        name_run(trainer, f"dim {dim}", f"intrinsic dimension {self.replicas.fingerprint % (1 << 32):08x}")
        own = {"weights_only": False} if "weights_only" in signature(trainer.fit).parameters else {}
        with isolate_rng():  # does not restore the state if an error passes through it
            _seed(task.seed)
            try:
                trainer.fit(module, train, val, datamodule=datamodule, ckpt_path=checkpoint, **own)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                status = "out of memory"
        found = _returned(trainer)
        value = found.get("value", math.nan)
        if finder is not None and finder.history:  # the value at the mean of w, and the dim that it was measured at
            dim, value = int(finder.history[-1]["dim"]), finder.history[-1]["value"]
            status = "not reached" if finder.found is None and status == "done" else status
        elif status == "done" and "value" not in found:
            raise MisconfigurationException(
                f"{task} ended after {trainer.global_step} steps without a validation; set "
                "Trainer(val_check_interval=..., check_val_every_n_epoch=None)."
            )
        status = "nan" if math.isnan(value) and status != "out of memory" else status
        close_run(trainer, {"subspace/dim": float(dim), self.monitor: value})
        steps = int(found.get("steps", trainer.global_step))
        return {
            "kind": "fit" if finder is None else "search",
            "dim": dim,
            "seed": task.seed,
            "scale": task.scale,
            "value": value,
            "best": found.get("best", value),
            "validated": int(found.get("validated", steps)),
            "steps": steps,
            "status": status,
            "checkpoint": entry.checkpoint() if saves else None,
        }


class _Start(CallbackBase):
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
        _seed(0)
        data = [_contents(loaders) for loaders in (trainer.train_dataloader, trainer.val_dataloaders)]
        optimizer = _description(trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])
        hashes = {"data": content_hash(repr(data)), "optimizer": content_hash(optimizer)}
        _return(trainer, {**self.value, **hashes, "never": _never_validates(trainer, *self.limits)})


class _Validations(CheckpointBase):
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


class _ConstantRate(SubspaceModule):
    """Train without the module's schedulers, at the highest rate that they start from or rise to."""

    def configure_optimizers(self) -> Any:
        """Return the optimizers without their schedulers."""
        found = optimizers_in(super().configure_optimizers())
        for group in (group for optimizer in found for group in optimizer.param_groups):
            group["lr"] = max(group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr"))
        return found


def _seed(seed: int) -> None:
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)


def _mean(trainer: Any, monitor: str) -> float:
    """Return the mean of the metric over ranks, each of which logs its own; the finder uses the same mean."""
    metric, strategy = trainer.callback_metrics[monitor], trainer.strategy
    return float(strategy.reduce(metric.clone().to(strategy.root_device), reduce_op="mean"))


def _return(trainer: Any, values: Mapping[str, float | int]) -> None:
    """Put numbers where they come back even from a process that Lightning spawned for the fit."""
    trainer.callback_metrics.update({_KEY + name: torch.tensor(value) for name, value in values.items()})


def _returned(trainer: Any) -> dict[str, Any]:
    found = trainer.callback_metrics.items()
    return {name.removeprefix(_KEY): value.item() for name, value in found if name.startswith(_KEY)}


def _description(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> str:
    """Return the classes and options of optimizers, rates included, and of their schedulers."""
    options = [
        [type(optimizer).__qualname__, {k: v for k, v in group.items() if k not in ("params", "param_names")}]
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return repr([options, [[type(one).__qualname__, one.state_dict()] for one in schedulers]])


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
