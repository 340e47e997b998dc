"""The training runs of a search, all from the same weights, each done once."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.seed import isolate_rng

from lightning_sketch._files import Busy, CorruptFile
from lightning_sketch._lightning import (
    LightningModule,
    Trainer,
    close_run,
    muted_loggers,
    name_run,
    train_for,
    without_summary,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.memory import is_out_of_memory
from lightning_sketch.autodiff.preserve_state import interrupts_held_back
from lightning_sketch.subspace._ledger import Entry, Ledger, Run, hashed
from lightning_sketch.subspace._optimizer import optimizers_in
from lightning_sketch.subspace._replicas import Replicas, refuse_different_starts
from lightning_sketch.subspace._run_callbacks import Start, Validations, description, returned, set_seeds
from lightning_sketch.subspace._trainers import Trainers
from lightning_sketch.subspace._weights import Weights
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.result import Mode
from lightning_sketch.subspace.subspace_module import SubspaceModule

_TRAINER_SETTINGS = (
    "max_steps",
    "max_epochs",
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_devices",
    "num_nodes",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
)
_ONLY_IN_SUBSPACES = ("sketch", "structure", "lr_scale", "optimizer_fn")  # options


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
        self.fitted = False

    def begin(self, dim: int) -> float:
        """Make the first Trainers, and return the metric before training, from a fit of no steps.

        Args:
            dim: The dimension of the first run in a subspace.

        Raises:
            MisconfigurationException: If the Trainers cannot be used, the metric is not logged, training would end
                before its first validation, or the ranks start from different weights.
        """
        first = self.trainers.take(self.n)
        following = [self.trainers.peek(self.n), self.trainers.peek(dim)]
        self.ledger = Ledger(self.trainers.folder(self.n))
        start = self._start(first)
        refuse_different_starts(first, self.replicas.fingerprint)
        settings = {
            "initial weights": self.replicas.fingerprint,
            "class and hyper-parameters": self.replicas.name,
            "optimizer": start["optimizer"],
            "data": start["data"],
            "metric": [self.monitor, self.mode],
        }
        self.shared = first.strategy.broadcast(hashed(settings))
        self.compared = {**self.options, "optimizer_fn": self._optimizer_of_ones_own(dim)}
        if self.ledger.first_version.exists():
            rank_zero_info(f"{self.ledger.first_version} is of an earlier version: its runs are not used; delete it.")
        if different := self.ledger.differences(self.shared):
            seed = "; call seed_everything before the module is made" if "initial weights" in different else ""
            rank_zero_info(
                f"the runs in {self.ledger.path} are not used: they have other {', '.join(different)}{seed}."
            )
        if not all(trainer.checkpoint_callbacks for trainer in following):
            rank_zero_info("enable_checkpointing=False: a run that is killed will begin again.")
        return start["value"]

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

            return _Task("fit", dim, seed, float(scale), self.compared, make)

        return self._all([task(*one) for one in several])

    def search(self, finder: IntrinsicDimensionFinder, dim: int, max_dim: int, seed: int, scale: float) -> Run:
        """Run a doubling search from `dim` to `max_dim` at a constant learning rate."""

        def make() -> LightningModule:
            options = {"seed": seed, "max_dim": max_dim, "scale": scale, **self.options}
            return _ConstantRate(self.replicas.new(), dim, **options)

        rule = [dim, finder.target, finder.delta, finder.every_n_train_steps, finder.max_steps]
        settings = {**self.compared, "rule": rule}
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

    def _optimizer_of_ones_own(self, dim: int) -> str | None:
        """Return what identifies the optimizer of `optimizer_fn`, which is called for a module that is not trained."""
        if self.options["optimizer_fn"] is None:
            return None
        with isolate_rng():
            configured = SubspaceModule(self.replicas.new(), dim, **self.options).configure_optimizers()
        return description(optimizers_in(configured), [])

    def _start(self, trainer: Any) -> dict[str, Any]:
        """Return the metric before training, and hashes of the data and of the optimizer, from a fit of no steps.

        It has no callbacks; if the metric is then missing, it is repeated with all but checkpoint callbacks, which
        would determine their folder in this fit.
        """
        train, val, datamodule = self.data
        for once_more in (False, True):
            if once_more:
                trainer = self.trainers.take(self.n)
            start, saving = Start(self.monitor), trainer.checkpoint_callbacks
            kept = [callback for callback in trainer.callbacks if once_more and callback not in saving]
            trainer.callbacks, trainer.num_sanity_val_steps = [*kept, start], math.inf
            with isolate_rng(), muted_loggers(trainer):
                set_seeds(0)
                trainer.fit(self.replicas.new(), train, val, datamodule=datamodule)
            found = returned(trainer)
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

    def _all(self, tasks: list[_Task]) -> list[Run]:
        """Do these runs, and wait for those that other processes do."""
        done: dict[int, Run] = {}
        while len(done) < len(tasks):
            before = len(done)
            for i, task in enumerate(tasks):
                if i not in done and (run := self._try(task)) is not None:
                    done[i] = run
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
            if isinstance(found, str) and not _all_ranks_see(found, trainer):
                rank_zero_info(f"{task} begins again: not all machines see {found}.")
                found = None
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
        with interrupts_held_back:  # Python ignores errors in what it calls while it collects
            gc.collect()  # those of the run before refer to each other, so that their memory is not freed by itself
        train, val, datamodule = self.data
        module, finder, dim, status = task.make(), task.finder, task.dim, "done"
        if self.fitted:
            without_summary(trainer)
        self.fitted = True
        saves = bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run
        for callback in trainer.checkpoint_callbacks if not trainer.loggers else []:
            if getattr(callback, "dirpath", "") is None:  # without loggers all runs would share a folder
                callback.dirpath = str(entry.folder / "checkpoints")
        trainer.callbacks.append(Validations(self.monitor, self.mode, entry if saves else None))
        if finder is not None:
            trainer.callbacks.insert(0, finder)
            if finder.max_steps is not None:
                train_for(trainer, finder.max_steps)
        name_run(trainer, f"dim {dim}", f"intrinsic dimension {self.replicas.fingerprint % (1 << 32):08x}")
        own = {"weights_only": False} if "weights_only" in signature(trainer.fit).parameters else {}
        with isolate_rng():  # does not restore the state if an error passes through it
            set_seeds(task.seed)
            try:
                trainer.fit(module, train, val, datamodule=datamodule, ckpt_path=checkpoint, **own)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                status = "out of memory"
        found = returned(trainer)
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


class _ConstantRate(SubspaceModule):
    """Train without the module's schedulers, at the highest rate that they start from or rise to."""

    def configure_optimizers(self) -> Any:
        """Return the optimizers without their schedulers."""
        found = optimizers_in(super().configure_optimizers())
        for group in (group for optimizer in found for group in optimizer.param_groups):
            group["lr"] = max(group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr"))
        return found


def _all_ranks_see(path: str, trainer: Any) -> bool:
    seen = torch.tensor(float(Path(path).exists()), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(seen, reduce_op="mean")) == 1
