"""What a monitor says in the console."""

import math
import time
import warnings
from collections.abc import Callable

from torch import nn

from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement

Say = Callable[[str], object]  # prints one line, on rank zero


class Console:
    """Print what measurements cost and what is to be known about them, some of it only once.

    Args:
        name: The name of the monitor.
        cadence: The argument of the monitor that sets how often it measures.
        every: The value of that argument.
        top_k: The number of eigenvalues that were asked for.
    """

    def __init__(self, name: str, cadence: str, every: int, top_k: int):
        self.name, self.cadence, self.every, self.top_k = name, cadence, every, top_k
        self._said: set[str] = set()
        self.start()

    def start(self) -> None:
        """Start to count the time of training."""
        self._clock, self._first = time.perf_counter(), True

    def resume(self) -> None:
        """Count the time of training again, after a measurement."""
        self._clock, self._first = time.perf_counter(), False

    def measured(self, say: Say, measurement: Measurement) -> None:
        """Print what a measurement cost, and once why its number of outliers is a lower bound."""
        since = time.perf_counter() - self._clock - measurement.seconds
        say(f"{self.name}: {self.cost(measurement, since)}")
        if measurement.product_error:
            self._say_once(say, "differences", self.differences(measurement))
        if math.isfinite(measurement.stable_below) or (measurement.critical and not measurement.critical.reason):
            say(f"{self.name}: {measurement.verdict}")
        elif measurement.verdict:
            self._say_once(say, measurement.verdict, measurement.verdict)
        if measurement.num_outliers().at_least:
            self._say_once(say, "outliers", self.outliers(measurement))

    def cost(self, measurement: Measurement, since: float) -> str:
        """Describe the cost of a measurement, and how to reduce it if it was over 10 %.

        Args:
            measurement: The measurement.
            since: Seconds of training before it, since the last one or since training started.
        """
        of_layers = sum(layer.num_products for layer in measurement.layers.values())
        line = f"{measurement.num_products + of_layers} products"
        line += f" ({of_layers} of them of single layers)" if of_layers else ""
        line += f", {measurement.seconds:.1f} s"
        if measurement.step == 0 or measurement.stage != "fit":
            return line
        share = measurement.seconds / since
        part = f"{share:.0%} of the time" if share < 2 else f"{share:.0f} times as long as the training"
        line += f", after {since:.1f} s of training" if self._first else f", {part} since the last"
        factor = math.ceil(10 * share)
        better = f"; {self.cadence}={factor * self.every} would make it {share / factor:.0%} of the time"
        return line if share <= 0.1 else line + better

    def differences(self, measurement: Measurement) -> str:
        """Say how exact differences of gradients are, and what to do where eigenvalues are lost in their noise."""
        line = (
            f"products are differences of gradients, off by {measurement.product_error:.1g}, which error bars include"
        )
        if measurement.product_error <= measurement.tol / 2:
            return f"{line}."
        if measurement.product_error > 0.1:
            return f"{line}; so little is known then: the loss has kinks (ReLU), or its gradients are too coarse."
        wider = f"tol={5 * measurement.product_error:.1g} accepts them with these bars"
        return f"{line}; with tol={measurement.tol:g} few eigenvalues converge, and {wider}."

    def outliers(self, measurement: Measurement) -> str:
        """Say why the number of outliers is a lower bound, and what to do."""
        count = int(measurement.num_outliers())
        if measurement.product_error > measurement.tol / 2:
            return "num_outliers is a lower bound, as the noise of gradients hides eigenvalues; see above."
        if not count:
            return "num_outliers is a lower bound, as no eigenvalue has converged; raise num_matvecs."
        found = "the only eigenvalue that converged is an outlier"
        if count > 1:
            found = f"all {count} eigenvalues that converged are outliers"
        more = "top_k" if count >= self.top_k else "num_matvecs"
        return f"num_outliers is a lower bound, as {found} (above 20 % of the largest); raise {more}."

    def unasked(self, say: Say, stage: str) -> None:
        """Say once how to have `trainer.validate` measured, if that is what runs."""
        if stage == "validate":
            text = "trainer.validate is not measured; SpectrumMonitor(stages=['fit', 'validate']) measures there too."
            self._say_once(say, "unasked", text)

    def discarded(self, count: int) -> None:
        """Warn that a new training begins a new history."""
        warnings.warn(
            f"{self.name}: a new training begins, so its history replaces the {count} measurements of the last one; "
            "copy monitor.history before, or use a new SpectrumMonitor. To continue a training pass ckpt_path.",
            stacklevel=3,
        )

    def other_batches(self, than: str) -> None:
        """Warn that the data of the curve changes."""
        warnings.warn(
            f"{self.name}: the first batches differ from those {than}, so the curve changes its data here; use the "
            "same order of examples in every run (seed_everything, or no shuffling).",
            stacklevel=3,
        )

    def batch_norm(self, say: Say, module: nn.Module) -> None:
        """Say once that batch norm is measured with its running statistics."""
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in module.modules()):
            text = (
                "batch norm is measured with its running statistics; mode='train' takes those of a batch, as training."
            )
            self._say_once(say, "batch norm", text)

    def _say_once(self, say: Say, what: str, text: str) -> None:
        """Print a text with the name of the monitor, unless one about the same was printed."""
        if what not in self._said:
            self._said.add(what)
            say(f"{self.name}: {text}")
