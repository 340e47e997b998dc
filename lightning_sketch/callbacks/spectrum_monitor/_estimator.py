"""What a monitor looks through: a curvature matrix made from a LightningModule and batches, and its spectrum."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import training_step_loss
from lightning_sketch.callbacks.spectrum_monitor._measurement import LayerCurvature, Measurement
from lightning_sketch.callbacks.spectrum_monitor._probe_batches import ProbeBatch
from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian, spectrum
from lightning_sketch.curvature.hessian import check_hvp
from lightning_sketch.curvature.operator import CurvatureOperator
from lightning_sketch.curvature.spectrum import check_arguments
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.linalg.linearity import checked_defect
from lightning_sketch.operators import LinearOperator

_KINDS = ("hessian", "ggn", "fisher")


@dataclass
class SpectrumEstimator:
    """Arguments as in `SpectrumMonitor`.

    Raises:
        ValueError: if one is out of its range.
    """

    curvature: str
    method: str
    top_k: int
    bottom_k: int
    num_matvecs: int
    dim: int
    tol: float
    density_probes: int
    parameters: str
    loss_fn: Callable[[Any, Any], Tensor] | None
    seed: int
    per_layer: bool | list[str]
    model_fn: Callable[[Any, Any], Any] | None
    output_loss_fn: Callable[[Tensor, Any], Tensor] | None
    weight_fn: Callable[[Any], float] | None
    num_examples: int | Callable[[Any], int] | None
    batch_dim: int
    micro_batch_size: int | None
    hvp: str

    def __post_init__(self):
        if self.curvature not in _KINDS:
            raise ValueError(f"curvature={self.curvature!r} is not known; use {' or '.join(map(repr, _KINDS))}.")
        if self.curvature != "ggn" and (self.model_fn or self.output_loss_fn):
            raise ValueError(
                f"model_fn and output_loss_fn make a Gauss-Newton matrix, got curvature={self.curvature!r}; use "
                "curvature='ggn', or loss_fn."
            )
        for name in ("top_k", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"need {name} >= 1, got {value}.")
        check_hvp(self.hvp)
        if self.curvature != "hessian" and self.hvp != "auto":
            raise ValueError(f"hvp={self.hvp!r} makes products of a Hessian, got curvature={self.curvature!r}.")
        if isinstance(self.per_layer, str):
            raise ValueError(
                f"per_layer is True or a list of patterns, got {self.per_layer!r}; use [{self.per_layer!r}]."
            )
        check_arguments(
            self.num_matvecs, self.dim, self.top_k, self.bottom_k, self.tol, self.density_probes, method=self.method
        )
        if self.curvature != "hessian":  # never negative: the smallest are zeros, and no run finds their number
            self.bottom_k = 0

    def check(self, module: nn.Module, batches: Sequence[ProbeBatch], distributed: bool) -> None:
        """Take three products, so that what cannot work fails now, in seconds.

        Raises:
            ValueError: what the matrix or its products say; if no parameter is in one of the layers; if a
                Gauss-Newton matrix is not that of the loss that is trained.
        """
        matrix = self.matrix(module, batches, distributed)
        for names in groups(matrix.layout, self.per_layer).values():
            Layout.of(module, names)
        matrix.loss()  # a Gauss-Newton matrix of another loss than the one that is trained is refused
        with matrix.hold():
            starts = (start_vector(matrix, self.seed, name) for name in ("0", "defect"))
            checked_defect(matrix, *starts, random=True)

    def check_weights(self, module: nn.Module, batches: Sequence[ProbeBatch], distributed: bool) -> None:
        """Refuse batches whose weights in the mean are not known, as soon as all of them are there."""
        self.matrix(module, batches, distributed).batches.check_weights()

    def measure(
        self,
        module: nn.Module,
        batches: Sequence[ProbeBatch],
        epoch: int,
        step: int,
        distributed: bool,
        on_product: Callable[[int, int], None] | None,
    ) -> Measurement:
        """The spectrum of the module as it is now."""
        start = time.perf_counter()
        matrix = self.matrix(module, batches, distributed)
        loss = matrix.loss()
        with matrix.hold():
            measured = spectrum(
                matrix,
                num_matvecs=self.num_matvecs,
                dim=self.dim,
                seed=self.seed,
                top_k=self.top_k,
                bottom_k=self.bottom_k,
                tol=self.tol,
                density_probes=self.density_probes,
                method=self.method,
                gradient=matrix.gradient(),
                on_product=on_product,
            )
        self.micro_batch_size = matrix.batches.micro_batch_size  # what fits in memory
        layers = measure_layers(
            lambda names: self.matrix(module, batches, distributed, parameters=names),
            groups(matrix.layout, self.per_layer),
            self.seed,
            self.tol,
        )
        seconds = time.perf_counter() - start
        return Measurement(**vars(measured), epoch=epoch, step=step, loss=loss, seconds=seconds, layers=layers)

    def matrix(
        self,
        module: nn.Module,
        batches: Sequence[ProbeBatch],
        distributed: bool = False,
        parameters: str | Sequence[str] | None = None,
    ) -> CurvatureOperator:
        """The matrix of the loss, by the module's own `training_step` unless there is a `loss_fn`."""
        options: dict[str, Any] = {
            "parameters": self.parameters if parameters is None else parameters,
            "batch_dim": self.batch_dim,
            "micro_batch_size": self.micro_batch_size,
            "distributed": distributed,
        }
        if self.curvature == "ggn":
            options |= {"weight_fn": self.weight_fn, "num_examples": self.num_examples, "loss_fn": self.loss_fn}
            return GGN(module, [probe.batch for probe in batches], self.model_fn, self.output_loss_fn, **options)
        weight_fn = (lambda probe: self.weight_fn(probe.batch)) if self.weight_fn else None
        options |= {"weight_fn": weight_fn, "num_examples": _ProbeStructure(self.num_examples, self.batch_dim)}
        if self.curvature == "fisher":
            return EmpiricalFisher(self._loss, module, batches, **options)
        return Hessian(self._loss, module, batches, hvp=self.hvp, **options)

    def _loss(self, module: nn.Module, probe: ProbeBatch) -> Tensor:
        batch = copy.deepcopy(probe.batch)  # a step may change its batch in place
        return self.loss_fn(module, batch) if self.loss_fn else training_step_loss(module, batch, batch_idx=probe.index)


