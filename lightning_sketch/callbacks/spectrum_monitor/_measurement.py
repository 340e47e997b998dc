"""A spectrum measured during training, and what a checkpoint stores of it."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from lightning_sketch import plots
from lightning_sketch.curvature import CriticalLearningRate, Spectrum, Stability, verdict
from lightning_sketch.curvature.serialization import from_plain, to_plain
from lightning_sketch.linalg.quadrature import Quadrature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stage = Literal["fit", "validate", "test"]


@dataclass(frozen=True)
class LayerCurvature:
    """Curvature of one layer: the diagonal block of the matrix for its parameters.

    Attributes:
        lambda_max: The largest eigenvalue of the block, in loss per squared parameter.
        residual: The bound on its error: some eigenvalue of the block lies within this distance.
        converged: Whether the residual is within the tolerance.
        trace: The trace of the block.
        trace_sem: The standard error of the trace.
        num_products: The number of products that were taken.
        nodes: Points that represent all eigenvalues of the block, (q,); None without `density_probes`.
        weights: The share of the eigenvalues at each of them, (q,), which sum to one.
    """

    lambda_max: float
    residual: float
    converged: bool
    trace: float
    trace_sem: float
    num_products: int
    nodes: Float[Tensor, " q"] | None = None
    weights: Float[Tensor, " q"] | None = None

    @property
    def quadrature(self) -> Quadrature | None:
        """The density of the block's eigenvalues, if it was estimated."""
        return None if self.nodes is None or self.weights is None else Quadrature(self.nodes, self.weights)

    @property
    def negative_mass(self) -> float:
        """The sum of |negative| eigenvalues over the sum of all |eigenvalues|; NaN without a density."""
        if self.nodes is None or self.weights is None:
            return math.nan
        size = float(self.weights @ self.nodes.abs())
        return float(self.weights @ -self.nodes.clamp(max=0)) / size if size else 0.0


@dataclass(frozen=True, eq=False)
class Measurement(Spectrum):
    """A spectrum measured during training.

    Attributes:
        epoch: The epoch in which it was measured, from 0.
        step: The number of optimizer steps before it, which is the step of logs, plots and file names too. With several
            optimizers, Lightning and this count batches.
        stage: "fit", or "validate" or "test" if `trainer.validate` or `trainer.test` measured it on its own data.
        loss: The mean loss over the probe batches, in evaluation mode.
        seconds: The time that the measurement took, layers included.
        lr: The learning rate of the optimizer, NaN if parameters have different ones.
        stable_below: The edge of stability, in units of the eigenvalues: the optimizer's steps diverge along
            eigenvectors with eigenvalues above it. NaN where it is not known, for the reason in `verdict`.
        preconditioned: Whether the matrix is P^-1/2 H P^-1/2, with the diagonal P of the optimizer's steps.
        critical: The largest factor of the last step that would not have raised the loss; 0 if the step was not
            downhill.
        verdict: What both say about the learning rate, in one sentence.
        overlap_with_last: The mean squared cosine between the top_k eigenvectors now and at the last measurement, from
            0 to 1; NaN at the first.
        layers: The curvature of each layer's own block, by name; empty unless `per_layer` is set.

    The attributes of `Spectrum` (eigenvalues, residuals, trace, ...) are there too.
    """

    _: KW_ONLY
    epoch: int
    step: int
    loss: float
    seconds: float
    stage: Stage = "fit"
    lr: float = math.nan
    stable_below: float = math.nan
    preconditioned: bool = False
    critical: CriticalLearningRate | None = None
    verdict: str = ""
    overlap_with_last: float = math.nan
    layers: dict[str, LayerCurvature] = field(default_factory=dict)

    def __repr__(self) -> str:
        when = f"{'' if self.stage == 'fit' else f'{self.stage}, '}epoch {self.epoch}, step {self.step}, "
        when += f"loss {self.loss:.4g}, {self.seconds:.1f} s"
        return f"Measurement: {when}; {self._described()}"

    @property
    def unit(self) -> str:
        """The unit of eigenvalues: those of P^-1/2 H P^-1/2 are compared with an edge in 1 / learning rate."""
        return "1 / learning rate" if self.preconditioned else "loss / parameter²"

    def plot(self, name: str = "") -> "Figure":
        """Draw the eigenvalues by rank with their error bars, and the density beside them if it is known.

        Args:
            name: The name of the monitor, for the title.

        Returns:
            A matplotlib Figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        nodes, weights = (part.tolist() for part in self.quadrature) if self.quadrature else ((), ())
        return plots.spectrum(
            self.eigenvalues.tolist(),
            self.residuals.tolist(),
            converged=self.converged.tolist(),
            size=self.n,
            nodes=nodes,
            weights=weights,
            title=f"{name + ', ' if name else ''}epoch {self.epoch}, step {self.step}",
            unit=self.unit,
        )

    def state(self) -> dict[str, Any]:
        """Return tensors and plain numbers for a checkpoint, with eigenvectors only if they are sketched."""
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        plain = to_plain(self) | {"layers": layers, "critical": asdict(self.critical) if self.critical else None}
        return plain | ({"vectors": None} if self.sketch is None else {})

    @staticmethod
    def of_state(state: dict[str, Any]) -> "Measurement":
        """Restore a measurement from what `state` returned."""
        layers = {name: LayerCurvature(**layer) for name, layer in state["layers"].items()}
        critical = CriticalLearningRate(**state["critical"]) if state.get("critical") else None
        restored = from_plain(state | {"layers": layers, "critical": critical}, Measurement)
        assert isinstance(restored, Measurement)
        return restored

    def after(self, earlier: Sequence["Measurement"], now: Stability, k: int) -> "Measurement":
        """Return a copy with the stability, and the overlap of the top k eigenvectors with the last earlier ones."""
        overlap, last = math.nan, earlier[-1] if earlier else self
        if (
            earlier
            and last.vectors is not None
            and (last.n, last.sketch, last.method) == (self.n, self.sketch, self.method)
        ):
            overlap = float(self.overlap(last, k))
        sentence = verdict(self.lambda_max if self.converged[0] else math.nan, now, self.critical)
        return replace(self, lr=now.lr, stable_below=now.edge, verdict=sentence, overlap_with_last=overlap)

    def for_history(self, k: int) -> "Measurement":
        """Return a copy without Krylov vectors and with only k sketched eigenvectors, as a history stores it."""
        vectors = None if self.vectors is None or not k else self.vectors[:, :k].float()
        return replace(self, krylov=None, coefficients=None, vectors=vectors)


def of_training(history: Sequence[Measurement]) -> list[Measurement]:
    """Return the measurements that were taken while training."""
    return [m for m in history if m.stage == "fit"]


def appended(
    history: Sequence[Measurement], measured: Measurement, now: Stability, k: int
) -> tuple[list[Measurement], Measurement]:
    """Append a measurement to a history; one of training replaces those of later steps, as after resuming.

    Args:
        history: The earlier measurements.
        measured: The new one.
        now: The learning rate and the edge of stability, if it was taken while training.
        k: The number of eigenvectors that are compared with those of the last one.

    Returns:
        The new history, in which only the last measurement of training keeps its sketched eigenvectors; and the
        measurement with its stability and overlap.
    """
    if measured.stage != "fit":
        return [*history, measured.for_history(0)], measured
    kept = [m for m in history if m.stage != "fit" or m.step < measured.step]
    measured = measured.after(of_training(kept), now, k)
    return [*(m.for_history(0) for m in kept), measured.for_history(k)], measured
