"""The search for the intrinsic dimension of a task, by training in subspaces of several dimensions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sketch._arguments import kind_of, whole_number
from lightning_sketch._lightning import LightningModule, close_run, name_run, said_once
from lightning_sketch.subspace._ledger import Run
from lightning_sketch.subspace._rates import Rates
from lightning_sketch.subspace._runner import Runner
from lightning_sketch.subspace.finder import IntrinsicDimensionFinder, refuse_spawning
from lightning_sketch.subspace.result import IntrinsicDimensionResult, Mode, progress, reaches, target
from lightning_sketch.subspace.subspace_model import Others, Structure, whole

Method = Literal["grid", "bisect", "doubling"]
Value = Literal["last", "best"]
_FROM = 8  # the dimension at which a search begins, unless it is told


class IntrinsicDimensionTuner:
    """Find how few numbers, along random directions, train a model almost as well as all its parameters do.

    Each dimension is asked at the best of several rates, see `rates`.

    The last layer of a classifier that is new, on an encoder that is not, may need most of the dimensions: with
    head="classifier.*" it is trained in full, outside of the subspace. Without, the result says that it is inside.

    Args:
        trainer_fn: A function from dim to a new Trainer with a new logger, called for each run; or a mapping of the
            Trainer's arguments, in which `logger` may be a function of dim, callbacks, strategy, plugins and profiler
            are copied for each run, and progress bars and model summaries are off unless they are switched on.
        sketch: The kind of sketch whose rows are the directions.
        parameters: A pattern of the names of the parameters to search in, as in `SubspaceModule`; full training trains
            the same ones.
        others: What is done with the other trainable parameters, as in `SubspaceModule`: "frozen" or "full"; full
            training does the same.
        head: A pattern of the names of parameters that are trained in full, outside of the subspace, or None.
        structure: "layers" to learn a scale for each layer with one of the dim numbers (SAID), as in `SubspaceModule`.
        rates: The factors of the directions to choose from, as `scale` in `SubspaceModule`: factors of the learning
            rate for optimizers like Adam, of its square root for SGD. One number is asked for all dimensions. None is
            ..., 0.1, 0.3, 1, 3, 10, ..., from 1, and from the best one of the nearest dimension on.
        lr_scale: The factor of the learning rate for all dimensions, an alias: for optimizers like Adam it is a rate,
            for SGD the square of one.
        optimizer_fn: Makes the optimizer in subspaces, in place of the module's own, as in `SubspaceModule`.

    Raises:
        ValueError: If rates are not positive, or given twice. By `find`, before training: if an argument is out of its
            range; if no parameter matches.
        MisconfigurationException: By `find`, before training: if `trainer_fn` returns the same Trainer or logger twice;
            if `monitor` is not logged in validation; for "doubling" with a `baseline` but without max_steps, or if fit
            runs in spawned processes (`ddp_spawn` and similar).
        TypeError: By `find`, before training: if `model` is neither a module nor a function that makes one.

    Example::

        tuner = IntrinsicDimensionTuner({"max_epochs": 10})
        result = tuner.find(module, datamodule=data, monitor="val_acc")
        result.suggestion()
        result.plot()
        result.best().materialize()

    Source: Li, Farkhoor, Liu & Yosinski (2018), "Measuring the intrinsic dimension of objective landscapes", ICLR 2018,
    arXiv:1804.08838; for "doubling", Schioppa (2024), arXiv:2402.03994.
    """

    def __init__(
        self,
        trainer_fn: Callable[[int], Any] | Mapping[str, Any],
        *,
        sketch: str = "block_srht",
        parameters: str | Sequence[str] = "*",
        others: Others = "frozen",
        head: str | Sequence[str] | None = None,
        structure: Structure | None = None,
        rates: float | int | Iterable[float | int] | None = None,
        lr_scale: float | int | None = None,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
    ):
        if rates is not None and lr_scale is not None:
            raise ValueError("rates and lr_scale are given, which are the same but for SGD; leave out lr_scale.")
        if not (isinstance(trainer_fn, Mapping) or callable(trainer_fn)):
            raise TypeError(
                "IntrinsicDimensionTuner makes a Trainer for each run, so it takes a function or the Trainer's "
                f"arguments, got {kind_of(trainer_fn)}; pass lambda dim: Trainer(...), or a dict."
            )
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        self.trainer_fn = {**quiet, **trainer_fn} if isinstance(trainer_fn, Mapping) else trainer_fn
        given = [] if rates is None else rates if isinstance(rates, Iterable) else [rates]
        self.rates = sorted({float(rate) for rate in given}) if rates is not None else None
        if self.rates is not None and not (self.rates and all(0 < rate < math.inf for rate in self.rates)):
            raise ValueError(f"need rates above 0, got {rates}; 0.3, 1 and 3 are usual.")
        self.options: dict[str, Any] = {
            "sketch": sketch,
            "parameters": parameters,
            "others": others,
            "optimizer_fn": optimizer_fn,
            **({} if head is None else {"head": head}),
            **({} if structure is None else {"structure": structure}),
            **({} if lr_scale is None else {"lr_scale": float(lr_scale)}),
        }

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
        value: Value = "last",
        baseline: float | int | None = None,
    ) -> IntrinsicDimensionResult:
        """Train in full, unless `baseline` is given, then in subspaces; all runs start from the same weights.

        Runs are recorded in the folder `intrinsic_dimension` beside the logs, and not done again by searches with the
        same settings; several processes and machines may share the folder. What is compared, by hashes: initial
        weights, class and hyper-parameters, the optimizer with its rate and schedule, directions, metric, the Trainer's
        length, validation, devices, precision, clipping and accumulation, and lengths, batch sizes and three examples
        of the data. Code is not compared, nor are callbacks or data that cannot be indexed: delete the folder after
        such a change. A run that was killed goes on from its last validation, unless the Trainer has
        enable_checkpointing=False.

        Data are set up for fits only, and validated only when the Trainer does: the value of a run is that of its last
        validation, whose step is reported.

        A run that ends with NaN, or out of memory, is recorded as such, and the search continues. With several
        processes, which would wait for each other, lack of memory ends the search, and the next search skips that run.

        Each run's logger gets `subspace/dim` and the metric at its end; W&B runs share a group, and the last one of
        them has the suggestion, the target and the curve in its summary, see `IntrinsicDimensionResult.log`.

        The cost is one run for full training and one for each dimension and seed, and at other rates at most 1.5 times
        as many; "doubling" begins with a run of up to twice the length.

        Args:
            model: The module, of which each run trains a copy; or a function that makes one.
            train_dataloaders: As in `Trainer.fit`.
            val_dataloaders: As in `Trainer.fit`.
            datamodule: As in `Trainer.fit`.
            dims: The dimensions to try. None is 8, 16, 32, ... and n, until two in a row are enough, and if 8 is, then
                4, 2, 1 until one is not. "doubling" takes the smallest and the largest.
            monitor: A metric that `validation_step` logs. The value of a run is that of its last validation.
            mode: "max" if larger values are better, "min" if smaller ones are.
            threshold: The required part, in (0, 1]: of the metric of full training for mode="max", and of what full
                training gains for mode="min".
            seeds: The number of runs for each dimension, each with its own directions and order of the data; a data
                module that splits at random in `setup` splits in another way for each.
            method: "grid" tries all dims; "bisect" assumes that more dimensions are never worse, skips 1, 3, 7, ... of
                them until one is enough, and halves what is left, then no more than "grid"; "doubling" doubles the
                dimension within one run of at most twice the steps of full training, at a constant rate, see
                `IntrinsicDimensionFinder`, and goes on from there by runs at half or twice the dimension.
            value: "last" to judge a run by its last validation, "best" by its best one, of which no checkpoint is kept.
            baseline: The metric after full training, if it is known, to omit that run.

        Returns:
            The value of each run, the target, and the suggested dimension.
        """
        for name, given, known in (("mode", mode, Mode), ("method", method, Method), ("value", value, Value)):
            if given not in get_args(known):
                raise ValueError(f"{name}={given!r} is not known; use {', '.join(map(repr, get_args(known)))}.")
        if not 0 < threshold <= 1:
            raise ValueError(f"need a threshold in (0, 1], got {threshold}; 0.9 is usual.")
        whole_number(seeds, "seeds", usual=3)
        data = train_dataloaders, val_dataloaders, datamodule
        runner = Runner(self.trainer_fn, self.options, model, data, monitor, mode)
        ladder = _ladder(dims, runner.num_layers, runner.n, method)
        first = next((place for place, dim in enumerate(ladder) if dims is not None or dim >= _FROM), len(ladder) - 1)

        def judged(run: Run) -> Run:
            return {**run, "value": run["best"]} if value == "best" and run["kind"] == "fit" else run

        with said_once():
            start = runner.begin(ladder[first])
            trainer = runner.trainers.peek(runner.n)
            in_wandb = any(kind.__name__ == "WandbLogger" for one in trainer.loggers for kind in type(one).__mro__)
            if method == "doubling":
                refuse_spawning(trainer)
            rank_zero_info(f"intrinsic dimension of {runner.n:,} parameters; runs are recorded in {runner.ledger.path}")
            if baseline is not None:
                full: Run = {"value": float(baseline), "steps": runner.length() if method == "doubling" else 0}
            else:
                full = judged(runner.fit_full())
            aim = _target(full["value"], start, monitor, mode, float(threshold))
            rates = Rates(
                lambda asked: [judged(run) for run in runner.fit_subspaces(asked)],
                lambda value: progress(value, start, aim),
                seeds,
                [1.0] if "lr_scale" in self.options else self.rates,
            )
            searches: list[Run] = []
            if method == "doubling":
                rule: dict[str, Any] = {
                    "mode": mode,
                    "delta": abs(full["value"] - start) / 20,
                    "every_n_train_steps": max(1, full["steps"] // 8),
                    "max_steps": 2 * full["steps"],
                }
                largest = max((dim for dim in ladder[first:] if dim < runner.n), default=ladder[first])
                finder = IntrinsicDimensionFinder(monitor, aim, **rule)
                searches = [runner.search(finder, ladder[first], largest, 0, rates.first)]
                end = searches[0]["dim"] // (2 if searches[0]["status"] == "done" else 1)
                first = max((place for place, dim in enumerate(ladder) if dim <= end), default=0)
            if method == "bisect":
                _bisect(ladder[first:], rates.reaches)
            elif method == "grid" and dims is not None:
                for dim in ladder:
                    rates.reaches(dim)
            else:
                _grid(ladder[first:], rates.reaches)
            all(rates.reaches(dim) for dim in reversed(ladder[: first + 1]))  # down to the first that is not enough
            columns = ("kind", "dim", "seed", "scale", "value", "steps", "status", "checkpoint")
            result = IntrinsicDimensionResult(
                {key: [run[key] for run in [*searches, *rates.runs.values()]] for key in columns},
                monitor,
                mode=mode,
                threshold=float(threshold),
                n=runner.n,
                baseline=full["value"],
                start=start,
                inside=_inside(self.options),
                judged=value,
                new_model=runner.replicas.new,
            )
            if in_wandb:
                last: Any = runner.trainers.take(runner.n)  # Any: not all loggers have an `experiment`
                name_run(last, "result", f"intrinsic dimension {runner.replicas.fingerprint % (1 << 32):08x}")
                for logger in last.loggers if last.is_global_zero else ():
                    result.log(logger.experiment)
                close_run(last, {})
            return result


def _target(full: float, start: float, monitor: str, mode: Mode, threshold: float) -> float:
    """Return the metric to reach.

    Raises:
        MisconfigurationException: If full training failed, or reaches nothing that the start does not.
    """
    if not math.isfinite(full):
        raise MisconfigurationException(f"full training ended with {monitor}={full}; fix training before searching.")
    if mode == "max" and full <= 0:
        raise MisconfigurationException(
            f"mode='max' asks for threshold x {full:.4g}, which is more than full training reaches; log the negative "
            f"of {monitor} and use mode='min'."
        )
    aim = target(mode, threshold, full, start)
    if reaches(start, aim, mode) or not reaches(full, aim, mode):
        raise MisconfigurationException(
            f"{monitor} is {start:.4g} before training and {full:.4g} after full training, so nothing has to be "
            f"learned with mode={mode!r} and threshold={threshold}; is it the other mode? Pass "
            f"mode={'min' if mode == 'max' else 'max'!r}."
        )
    return aim


def _ladder(dims: Iterable[int] | None, num_layers: int, n: int, method: Method) -> list[int]:
    """Return the dimensions to choose from, ascending; by default powers of two, and n.

    Raises:
        ValueError: If one is not above the number of layers with a scale of their own, or above n.
    """
    if method == "doubling" and num_layers:
        raise ValueError("structure='layers' has no directions that can be doubled; use method='bisect'.")
    if dims is None:
        return [*(1 << k for k in range(n.bit_length()) if num_layers < 1 << k < n), n]
    if not isinstance(dims, Iterable):
        raise TypeError(f"dims are the dimensions to try, got {kind_of(dims)}; pass a list, dims=[{dims}].")
    asked = sorted({whole(dim, "a dimension") for dim in dims})
    wrong = [dim for dim in asked if not num_layers < dim <= n]
    if wrong or not asked:
        raise ValueError(f"need dims from {num_layers + 1} to n={n}, got {wrong or 'none'}; leave these or dims out.")
    if method != "doubling":
        return asked
    return [*(asked[0] << k for k in range(n.bit_length()) if asked[0] << k < asked[-1]), asked[-1]]


def _grid(dims: Sequence[int], reaches: Callable[[int], bool]) -> None:
    """Ask dimensions from below, until two in a row are enough: one lucky run does not end a search."""
    before = False
    for dim in dims:
        before, last = reaches(dim), before
        if before and last:
            return


def _bisect(dims: Sequence[int], reaches: Callable[[int], bool]) -> None:
    """Ask places 0, 1, 3, 7, ... until one is enough, and halve what is left; then confirm it by a larger dimension.

    If more dimensions are never worse, it asks at most as many as `_grid`.
    """
    low, asked = -1, -1
    while low < len(dims) - 1:
        high, step = low + 1, 1
        while high < len(dims) - 1 and not reaches(dims[high]):
            low, high, step = high, min(high + step, len(dims) - 1), 2 * step
        asked = max(asked, high)
        if not reaches(dims[high]):
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(dims[middle]) else (middle, high)
        if asked > high or high == len(dims) - 1 or reaches(dims[high + 1]):
            return
        low = high + 1


def _inside(options: Mapping[str, Any]) -> str:
    """Return a sentence that says which parameters are inside the subspace."""
    if "head" in options:
        return f"head={options['head']!r} is outside of the subspace, and trained in full"
    if options["parameters"] == "*":
        return "all layers are inside the subspace, the last one included (see head=...)"
    return f"parameters={options['parameters']!r} are inside the subspace, others={options['others']!r}"
