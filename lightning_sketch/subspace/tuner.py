"""The intrinsic dimension of a task, by training in subspaces of several sizes."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.memory import is_oom_error
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from lightning_sketch._compat import LightningModule, Trainer, close_run, muted_loggers, name_run, train_for
from lightning_sketch.gradients import fingerprint
from lightning_sketch.params import Layout
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder
from lightning_sketch.subspace.ledger import Ledger, Run
from lightning_sketch.subspace.result import IntrinsicDimensionResult, reaches, target
from lightning_sketch.subspace.subspace_module import SubspaceModule
from lightning_sketch.subspace.trainers import Trainers

FILE = "intrinsic_dimension.json"
_METHODS = ("grid", "bisect", "doubling")


class IntrinsicDimensionTuner:
    """Finds how few numbers, along random directions, train a model almost as well as all its parameters do.

    Args:
        trainer_fn: dim -> a new Trainer with a new logger, for each run; or a dict of the Trainer's arguments, in
            which `logger` may be a function of dim, and callbacks are copied for each run.
        sketch: kind of the directions.
        parameters: which parameters may move, as in `SubspaceModule`.
        lr_scale: factor for the learning rate of the module's own optimizer in a subspace, where steps have to be
            longer than in full training.
        optimizer_fn: in place of the module's own optimizer, in subspaces.

    Raises:
        ValueError: by `find`, before training: if an argument is out of its range; if no parameter matches.
        MisconfigurationException: by `find`, before training: if `trainer_fn` gives the same Trainer or logger twice;
            if `monitor` is not logged in validation.

    Example::

        tuner = IntrinsicDimensionTuner({"max_epochs": 10})
        result = tuner.find(module, datamodule=data, monitor="val_acc")
        result.suggestion()
        result.plot()
    """

    def __init__(
        self,
        trainer_fn: Callable[[int], Any] | dict[str, Any],
        sketch: str = "block_srht",
        parameters: str | Sequence[str] = "*",
        lr_scale: float | int = 10.0,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
    ):
        self.trainer_fn, self.sketch, self.parameters = trainer_fn, sketch, parameters
        self.lr_scale, self.optimizer_fn = float(lr_scale), optimizer_fn

    def find(
        self,
        model: LightningModule | Callable[[], LightningModule],
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        dims: Sequence[int] | None = None,
        monitor: str = "val_loss",
        mode: str = "max",
        threshold: float | int = 0.9,
        seeds: int = 1,
        method: str = "grid",
        baseline: float | int | None = None,
    ) -> IntrinsicDimensionResult:
        """Train in full, unless `baseline` is given, then in subspaces; all runs start from the same weights.

        A run that is done is noted in `intrinsic_dimension.json` beside the logs, and not done again by a search with
        the same settings. One that gives no number, or runs out of memory, is noted as such, and the search goes on.
        Each run's logger gets `subspace/dim` and the metric at its end; W&B runs get a group in common.

        Args:
            model: copied for each run; or a function that makes one.
            train_dataloaders: as in `Trainer.fit`.
            val_dataloaders: as in `Trainer.fit`.
            datamodule: as in `Trainer.fit`.
            dims: to try. None is 8, 16, 32, ... and n; then "grid" ends at the first that is large enough.
            monitor: a metric that `validation_step` logs. The value of a run is its last one.
            mode: "max" if larger is better, "min" if smaller is.
            threshold: part of what full training gains, in (0, 1].
            seeds: number of runs for each dimension, each with its own directions and order of the data.
            method: "grid" tries all dims; "bisect" takes for granted that more is better; "doubling" doubles the
                dimension within one run of at most twice the steps of full training, at a constant rate, see
                `IntrinsicDimensionFinder`, and verifies what it finds by a run at half of it.
            baseline: the metric after full training, to spare that run.
        """
        search = _Search(self, model, (train_dataloaders, val_dataloaders, datamodule), monitor, mode)
        return search.find(dims, threshold, seeds, method, baseline)


class _Search:
    """One call of `find`."""

    def __init__(self, tuner: IntrinsicDimensionTuner, model: Any, data: tuple, monitor: str, mode: str):
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} is not known; use 'max' or 'min'.")
        self.tuner, self.data, self.monitor, self.mode = tuner, data, monitor, mode
        self.first = model if isinstance(model, LightningModule) else model()
        self.make = (lambda: copy.deepcopy(self.first)) if self.first is model else self._made_by(model)
        self.n = Layout.of(self.first, tuner.parameters).n
        self.theta0 = fingerprint(list(self.first.parameters()))

    def find(
        self, dims: Sequence[int] | None, threshold: float | int, seeds: int, method: str, baseline: float | int | None
    ) -> IntrinsicDimensionResult:
        ladder = self._checked(dims, threshold, seeds, method)
        self.trainers = Trainers(self.tuner.trainer_fn, self.first)
        self.trainers.check([self.n, ladder[0]])
        self.ledger = Ledger(self.trainers.folder(self.n) / FILE)
        self.start = self._start(self.trainers.peek(self.n))
        rank_zero_info(
            f"intrinsic dimension of {self.n:,} parameters: the module's learning rate x {self.tuner.lr_scale:g} in "
            f"subspaces; runs are noted in {self.ledger.path}"
        )
        full = self._full() if baseline is None else None
        baseline = full["value"] if full else float(baseline)
        if not math.isfinite(baseline):
            raise MisconfigurationException(f"full training gives {self.monitor} = {baseline}; mend that first.")
        self.target = target(self.mode, float(threshold), baseline, self.start)
        if method == "doubling":
            runs = [run for seed in range(seeds) for run in self._double(ladder, seed, full, baseline)]
        else:
            runs = list((self._bisect if method == "bisect" else self._grid)(ladder, seeds, dims is None))
        results = {key: [run[key] for run in runs] for key in ("dim", "seed", "value", "steps", "status")}
        return IntrinsicDimensionResult(
            results, self.monitor, self.mode, float(threshold), self.n, baseline, self.start
        )

    def _checked(self, dims: Sequence[int] | None, threshold: float | int, seeds: int, method: str) -> list[int]:
        if method not in _METHODS:
            raise ValueError(f"method={method!r} is not known; use {', '.join(map(repr, _METHODS))}.")
        if not 0 < threshold <= 1:
            raise ValueError(f"need a threshold in (0, 1], got {threshold}; 0.9 is usual.")
        if seeds < 1:
            raise ValueError(f"need seeds >= 1, got {seeds}.")
        if dims is None:
            powers = [1 << k for k in range(3, self.n.bit_length()) if 1 << k < self.n]
            return powers if method == "doubling" else [*powers, self.n]
        wrong = [dim for dim in dims if not 0 < dim <= self.n]
        if wrong or not dims:
            raise ValueError(f"need dims from 1 to n={self.n}, got {wrong or 'none'}.")
        return sorted(set(dims))

    def _made_by(self, model: Callable[[], LightningModule]) -> Callable[[], LightningModule]:
        def make() -> LightningModule:
            made = model()
            made.load_state_dict(self.first.state_dict())
            return made

        return make

    def _start(self, trainer: Trainer) -> float:
        """The metric before training, which shows as well whether it is logged."""
        _, val, datamodule = self.data
        with isolate_rng(), muted_loggers(trainer):
            trainer.validate(self.make(), val, datamodule=datamodule, verbose=False)
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not logged in validation, which logs "
                f"{', '.join(map(repr, trainer.callback_metrics)) or 'nothing'}; log it in validation_step."
            )
        return _value(trainer, self.monitor)

    def _full(self) -> Run:
        return self._run(self.n, 0, {"full": True}, lambda: self.make())

    def _grid(self, ladder: list[int], seeds: int, until_reached: bool) -> Iterator[Run]:
        for dim in ladder:
            runs = self._at(dim, seeds)
            yield from runs
            if until_reached and self._reached(runs):
                return

    def _bisect(self, ladder: list[int], seeds: int, _: bool) -> Iterator[Run]:
        low, high = 0, len(ladder)
        while low < high:
            middle = (low + high) // 2
            runs = self._at(ladder[middle], seeds)
            yield from runs
            low, high = (low, middle) if self._reached(runs) else (middle + 1, high)

    def _double(self, ladder: list[int], seed: int, full: Run | None, baseline: float) -> Iterator[Run]:
        steps = full["steps"] if full else None
        finder = IntrinsicDimensionFinder(
            self.monitor,
            self.target,
            self.mode,
            delta=abs(baseline - self.start) / 20,
            every_n_train_steps=max(1, steps // 8) if steps else 100,
            max_steps=2 * steps if steps else None,
        )
        found = self._run(
            ladder[-1],
            seed,
            {**self._directions(), "from": ladder[0], "target": self.target, "delta": finder.delta},
            lambda: self._module(ladder[0], seed, max_dim=ladder[-1], constant=True),
            finder,
        )
        yield found
        if found["status"] == "done" and found["dim"] // 2 >= 1:
            yield self._subspace(found["dim"] // 2, seed)

    def _at(self, dim: int, seeds: int) -> list[Run]:
        return [self._subspace(dim, seed) for seed in range(seeds)]

    def _reached(self, runs: list[Run]) -> bool:
        mean = sum(run["value"] for run in runs) / len(runs)
        return reaches(mean, self.target, self.mode)

    def _subspace(self, dim: int, seed: int) -> Run:
        return self._run(dim, seed, self._directions(), lambda: self._module(dim, seed))

    def _module(self, dim: int, seed: int, max_dim: int | None = None, constant: bool = False) -> SubspaceModule:
        tuner = self.tuner
        return (ConstantRate if constant else SubspaceModule)(
            self.make(),
            dim,
            tuner.sketch,
            seed,
            tuner.parameters,
            max_dim,
            lr_scale=tuner.lr_scale,
            optimizer_fn=tuner.optimizer_fn,
        )

    def _run(
        self,
        dim: int,
        seed: int,
        extra: dict[str, Any],
        make: Callable[[], LightningModule],
        finder: IntrinsicDimensionFinder | None = None,
    ) -> Run:
        """One fit, or what is noted of it."""
        trainer = self.trainers.peek(dim)
        settings = {**self._settings(trainer), "dim": dim, "seed": seed, **extra}
        run = self.ledger.find(settings)
        noted = ", as noted before" if run else ""
        if run is None:
            trainer = self.trainers.take(dim)
            run = self._fit(trainer, make(), dim, seed, finder)
            self.ledger.add(settings, run, trainer.is_global_zero)
        what = "full training" if extra.get("full") else f"dim {run['dim']}"
        rank_zero_info(
            f"{what}, seed {seed}: {self.monitor} {run['value']:.4g}, {run['steps']} steps, {run['status']}{noted}"
        )
        return run

    def _fit(
        self,
        trainer: Trainer,
        module: LightningModule,
        dim: int,
        seed: int,
        finder: IntrinsicDimensionFinder | None,
    ) -> Run:
        train, val, datamodule = self.data
        if finder is not None:
            trainer.callbacks.insert(0, finder)
            if finder.max_steps is not None:
                train_for(trainer, finder.max_steps)
        name_run(trainer, f"dim {dim}", f"intrinsic dimension {self.theta0 % (1 << 32):08x}")
        value, status = math.nan, "done"
        try:
            with isolate_rng():
                for seeded in (random.seed, np.random.seed, torch.manual_seed):
                    seeded(seed)
                trainer.fit(module, train, val, datamodule=datamodule)
                if self.monitor not in trainer.callback_metrics:  # it ended before the first validation
                    trainer.validate(module, val, datamodule=datamodule, verbose=False)
            value = _value(trainer, self.monitor)
            status = "nan" if math.isnan(value) else "done"
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or is_oom_error(error)):
                raise
            status = "out of memory"
        if finder is not None:
            dim, status = (finder.found, status) if finder.found else (module.directions.dim, "not reached")
        close_run(trainer, {"subspace/dim": float(dim), self.monitor: value})
        return {"dim": dim, "seed": seed, "value": value, "steps": trainer.global_step, "status": status}

    def _settings(self, trainer: Trainer) -> dict[str, Any]:
        """What any two runs must have in common to be one."""
        return {
            "module": f"{type(self.first).__name__} {dict(self.first.hparams)}",
            "theta0": self.theta0,
            "monitor": self.monitor,
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
        }

    def _directions(self) -> dict[str, Any]:
        """And runs in a subspace."""
        tuner = self.tuner
        return {"sketch": tuner.sketch, "parameters": tuner.parameters, "lr_scale": tuner.lr_scale}


class ConstantRate(SubspaceModule):
    """Without the module's schedulers, at the rate that they start from or rise to."""

    def configure_optimizers(self) -> Any:
        """The optimizer alone."""
        super().configure_optimizers()
        optimizer = self._recipe.optimizer
        for group in optimizer.param_groups:
            group["lr"] = max(group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr"))
        return optimizer


def _value(trainer: Trainer, monitor: str) -> float:
    """The same on all ranks."""
    if monitor not in trainer.callback_metrics:
        raise MisconfigurationException(f"{monitor!r} was not logged; there are {', '.join(trainer.callback_metrics)}.")
    return trainer.strategy.broadcast(float(trainer.callback_metrics[monitor]))
