"""The training runs of a search, one after the other, all from the same weights, each done once."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.seed import isolate_rng

from lightning_sketch._lightning import (
    CallbackBase,
    LightningModule,
    Trainer,
    close_run,
    muted_loggers,
    name_run,
    train_for,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.memory import is_out_of_memory
from lightning_sketch.subspace._ledger import Ledger, Run
from lightning_sketch.subspace._optimizer import optimizers_in
from lightning_sketch.subspace._replicas import Replicas, refuse_different_starts
from lightning_sketch.subspace._trainers import Trainers
from lightning_sketch.subspace._weights import Weights
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.result import Mode, reaches
from lightning_sketch.subspace.subspace_module import SubspaceModule

FILE = "intrinsic_dimension.json"
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


class Runner:
    """Train replicas of a model: in full, in a subspace, or during a doubling search.

    Args:
        trainer_fn: The argument of `IntrinsicDimensionTuner`.
        options: Arguments of `SubspaceModule`: sketch, parameters, others, optimizer_fn.
        model: A module, or a function that makes one, which may be compiled.
        data: The train loaders, the validation loaders, and the data module, each or None.
        monitor: The metric whose last value is the value of a run.
        mode: "max" if larger values of it are better, "min" if smaller ones are.

    Raises:
        TypeError: If `model` is neither, or is a compiled module.
    """

    def __init__(
        self,
        trainer_fn: Callable[[int], Trainer] | dict[str, Any],
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

    def begin(self, dim: int) -> float:
        """Make the first two Trainers, read the recorded runs, and return the metric before training.

        Args:
            dim: The dimension of the first run in a subspace.

        Raises:
            MisconfigurationException: If the Trainers cannot be used, the metric is not logged, or the ranks start from
                different weights.
        """
        self.trainers.make([self.n, dim])
        self.ledger = Ledger(self.trainers.folder(self.n) / FILE)
        trainer = self.trainers.peek(self.n)
        with isolate_rng():
            self._validate(trainer, self.replicas.new())
        refuse_different_starts(trainer, self.replicas.fingerprint)
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not logged in validation, which logs "
                f"{', '.join(map(repr, trainer.callback_metrics)) or 'nothing'}; log it in validation_step, and leave "
                "limit_val_batches above 0."
            )
        return self._value(trainer)

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
        settings = {"full": True, **{key: self.options.get(key) for key in ("parameters", "others", "head")}}
        return self._once(self.n, 0, 1.0, settings, self._whole)

    def fit_subspace(self, dim: int, seed: int, scale: float) -> Run:
        """Train in a `dim`-dimensional subspace, with directions multiplied by `scale`."""
        return self._once(
            dim,
            seed,
            scale,
            self._option_settings(),
            lambda: SubspaceModule(self.replicas.new(), dim, seed=seed, scale=scale, **self.options),
        )

    def search(self, finder: IntrinsicDimensionFinder, dim: int, max_dim: int, seed: int, scale: float) -> Run:
        """Run a doubling search from `dim` to `max_dim` at a constant learning rate."""
        return self._once(
            max_dim,
            seed,
            scale,
            {
                **self._option_settings(),
                "from": dim,
                "rule": [finder.target, finder.delta, finder.every_n_train_steps, finder.max_steps],
            },
            lambda: _ConstantRate(self.replicas.new(), dim, seed=seed, max_dim=max_dim, scale=scale, **self.options),
            finder,
        )

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

    def _validate(self, trainer: Any, module: LightningModule) -> None:
        """Validate without callbacks; if the metric is then missing, retry with all but checkpoint callbacks.

        Checkpoint callbacks are left out since they would determine their folder in this validation.
        """
        _, val, datamodule = self.data
        callbacks, saving = trainer.callbacks, trainer.checkpoint_callbacks
        try:
            for present in ([], [callback for callback in callbacks if callback not in saving]):
                trainer.callbacks = present
                with muted_loggers(trainer):
                    trainer.validate(module, val, datamodule=datamodule, verbose=False)
                if self.monitor in trainer.callback_metrics:
                    break
        finally:
            trainer.callbacks = callbacks

    def _shape_of_data(self) -> str:
        """Return the number of batches and the batch size of each loader; those of a data module are not known."""
        loaders = [loader for loader in self.data[:2] if loader is not None]
        return repr([(sized_len(loader), getattr(loader, "batch_size", None)) for loader in loaders])

    def _option_settings(self) -> dict[str, Any]:
        """Return the options that identify a run: all but the function."""
        return {key: value for key, value in self.options.items() if key != "optimizer_fn"}

    def _once(
        self,
        dim: int,
        seed: int,
        scale: float,
        more: dict[str, Any],
        make: Callable[[], LightningModule],
        finder: IntrinsicDimensionFinder | None = None,
    ) -> Run:
        """Return the recorded run with these settings; if there is none, train, and record it.

        Args:
            dim: The dimension for which a Trainer is made.
            seed: The seed of the run.
            scale: The factor of the directions.
            more: Further settings that identify the run.
            make: Makes the module to be trained.
            finder: The callback of a doubling search.

        Raises:
            RuntimeError: If one of several ranks runs out of memory.
        """
        trainer: Any = self.trainers.peek(dim)  # Any: Lightning's annotations lack `fast_dev_run`
        settings = {
            "module": self.replicas.name,
            "theta0": self.replicas.fingerprint,
            "monitor": self.monitor,
            **{name: repr(getattr(trainer, name)) for name in _TRAINER_SETTINGS},
            "data": self._shape_of_data(),
            "dim": dim,
            "seed": seed,
            "scale": scale,
            **more,
        }
        found = None if trainer.fast_dev_run else self.ledger.find(settings)
        run, source = trainer.strategy.broadcast(found), ", recorded before"
        if run is None:
            trainer, source = self.trainers.take(dim), ""
            run = self._fit(trainer, make(), dim, seed, scale, finder)
            failed = run["status"] == "out of memory"
            if not trainer.fast_dev_run:
                self.ledger.add(settings, run, trainer.is_global_zero or failed)
            if failed and trainer.world_size > 1:
                raise RuntimeError(
                    f"rank {trainer.global_rank} of {trainer.world_size} ran out of memory at dim {dim}, and the "
                    "others may wait for it forever; the run is recorded, and skipped when the search is started again."
                )
        name = "full training" if more.get("full") else f"dim {run['dim']}, rate {scale:g}"
        rank_zero_info(
            f"{name}, seed {seed}: {self.monitor} {run['value']:.4g}, {run['steps']} steps, {run['status']}{source}"
        )
        return run

    def _fit(
        self,
        trainer: Any,
        module: LightningModule,
        dim: int,
        seed: int,
        scale: float,
        finder: IntrinsicDimensionFinder | None,
    ) -> Run:
        """Train a module with this seed, and return what is recorded of the run."""
        train, val, datamodule = self.data
        last = _Validations(self)
        trainer.callbacks.append(last)
        if finder is not None:
            trainer.callbacks.insert(0, finder)
            if finder.max_steps is not None:
                train_for(trainer, finder.max_steps)
        name_run(trainer, f"dim {dim}", f"intrinsic dimension {self.replicas.fingerprint % (1 << 32):08x}")
        status = "done"
        with isolate_rng():  # does not restore the state if an error passes through, so errors are caught inside
            for set_seed in (random.seed, np.random.seed, torch.manual_seed):
                set_seed(seed)
            try:
                trainer.fit(module, train, val, datamodule=datamodule)
                if last.step != trainer.global_step:
                    self._validate(trainer, module)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                status = "out of memory"
        value = self._value(trainer) if status == "done" else math.nan
        if finder is not None and finder.history:  # the value at the mean of w, and the dim that it was measured at
            dim, value = int(finder.history[-1]["dim"]), finder.history[-1]["value"]
            status = "not reached" if finder.found is None and status == "done" else status
        status = "nan" if math.isnan(value) and status != "out of memory" else status
        close_run(trainer, {"subspace/dim": float(dim), self.monitor: value})
        return {
            "kind": "fit" if finder is None else "search",
            "dim": dim,
            "seed": seed,
            "scale": scale,
            "value": value,
            "best": last.best,
            "steps": trainer.global_step,
            "status": status,
            "checkpoint": None,
        }

    def _value(self, trainer: Trainer) -> float:
        """Return the mean of the metric over ranks, each of which logs its own; the finder uses the same mean."""
        metric, strategy = trainer.callback_metrics[self.monitor], trainer.strategy
        return float(strategy.reduce(metric.clone().to(strategy.root_device), reduce_op="mean"))


class _Validations(CallbackBase):
    """Remember the optimizer step at which validation ran last, and the best value of the metric so far."""

    def __init__(self, runner: Runner):
        self.runner, self.step, self.best = runner, -1, math.nan

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step and the value, unless this is Lightning's sanity check."""
        if not trainer.sanity_checking:
            self.step, value = trainer.global_step, self.runner._value(trainer)
            if math.isnan(self.best) or reaches(value, self.best, self.runner.mode):
                self.best = value


class _ConstantRate(SubspaceModule):
    """Train without the module's schedulers, at the highest rate that they start from or rise to."""

    def configure_optimizers(self) -> Any:
        """Return the optimizers without their schedulers."""
        found = optimizers_in(super().configure_optimizers())
        for group in (group for optimizer in found for group in optimizer.param_groups):
            group["lr"] = max(group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr"))
        return found
