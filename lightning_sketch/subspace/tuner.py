"""The search for the intrinsic dimension of a task, by training in subspaces of several dimensions."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from typing import Any, Literal, get_args

from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sketch._lightning import LightningModule
from lightning_sketch.subspace._ledger import Run
from lightning_sketch.subspace._runner import Runner
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder, refuse_spawning
from lightning_sketch.subspace.result import IntrinsicDimensionResult, Mode, reaches, target
from lightning_sketch.subspace.subspace_module import Others

Method = Literal["grid", "bisect", "doubling"]


class IntrinsicDimensionTuner:
    """Find how few numbers, along random directions, train a model almost as well as all its parameters do.

    Args:
        trainer_fn: A function from dim to a new Trainer with a new logger, called for each run; or a dict of the
            Trainer's arguments, in which `logger` may be a function of dim, and callbacks, strategy, plugins and
            profiler are copied for each run.
        sketch: The kind of sketch whose rows are the directions.
        parameters: A pattern of the names of the parameters to search in, as in `SubspaceModule`; full training trains
            the same ones.
        others: What is done with the other trainable parameters, as in `SubspaceModule`: "frozen" or "full"; full
            training does the same.
        lr_scale: The factor for the learning rate of the module's own optimizer in a subspace, where steps have to be
            longer than in full training.
        optimizer_fn: Makes the optimizer in subspaces, in place of the module's own, as in `SubspaceModule`.

    Raises:
        ValueError: By `find`, before training: if an argument is out of its range; if no parameter matches.
        MisconfigurationException: By `find`, before training: if `trainer_fn` returns the same Trainer or logger twice;
            if `monitor` is not logged in validation; for "doubling" with a `baseline` but without max_steps, or if fit
            runs in spawned processes (`ddp_spawn` and similar).
        TypeError: By `find`, before training: if `model` is neither a module nor a function that makes one.

    Example::

        tuner = IntrinsicDimensionTuner({"max_epochs": 10})
        result = tuner.find(module, datamodule=data, monitor="val_acc")
        result.suggestion()
        result.plot()

    Source: Li, Farkhoor, Liu & Yosinski (2018), "Measuring the intrinsic dimension of objective landscapes", ICLR 2018,
    arXiv:1804.08838; for "doubling", Schioppa (2024), arXiv:2402.03994.
    """

    def __init__(
        self,
        trainer_fn: Callable[[int], Any] | dict[str, Any],
        *,
        sketch: str = "block_srht",
        parameters: str | Sequence[str] = "*",
        others: Others = "frozen",
        lr_scale: float | int = 10.0,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
    ):
        self.trainer_fn = trainer_fn
        self.options: dict[str, Any] = {
            "sketch": sketch,
            "parameters": parameters,
            "others": others,
            "optimizer_fn": optimizer_fn,
        }
        self.scale = float(lr_scale)

    def find(
        self,
        model: LightningModule | Callable[[], LightningModule],
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        dims: Iterable[int] | None = None,
        monitor: str,
        mode: Mode = "max",
        threshold: float | int = 0.9,
        seeds: int = 1,
        method: Method = "grid",
        baseline: float | int | None = None,
    ) -> IntrinsicDimensionResult:
        """Train in full, unless `baseline` is given, then in subspaces; all runs start from the same weights.

        Each finished run is recorded in `intrinsic_dimension.json` beside the logs, and skipped by later searches with
        the same settings: initial weights, hyper-parameters, directions, metric, the Trainer's length, precision,
        clipping and accumulation, and the shape of loaders. The contents of the data, an `optimizer_fn`, and a learning
        rate that is not a hyper-parameter are not compared: delete the file after such a change.

        A run that ends with NaN, or out of memory, is recorded as such, and the search continues. With several
        processes, which would wait for each other, lack of memory ends the search, and the next search skips that run.

        Each run's logger gets `subspace/dim` and the metric at its end; W&B runs share a group.

        The cost is one fit for full training and one for each dim and seed; of "doubling", for each seed, a fit of up
        to twice the length and one more.

        Args:
            model: The module, of which each run trains a copy; or a function that makes one.
            train_dataloaders: As in `Trainer.fit`.
            val_dataloaders: As in `Trainer.fit`.
            datamodule: As in `Trainer.fit`.
            dims: The dimensions to try. None is 8, 16, 32, ... and n; "grid" then ends at the first that is enough.
            monitor: A metric that `validation_step` logs. The value of a run is the metric at its end.
            mode: "max" if larger values are better, "min" if smaller ones are.
            threshold: The required part of what full training gains, in (0, 1].
            seeds: The number of runs for each dimension, each with its own directions and order of the data.
            method: "grid" tries all dims; "bisect" assumes that more dimensions are never worse; "doubling" doubles the
                dimension within one run of at most twice the steps of full training, at a constant rate, see
                `IntrinsicDimensionFinder`, and verifies the dimension found by a run at half of it.
            baseline: The metric after full training, if it is known, to omit that run.

        Returns:
            The value of each run, the target, and the suggested dimension.
        """
        _check(mode, threshold, seeds, method)
        data = train_dataloaders, val_dataloaders, datamodule
        runner = Runner(self.trainer_fn, self.options, model, data, monitor, mode)
        ladder = _ladder(dims, runner.n, method)
        start = runner.begin(ladder[0])
        if method == "doubling":
            refuse_spawning(runner.trainers.peek(runner.n))
        rank_zero_info(
            f"intrinsic dimension of {runner.n:,} parameters: in subspaces the module's learning rate is multiplied by "
            f"{self.scale:g}; runs are recorded in {runner.ledger.path}"
        )
        if baseline is not None:
            full: Run = {"value": float(baseline), "steps": runner.length() if method == "doubling" else 0}
        else:
            full = runner.fit_full()
        if not math.isfinite(full["value"]):
            raise MisconfigurationException(
                f"full training ended with {monitor}={full['value']}; fix training before searching."
            )
        if mode == "max" and full["value"] <= 0:
            raise MisconfigurationException(
                f"mode='max' asks for threshold x {full['value']:.4g}, which is more than full training reaches; log "
                f"the negative of {monitor} and use mode='min'."
            )
        aim = target(mode, float(threshold), full["value"], start)
        if reaches(start, aim, mode) or not reaches(full["value"], aim, mode):
            raise MisconfigurationException(
                f"{monitor} is {start:.4g} before training and {full['value']:.4g} after full training, so nothing has "
                f"to be learned with mode={mode!r} and threshold={threshold}; is it the other mode?"
            )

        def reached(several: list[Run]) -> bool:
            return reaches(sum(run["value"] for run in several) / len(several), aim, mode)

        def at(dim: int) -> list[Run]:
            return [runner.fit_subspace(dim, seed, self.scale) for seed in range(seeds)]

        if method == "doubling":
            rule: dict[str, Any] = {
                "mode": mode,
                "delta": abs(full["value"] - start) / 20,
                "every_n_train_steps": max(1, full["steps"] // 8),
                "max_steps": 2 * full["steps"],
            }
            finders = [IntrinsicDimensionFinder(monitor, aim, **rule) for _ in range(seeds)]
            done = [
                run
                for seed, finder in enumerate(finders)
                for run in _doubling(runner, ladder, seed, self.scale, finder)
            ]
        elif method == "bisect":
            done = list(_bisect(ladder, at, reached))
        else:
            done = list(_grid(ladder, at, reached if dims is None else lambda several: False))
        results = {key: [run[key] for run in done] for key in ("kind", "dim", "seed", "value", "steps", "status")}
        return IntrinsicDimensionResult(
            results,
            monitor,
            mode=mode,
            threshold=float(threshold),
            n=runner.n,
            baseline=full["value"],
            start=start,
        )


def _check(mode: Mode, threshold: float | int, seeds: int, method: Method) -> None:
    """Check the arguments of `find` that need no model.

    Raises:
        ValueError: If one is out of its range.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is not known; use 'max' or 'min'.")
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; use {', '.join(map(repr, get_args(Method)))}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"need a threshold in (0, 1], got {threshold}; 0.9 is usual.")
    if seeds < 1:
        raise ValueError(f"need seeds >= 1, got {seeds}.")