class _ProbeStructure(BatchStructure):
    """How many examples the batch of a probe has; its parts are probes too."""

    def count(self, batch: ProbeBatch) -> int:
        return super().count(batch.batch)

    def parts(self, batch: ProbeBatch, size: int, examples: int | None = None) -> Iterator[tuple[ProbeBatch, int]]:
        examples = self.count(batch) if examples is None else examples
        for part, number in super().parts(batch.batch, size, examples):
            yield replace(batch, batch=part), number


_MATVECS = 32


def groups(layout: Layout, per_layer: bool | Sequence[str]) -> dict[str, list[str]]:
    """Names of parameters by group: those of each pattern, or of each module that holds some itself."""
    if isinstance(per_layer, bool):
        found: dict[str, list[str]] = {}
        for name in layout.names if per_layer else ():
            found.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return found
    return {pattern: [pattern] for pattern in per_layer}


def measure_layers(
    block: Callable[[list[str]], LinearOperator], names: Mapping[str, list[str]], seed: int, tol: float
) -> dict[str, LayerCurvature]:
    """The top eigenvalue and the trace of each group's block; at most 46 products a group."""
    found = {}
    for group, parameters in names.items():
        sp = spectrum(block(parameters), num_matvecs=_MATVECS, dim=1024, seed=seed, top_k=1, bottom_k=0, tol=tol)
        found[group] = LayerCurvature(
            sp.lambda_max, float(sp.residuals[0]), bool(sp.converged[0]), sp.trace, sp.trace_sem, sp.num_products
        )
    return found


class InitialWeights:
    """A copy of a module's parameters and buffers."""

    def __init__(self, module: nn.Module):
        self.values = {name: tensor.detach().clone() for name, tensor in _state(module).items()}

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The module with these weights; after that with its own, the very same tensors."""
        state = _state(module)  # a buffer made since then stays as it is
        now = {name: tensor.data for name, tensor in state.items() if name in self.values}
        try:
            for name in now:
                state[name].data = self.values[name]
            yield
        finally:
            for name, value in now.items():
                state[name].data = value


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
