"""The intrinsic dimension of a task, by training in subspaces of several sizes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sketch._lightning import LightningModule
from lightning_sketch.subspace._ledger import Run
from lightning_sketch.subspace._runner import Runner
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder, refuse_forgetful
from lightning_sketch.subspace.result import IntrinsicDimensionResult, reaches, target

_METHODS = ("grid", "bisect", "doubling")


class IntrinsicDimensionTuner:
    """Finds how few numbers, along random directions, train a model almost as well as all its parameters do.

    Args:
        trainer_fn: dim -> a new Trainer with a new logger, for each run; or a dict of the Trainer's arguments, in
            which `logger` may be a function of dim, and callbacks, strategy and plugins are copied for each run.
        sketch: kind of the directions.
        parameters: which parameters may move, as in `SubspaceModule`; in full training too.
        others: what is done with the others, as in `SubspaceModule`: "frozen" or "full"; in full training too.
        lr_scale: factor for the learning rate of the module's own optimizer in a subspace, where steps have to be
            longer than in full training.
        optimizer_fn: in place of the module's own optimizer, in subspaces.

    Raises:
        ValueError: by `find`, before training: if an argument is out of its range; if no parameter matches.
        MisconfigurationException: by `find`, before training: if `trainer_fn` gives the same Trainer or logger twice;
            if `monitor` is not logged in validation; for "doubling" with a `baseline`, without max_steps, or with the
            strategy `ddp_spawn` or alike.
        TypeError: by `find`, before training: if `model` is neither a module nor a function that makes one.

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
        others: str = "frozen",
        lr_scale: float | int = 10.0,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
    ):
        self.trainer_fn, self.options = (
            trainer_fn,
            {
                "sketch": sketch,
                "parameters": parameters,
                "others": others,
                "lr_scale": float(lr_scale),
                "optimizer_fn": optimizer_fn,
            },
        )

    def find(
        self,
        model: LightningModule | Callable[[], LightningModule],
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        dims: Iterable[int] | None = None,
        *,
        monitor: str,
        mode: str = "max",
        threshold: float | int = 0.9,
        seeds: int = 1,
        method: str = "grid",
        baseline: float | int | None = None,
    ) -> IntrinsicDimensionResult:
        """Train in full, unless `baseline` is given, then in subspaces; all runs start from the same weights.

        A run that is done is noted in `intrinsic_dimension.json` beside the logs, and not done again by a search with
        the same settings: initial weights, hyper-parameters, directions, metric, the Trainer's length, precision,
        clipping and accumulation, and the shape of loaders. Contents of the data, an `optimizer_fn` and a rate that is
        no hyper-parameter are not compared: delete the file after such a change. One that gives no number, or runs out
        of memory, is noted as such, and the search goes on; on several processes, which would wait for each other, lack
        of memory ends it, and the next leaves that run out.
        Each run's logger gets `subspace/dim` and the metric at its end; W&B runs get a group in common.

        Args:
            model: copied for each run; or a function that makes one.
            train_dataloaders: as in `Trainer.fit`.
            val_dataloaders: as in `Trainer.fit`.
            datamodule: as in `Trainer.fit`.
            dims: to try. None is 8, 16, 32, ... and n; then "grid" ends at the first that is large enough.
            monitor: a metric that `validation_step` logs. The value of a run is that at its end.
            mode: "max" if larger is better, "min" if smaller is.
            threshold: part of what full training gains, in (0, 1].
            seeds: number of runs for each dimension, each with its own directions and order of the data.
            method: "grid" tries all dims; "bisect" takes for granted that more is better; "doubling" doubles the
                dimension within one run of at most twice the steps of full training, at a constant rate, see
                `IntrinsicDimensionFinder`, and verifies what it finds by a run at half of it.
            baseline: the metric after full training, to spare that run.
        """
        _check(mode, threshold, seeds, method)
        runs = Runner(self.trainer_fn, self.options, model, (train_dataloaders, val_dataloaders, datamodule), monitor)
        ladder = _ladder(dims, runs.n, method)
        start = runs.begin(ladder[0])
        if method == "doubling":
            refuse_forgetful(runs.trainers.peek(runs.n))
        rank_zero_info(
            f"intrinsic dimension of {runs.n:,} parameters: in subspaces the module's learning rate x "
            f"{self.options['lr_scale']:g}; runs are noted in {runs.ledger.path}"
        )
        if baseline is not None:
            full = {"value": float(baseline), "steps": runs.length() if method == "doubling" else 0}
        else:
            full = runs.full()
        if not math.isfinite(full["value"]):
            raise MisconfigurationException(f"full training gives {monitor} = {full['value']}; mend that first.")
        if mode == "max" and full["value"] <= 0:
            raise MisconfigurationException(
                f"mode='max' asks for threshold x {full['value']:.4g}, which is more than full training reaches; log "
                f"the negative of {monitor} and use mode='min'."
            )
        aim = target(mode, float(threshold), full["value"], start)
        if reaches(start, aim, mode) or not reaches(full["value"], aim, mode):
            raise MisconfigurationException(
                f"{monitor} is {start:.4g} before training and {full['value']:.4g} after full training, so that mode="
                f"{mode!r} and threshold={threshold} ask for nothing to be learned; is it the other mode?"
            )

        def reached(several: list[Run]) -> bool:
            return reaches(sum(run["value"] for run in several) / len(several), aim, mode)

        def at(dim: int) -> list[Run]:
            return [runs.at(dim, seed) for seed in range(seeds)]

        if method == "doubling":
            delta = abs(full["value"] - start) / 20
            done = [
                run
                for seed in range(seeds)
                for run in _doubling(runs, ladder, seed, full["steps"], (monitor, aim, mode, delta))
            ]
        elif method == "bisect":
            done = list(_bisect(ladder, at, reached))
        else:
            done = list(_grid(ladder, at, reached if dims is None else lambda several: False))
        results = {key: [run[key] for run in done] for key in ("kind", "dim", "seed", "value", "steps", "status")}
        return IntrinsicDimensionResult(results, monitor, mode, float(threshold), runs.n, full["value"], start)


def _check(mode: str, threshold: float | int, seeds: int, method: str) -> None:
    if mode not in ("max", "min"):
        raise ValueError(f"mode={mode!r} is not known; use 'max' or 'min'.")
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is not known; use {', '.join(map(repr, _METHODS))}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"need a threshold in (0, 1], got {threshold}; 0.9 is usual.")
    if seeds < 1:
        raise ValueError(f"need seeds >= 1, got {seeds}.")


def _ladder(dims: Iterable[int] | None, n: int, method: str) -> list[int]:
    """What is tried, from the smallest on; by default powers of two, and n where it stands for itself."""
    if dims is None:
        powers = [1 << k for k in range(3, n.bit_length()) if 1 << k < n]
        return powers if powers and method == "doubling" else [*powers, n]
    dims = [index(dim) for dim in dims]
    wrong = [dim for dim in dims if not 0 < dim <= n]
    if wrong or not dims:
        raise ValueError(f"need dims from 1 to n={n}, got {wrong or 'none'}.")
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
    runs: Runner, ladder: list[int], seed: int, steps: int, rule: tuple[str, float, str, float]
) -> Iterator[Run]:
    """A search of at most twice the steps of full training, judged every eighth of them; then a run at half."""
    finder = IntrinsicDimensionFinder(*rule, max(1, steps // 8), 2 * steps)
    found = runs.search(finder, ladder[0], ladder[-1], seed)
    yield found
    if found["status"] == "done" and found["dim"] > 1:
        yield runs.at(found["dim"] // 2, seed)
