"""One training run after the other: in full, in a subspace, or searching; each from the same weights, each once."""

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
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.subspace_module import SubspaceModule

FILE = "intrinsic_dimension.json"
_LENGTH_AND_STEP = (
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
    """Trains copies of a model.

    Args:
        trainer_fn: as of `IntrinsicDimensionTuner`.
        options: of `SubspaceModule`: sketch, parameters, others, lr_scale, optimizer_fn.
        model: a module, or a function that makes one, which may be compiled.
        data: train and validation loaders, and data module, each or None.
        monitor: the metric that a run is worth.

    Raises:
        TypeError: if `model` is neither, or a module that is compiled.
    """

    def __init__(
        self,
        trainer_fn: Callable[[int], Trainer] | dict[str, Any],
        options: dict[str, Any],
        model: LightningModule | Callable[[], LightningModule],
        data: tuple[Any, Any, Any],
        monitor: str,
    ):
        self.options, self.data, self.monitor = options, data, monitor
        self.copies = Replicas(model)
        self.n = Layout.of(self.copies.first, options["parameters"]).n
        self.trainers = Trainers(trainer_fn, self.copies.first)

    def begin(self, dim: int) -> float:
        """Make the first two Trainers and read what is noted; the metric before training.

        Raises:
            MisconfigurationException: if the Trainers cannot be used, the metric is not logged, or ranks differ.
        """
        self.trainers.check([self.n, dim])
        self.ledger = Ledger(self.trainers.folder(self.n) / FILE)
        trainer = self.trainers.peek(self.n)
        with isolate_rng():
            self._validate(trainer, self.copies.one())
        refuse_different_starts(trainer, self.copies.fingerprint)
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not logged in validation, which logs "
                f"{', '.join(map(repr, trainer.callback_metrics)) or 'nothing'}; log it in validation_step, and leave "
                "limit_val_batches above 0."
            )
        return self._value(trainer)

    def length(self) -> int:
        """Optimizer steps of a run, as far as the Trainer says so.

        Raises:
            MisconfigurationException: if it does not.
        """
        steps = self.trainers.peek(self.n).max_steps
        if steps < 1:
            raise MisconfigurationException(
                "method='doubling' takes up to twice the steps of full training, which is not run where baseline is "
                "given; say how many those are: Trainer(max_steps=...)."
            )
        return steps

    def full(self) -> Run:
        """Of the parameters that subspaces are of, and of the others if these are trained there too."""
        told = {"full": True, "parameters": self.options["parameters"], "others": self.options["others"]}
        return self._once(self.n, 0, told, self._whole)

    def at(self, dim: int, seed: int) -> Run:
        """As many directions."""
        return self._once(
            dim, seed, self._told(), lambda: SubspaceModule(self.copies.one(), dim, seed=seed, **self.options)
        )

    def search(self, finder: IntrinsicDimensionFinder, dim: int, max_dim: int, seed: int) -> Run:
        """From so many directions to so many, at a constant rate."""
        return self._once(
            max_dim,
            seed,
            {
                **self._told(),
                "from": dim,
                "rule": [finder.target, finder.delta, finder.every_n_train_steps, finder.max_steps],
            },
            lambda: ConstantRate(self.copies.one(), dim, seed=seed, max_dim=max_dim, **self.options),
            finder,
        )

    def _whole(self) -> LightningModule:
        """The model; frozen where subspaces are."""
        model = self.copies.one()
        moving = {id(p) for p in Layout.of(model, self.options["parameters"]).parameters(model)}
        for parameter in model.parameters():
            if self.options["others"] == "frozen" and id(parameter) not in moving:
                parameter.requires_grad_(False)
        return model

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        """With nobody looking on, unless it is a callback that logs the metric.

        Never with one that saves checkpoints, which would settle for a folder.
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
        """Numbers of batches and of examples in one, of loaders that are given; what a data module has is not known."""
        loaders = [loader for loader in self.data[:2] if loader is not None]
        return repr([(sized_len(loader), getattr(loader, "batch_size", None)) for loader in loaders])

    def _told(self) -> dict[str, Any]:
        """The options, without functions."""
        return {key: value for key, value in self.options.items() if key != "optimizer_fn"}

    def _once(
        self,
        dim: int,
        seed: int,
        told: dict[str, Any],
        make: Callable[[], LightningModule],
        finder: IntrinsicDimensionFinder | None = None,
    ) -> Run:
        """A fit, or what is noted of one with the same settings."""
        trainer = self.trainers.peek(dim)
        settings = {
            "module": self.copies.name,
            "theta0": self.copies.fingerprint,
            "monitor": self.monitor,
            **{name: repr(getattr(trainer, name)) for name in _LENGTH_AND_STEP},
            "data": self._shape_of_data(),
            "dim": dim,
            "seed": seed,
            **told,
        }
        found = None if trainer.fast_dev_run else self.ledger.find(settings)
        run, noted = trainer.strategy.broadcast(found), ", as noted before"
        if run is None:
            trainer, noted = self.trainers.take(dim), ""
            run = self._fit(trainer, make(), dim, seed, finder)
            failed = run["status"] == "out of memory"
            if not trainer.fast_dev_run:
                self.ledger.add(settings, run, trainer.is_global_zero or failed)
            if failed and trainer.world_size > 1:
                raise RuntimeError(
                    f"rank {trainer.global_rank} of {trainer.world_size} ran out of memory at dim {dim}, and the "
                    "others may wait for it for ever; the run is noted, and left out when the search is started again."
                )
        what = "full training" if told.get("full") else f"dim {run['dim']}"
        rank_zero_info(
            f"{what}, seed {seed}: {self.monitor} {run['value']:.4g}, {run['steps']} steps, {run['status']}{noted}"
        )
        return run

    def _fit(
        self, trainer: Trainer, module: LightningModule, dim: int, seed: int, finder: IntrinsicDimensionFinder | None
    ) -> Run:
        train, val, datamodule = self.data
        validated = LastValidation()
        trainer.callbacks.append(validated)
        if finder is not None:
            trainer.callbacks.insert(0, finder)
            if finder.max_steps is not None:
                train_for(trainer, finder.max_steps)
        name_run(trainer, f"dim {dim}", f"intrinsic dimension {self.copies.fingerprint % (1 << 32):08x}")
        status = "done"
        with isolate_rng():  # puts nothing back if an error goes through it
            for seeded in (random.seed, np.random.seed, torch.manual_seed):
                seeded(seed)
            try:
                trainer.fit(module, train, val, datamodule=datamodule)
                if validated.step != trainer.global_step:
                    self._validate(trainer, module)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                status = "out of memory"
        value = self._value(trainer) if status == "done" else math.nan
        if finder is not None and finder.history:  # of the mean of w, at the dimension that it was taken at
            dim, value = finder.history[-1]["dim"], finder.history[-1]["value"]
            status = "not reached" if finder.found is None and status == "done" else status
        status = "nan" if math.isnan(value) and status != "out of memory" else status
        close_run(trainer, {"subspace/dim": float(dim), self.monitor: value})
        return {
            "kind": "fit" if finder is None else "search",
            "dim": dim,
            "seed": seed,
            "value": value,
            "steps": trainer.global_step,
            "status": status,
        }

    def _value(self, trainer: Trainer) -> float:
        """The mean over ranks, which log what they see: by it the Finder decides too."""
        metric, strategy = trainer.callback_metrics[self.monitor], trainer.strategy
        return float(strategy.reduce(metric.clone().to(strategy.root_device), reduce_op="mean"))


class LastValidation(CallbackBase):
    """Remembers the optimizer step at which validation ran."""

    step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of training, not of the sanity check."""
        if not trainer.sanity_checking:
            self.step = trainer.global_step


class ConstantRate(SubspaceModule):
    """Without the module's schedulers, at the rate that they start from or rise to."""

    def configure_optimizers(self) -> Any:
        """The optimizer alone."""
        found = optimizers_in(super().configure_optimizers())
        for group in (group for optimizer in found for group in optimizer.param_groups):
            group["lr"] = max(group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr"))
        return found
