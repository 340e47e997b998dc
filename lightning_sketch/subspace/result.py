"""The result of a search for the intrinsic dimension: its runs, the suggested dimension and its model, and a figure."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sketch import plots
from lightning_sketch._files import read_document, write_document
from lightning_sketch._lightning import LightningModule
from lightning_sketch.subspace._ledger import checked_checkpoint
from lightning_sketch.subspace.bound import GeneralizationBound, generalization_bound
from lightning_sketch.subspace.subspace_module import SubspaceModule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mode = Literal["max", "min"]

_SHOWN = 6  # means in a repr
_NOISE = 0.05  # a loss that is not taken for a contradiction, in parts of the way from the start to the target
_REACHED, _CHOSEN, _FULL, _TARGET = "#0072B2", "#D55E00", "#999999", "#009E73"  # Okabe & Ito: safe for color-blind eyes


@dataclass(frozen=True)
class IntrinsicDimensionResult:
    """The metric of each run against its dimension, with the interface of the result of `Tuner.lr_find`.

    Attributes:
        results: Lists with an entry for each run, in the order in which they were done; `pandas.DataFrame` takes them:

            kind        "fit" for a run at one dimension, "search" for one during which the dimension doubles
            dim         the dimension; of a search, the one at its last validation
            seed        the seed of the directions and of the order of the data
            scale       the factor of the directions, which is the rate at which the dimension was asked
            value       the metric by which the run is judged, in its own units; NaN if the run failed
            steps       optimizer steps
            status      "done", "nan", "out of memory", or "not reached" of a search
            checkpoint  the path of the checkpoint, or None

        monitor: The name of the metric.
        mode: "max" if larger values of the metric are better, "min" if smaller ones are.
        threshold: The required part, in (0, 1]: of the metric of full training for mode="max", and of what full
            training gains for mode="min".
        n: The number of parameters that the search is about: the dimension of the whole space.
        baseline: The metric after full training, in its own units.
        start: The metric at the initial weights θ₀, in its own units.
        inside: A sentence that says which parameters are inside the subspace.
        judged: Which validation of a run is its value.
        new_model: Makes the model at θ₀, for `best`; it is not saved.

    >>> runs = {"kind": ["fit"] * 3, "dim": [8, 16, 32], "seed": [0] * 3, "scale": [1.0] * 3, "value": [0.5, 0.85, 0.9]}
    >>> result = IntrinsicDimensionResult(
    ...     {**runs, "steps": [100] * 3, "status": ["done"] * 3, "checkpoint": [None] * 3},
    ...     "val_acc",
    ...     mode="max",
    ...     threshold=0.9,
    ...     n=1000,
    ...     baseline=0.9,
    ...     start=0.1,
    ... )
    >>> round(result.target, 2), result.suggestion(), result.spread
    (0.81, 16, (16, 16))
    """

    results: dict[str, list[Any]]
    monitor: str
    _: KW_ONLY
    mode: Mode
    threshold: float
    n: int
    baseline: float
    start: float
    inside: str = ""
    judged: Literal["last", "best"] = "last"
    new_model: Callable[[], LightningModule] | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        found, (low, high), rows = self._smallest(), self.spread, self.table()
        below = [row["dim"] for row in rows if row["dim"] < found and not row["reached"]]
        shown = [f"{row['mean']:.4g} at {row['dim']} (rate {row['scale']:g})" for row in rows]
        some = shown if len(shown) <= _SHOWN else [*shown[: _SHOWN // 2], "...", *shown[-_SHOWN // 2 :]]
        lines = [
            f"IntrinsicDimensionResult: {found if found < math.inf else 'no dimension'} of {self.n:,} reaches "
            f"{self.monitor} {self.target:.4g}{f', {below[-1]} does not' if below else ''}, by "
            f"{len(self.results['dim'])} runs",
            f"a run reaches it from {low} on, all seeds {f'from {high} on' if high else 'nowhere'}" if low else "",
            f"{self.start:.4g} at the start, {self.baseline:.4g} after full training; mode {self.mode}, threshold "
            f"{self.threshold:g}",
            f"means over runs: {', '.join(some)}",
            self.inside,
            *(f"contradiction: {sentence}" for sentence in self.contradictions().values()),
        ]
        return "\n    ".join(filter(None, lines))

    @property
    def target(self) -> float:
        """The metric to reach: threshold · baseline; with mode="min", start - threshold (start - baseline)."""
        return target(self.mode, self.threshold, self.baseline, self.start)

    @property
    def spread(self) -> tuple[int | None, int | None]:
        """The interval of the suggestion over seeds and rates, None at an end that was not asked for.

        It goes from the smallest dimension at which any run at any rate reaches the target to the smallest one from
        which on all seeds do at the best rate.
        """
        low = min((run["dim"] for run in self._runs() if self._reached(run["value"])), default=None)
        failed = [dim for dim, runs in self._chosen().items() if not all(self._reached(run["value"]) for run in runs)]
        return low, min((dim for dim in self._chosen() if dim > max(failed, default=0)), default=None)

    def suggestion(self) -> int | None:
        """Return the smallest dimension that reaches the target; None if none does, and the reason is logged.

        A dimension does if the mean over its seeds, at its best rate, reaches the target, and so does that of the next
        larger dimension that was asked: one lucky run is no answer. Searches within one run do not count.

        With threshold=0.9 this is the d90 of Li et al. (2018), "Measuring the intrinsic dimension of objective
        landscapes", ICLR 2018, arXiv:1804.08838.
        """
        chosen = self._smallest()
        if chosen < math.inf:
            return int(chosen)
        known = {dim: value for dim, value in self.means().items() if not math.isnan(value)}
        best = max(known, key=lambda dim: self._progress(known[dim]), default=0)
        rank_zero_info(
            f"no dimension reached {self.monitor} {self.target:.4g}: "
            + (f"the best is {known[best]:.4g} at dim {best}" if known else "no run gave a number")
            + f", full training ({self.n}) gives {self.baseline:.4g}. Try larger dims, longer training or other rates."
        )
        return None

    def means(self) -> dict[int, float]:
        """Return the mean over seeds at the best rate of each dimension, in ascending order; NaN if a run failed.

        Of several rates, those count at which all seeds of the dimension were run.
        """
        return {dim: _mean(runs) for dim, runs in self._chosen().items()}

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each dimension, in ascending order; `pandas.DataFrame` takes them.

        Returns:
            Dicts of dim; of_n, which is dim / n; scale, the best rate; mean, low and high of the metric over seeds at
            this rate; reached, whether the mean reaches the target; runs and steps, over all rates.
        """
        rows = []
        for dim, chosen in self._chosen().items():
            values, mean = [run["value"] for run in chosen], _mean(chosen)
            steps = [run["steps"] for run in self._runs() if run["dim"] == dim]
            row = {"dim": dim, "of_n": dim / self.n, "scale": chosen[0]["scale"], "mean": mean, "low": min(values)}
            row |= {"high": max(values), "reached": self._reached(mean), "runs": len(steps), "steps": sum(steps)}
            rows.append(row)
        return rows

    def contradictions(self) -> dict[tuple[int, int], str]:
        """Return where the means deny that a larger subspace is at least as good, by the two dimensions.

        That is where a mean is worse than that of a smaller dimension, or that of all n dimensions is worse than full
        training, by 5 % of the way from the start to the target; and where the smaller dimension alone reaches it.
        """
        found, top, means = {}, 0, self.means()
        for dim, mean in means.items():
            lost = self._progress(means[top]) - self._progress(mean) if top else 0.0
            if lost > _NOISE or (lost > 0 and self._reached(means[top]) and not self._reached(mean)):
                found[top, dim] = f"{self.monitor} is {mean:.4g} at {dim}, {means[top]:.4g} at {top}"
            top = dim if lost <= 0 else top
        if self._progress(self.baseline) - self._progress(means.get(self.n, self.baseline)) > _NOISE:
            found[self.n, self.n] = f"{self.monitor} is {means[self.n]:.4g} at n, {self.baseline:.4g} in full training"
        return found

    def best(self, model: LightningModule | None = None) -> SubspaceModule:
        """Return the trained module of the best run at the suggested dimension, as it was at its last validation.

        Args:
            model: The model with its weights at θ₀, which the checkpoint's fingerprint is compared with, and which then
                has those of the run; needed if the result is from a file, otherwise a new one is made.

        Raises:
            ValueError: If no dimension reaches the target, its runs left no checkpoint, or the model is missing.
            CorruptFile: If the checkpoint is not what was written.
        """
        runs = [run for run in self._chosen().get(int(self.suggestion() or 0), []) if not math.isnan(run["value"])]
        if not runs:
            raise ValueError(f"no dimension reaches {self.monitor} {self.target:.4g}, so that there is no best run.")
        run = max(runs, key=lambda run: self._progress(run["value"]))
        if run["checkpoint"] is None or self.judged == "best":
            left = "no checkpoint" if run["checkpoint"] is None else "none of its best validation, which was judged"
            raise ValueError(
                f"the best run left {left}; let the Trainer save it, and fit SubspaceModule(model, {run['dim']}, "
                f"seed={run['seed']}, scale={run['scale']:g})."
            )
        if model is None and self.new_model is None:
            raise ValueError("a result from a file does not contain the model; pass it with its weights at θ₀.")
        module = model if model is not None else cast(Any, self.new_model)()
        return SubspaceModule.load_from_checkpoint(checked_checkpoint(run["checkpoint"]), module=module)

    def bound(
        self,
        data: Any,
        delta: float = 0.05,
        *,
        levels: Sequence[int] = (9, 15, 25),
        predict_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        others: Literal["refuse", "price", "fixed"] = "refuse",
        model: LightningModule | None = None,
    ) -> GeneralizationBound:
        """Bound the error rate of the best run's model on new examples, with a w that is rounded for it.

        The choice of dim, seed and rate among all runs is paid for by the bits of the bound.

        Args:
            data: The examples that were trained on, as in `generalization_bound`, whose conditions and cost apply.
            delta: The probability that the bound fails.
            levels: The numbers of values to round w to.
            predict_fn: Returns from the module and a batch whether each example is right, (examples,), where batches
                are not (input, label), as those of Hugging Face.
            loss_fn: Returns from the module and a batch the loss, for such batches.
            others: What to do with buffers and parameters outside of the subspace.
            model: As in `best`.

        Raises:
            ValueError: If there is no best run, or a condition is seen to fail.
        """
        options: dict[str, Any] = {"levels": levels, "delta": delta, "others": others}
        return generalization_bound(self.best(model), data, predict_fn=predict_fn, loss_fn=loss_fn, **options)

    def save(self, path: str | Path) -> None:
        """Write the result to a JSON file, whole or not at all."""
        write_document(Path(path), {name: getattr(self, name) for name in _saved()})

    @classmethod
    def load(cls, path: str | Path) -> "IntrinsicDimensionResult":
        """Read a result that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            CorruptFile: If it is not what was written.
        """
        return cls(**read_document(Path(path), dict.fromkeys(_saved(), object)))

    def log(self, run: Any) -> None:
        """Log the figure to a W&B run, and the suggestion, its spread, the target and the curve to its summary.

        Args:
            run: The run, as `wandb.init` or a WandbLogger's `experiment` gives it.
        """
        import wandb

        rows, (low, high) = self.table(), self.spread
        values: dict[str, Any] = {
            "intrinsic_dimension": self.suggestion(),
            "low": low,
            "high": high,
            "target": self.target,
        }
        values |= {"full_training": self.baseline, "n": self.n}
        values["curve"] = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({"subspace/chart": wandb.Image(self.plot())})
        run.summary.update({f"subspace/{name}": value for name, value in values.items() if value is not None})

    def plot(self, *, suggest: bool = True, show: bool = False, ax: "Axes | None" = None) -> "Figure":
        """Plot the metric against the dimension: every run, the means, full training, the target, contradictions.

        Runs at rates that were not chosen are hollow.

        Args:
            suggest: Whether to mark the suggestion and its spread.
            show: Whether to call matplotlib's show.
            ax: The axes to draw into; None for a new figure.

        Raises:
            ImportError: If matplotlib is missing.
        """
        axes, means, (low, high) = ax or plots.new_figure(6, 3.6).subplots(), self.means(), self.spread
        for run in self._runs():
            face = _REACHED if run["scale"] == self._chosen()[run["dim"]][0]["scale"] else "none"
            axes.plot(run["dim"], run["value"], "o", ms=4, mfc=face, mec=_REACHED, alpha=0.4)
        axes.plot(list(means), list(means.values()), color=_REACHED, label="mean at the best rate")
        axes.axhline(self.baseline, color=_FULL, lw=1, label="full training")
        axes.axhline(self.target, color=_TARGET, lw=1, ls="--", label="target")
        for number, (smaller, larger) in enumerate(self.contradictions()):
            ends = means[larger], self.baseline if smaller == larger else means[smaller]
            axes.plot([larger, smaller], ends, "x:", color=_CHOSEN, label="_" * (number > 0) + "contradiction")
        if suggest and (suggestion := self.suggestion()) is not None:
            axes.plot(suggestion, means[suggestion], "o", ms=9, color=_CHOSEN, label=f"suggestion: {suggestion}")
            if low and high and low < high:
                axes.axvspan(low, high, color=_CHOSEN, alpha=0.1, lw=0, label=f"spread: {low} to {high}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("trained numbers (dim)")
        axes.set_ylabel(self.monitor)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
        if show:
            import matplotlib.pyplot as plt

            plt.show()
        return cast("Figure", axes.figure)

    def _runs(self) -> list[dict[str, Any]]:
        """Return the columns of `results` as rows."""
        return [dict(zip(self.results, row, strict=True)) for row in zip(*self.results.values(), strict=True)]

    def _chosen(self) -> dict[int, list[dict[str, Any]]]:
        """Return the runs of each dimension at its best rate; without searches within one run."""
        groups: dict[int, dict[float, list[dict[str, Any]]]] = {}
        for run in (run for run in self._runs() if run["kind"] == "fit"):
            groups.setdefault(run["dim"], {}).setdefault(run["scale"], []).append(run)
        return {
            dim: max(rates.values(), key=lambda runs: (len(runs), self._progress(_mean(runs))))
            for dim, rates in sorted(groups.items())
        }

    def _smallest(self) -> int | float:
        """Return the suggestion; infinity if there is none."""
        reached = {dim: self._reached(mean) for dim, mean in self.means().items()}
        confirmed = zip(reached, [*list(reached.values())[1:], True], strict=False)
        return min((dim for dim, next_ in confirmed if reached[dim] and next_), default=math.inf)

    def _progress(self, value: float) -> float:
        return progress(value, self.start, self.target)

    def _reached(self, value: float) -> bool:
        return reaches(value, self.target, self.mode)


def target(mode: Mode, threshold: float, baseline: float, start: float) -> float:
    """Return the metric that a subspace has to reach."""
    return threshold * baseline if mode == "max" else start - threshold * (start - baseline)


def reaches(value: float, target: float, mode: Mode) -> bool:
    """Return whether a value is at least as good as the target; False for NaN."""
    return value >= target if mode == "max" else value <= target


def progress(value: float, start: float, target: float) -> float:
    """Return the part of the way from the start to the target that a value has come; minus infinity for NaN."""
    return -math.inf if math.isnan(value) else (value - start) / (target - start)


def _mean(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(run["value"] for run in runs)


def _saved() -> list[str]:
    """Return the names of the fields that a file contains."""
    return [one.name for one in fields(IntrinsicDimensionResult) if one.name != "new_model"]