def _ladder(dims: Iterable[int] | None, n: int, method: Method) -> list[int]:
    """Return the dimensions to try, ascending; by default powers of two, then n unless directions are to be doubled."""
    if dims is None:
        powers = [1 << k for k in range(3, n.bit_length()) if 1 << k < n]
        return powers if powers and method == "doubling" else [*powers, n]
    dims = [index(dim) for dim in dims]
    if not dims:
        raise ValueError(f"dims is empty; pass whole numbers from 1 to {n}, or leave dims out.")
    wrong = [dim for dim in dims if not 0 < dim <= n]
    if wrong:
        raise ValueError(f"need dims from 1 to n={n}, got {wrong}; leave these out.")
    return sorted(set(dims))


def _grid(ladder: list[int], at: Callable[[int], list[Run]], until: Callable[[list[Run]], bool]) -> Iterator[Run]:
    for dim in ladder:
        several = at(dim)
        yield from several
        if until(several):
            return


def _bisect(ladder: list[int], at: Callable[[int], list[Run]], reached: Callable[[list[Run]], bool]) -> Iterator[Run]:
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        several = at(ladder[middle])
        yield from several
        low, high = (low, middle) if reached(several) else (middle + 1, high)


def _doubling(
    runner: Runner, ladder: list[int], seed: int, scale: float, finder: IntrinsicDimensionFinder
) -> Iterator[Run]:
    """Search within one run, then train at half of the dimension found."""
    found = runner.search(finder, ladder[0], ladder[-1], seed, scale)
    yield found
    if found["status"] == "done" and found["dim"] > 1:
        yield runner.fit_subspace(found["dim"] // 2, seed, scale)
