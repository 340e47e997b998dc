"""Construction of the curvature matrix of a LightningModule on probe batches, and estimation of its spectrum."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_sketch._arguments import check_loss_fn, check_patterns, shown, whole_number
from lightning_sketch._lightning import precision_of_training
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import OutputLossName, training_step_loss
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.autodiff.shards import is_sharded, local, reshard
from lightning_sketch.callbacks.spectrum_monitor._measurement import LayerCurvature, Measurement
from lightning_sketch.callbacks.spectrum_monitor._probe_batches import ProbeBatch
from lightning_sketch.curvature import (
    GGN,
    CriticalLearningRate,
    EmpiricalFisher,
    Hessian,
    Preconditioned,
    Stability,
    spectrum,
)
from lightning_sketch.curvature.hessian import HVP, check_hvp
from lightning_sketch.curvature.operator import CurvatureOperator
from lightning_sketch.curvature.result import Method
from lightning_sketch.curvature.spectrum import check_arguments
from lightning_sketch.curvature.weighted_batches import agreement
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.linalg.linearity import checked_defect
from lightning_sketch.operators import LinearOperator

Curvature = Literal["hessian", "ggn", "fisher"]
Precondition = Callable[[CurvatureOperator], Preconditioned]
_KINDS: tuple[Curvature, ...] = get_args(Curvature)
_PROBE_MATVECS = 16  # products of each further start vector, for the density of one layer
_MATVECS = 32  # most products of one layer's spectrum, before those that measure its linearity and its trace


@dataclass
class SpectrumEstimator:
    """Estimate the spectrum of a module's curvature; its fields are the arguments of `SpectrumMonitor`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    curvature: Curvature
    method: Method
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
    output_loss_fn: OutputLossName | Callable[[Tensor, Any], Tensor] | None
    weight_fn: Callable[[Any], float] | None
    num_examples: int | Callable[[Any], int] | None
    batch_dim: int
    micro_batch_size: int | None
    hvp: HVP
    mode: Mode = "eval"
    noise_samples: int = 1
    over_batches: bool = False

    def __post_init__(self):
        if self.curvature not in _KINDS:
            raise ValueError(f"curvature={shown(self.curvature)} is not known; use {', '.join(map(repr, _KINDS))}.")
        if self.curvature != "ggn" and (self.model_fn or self.output_loss_fn):
            raise ValueError(
                f"model_fn and output_loss_fn define a Gauss-Newton matrix, got curvature={self.curvature!r}; use "
                "curvature='ggn', or loss_fn."
            )
        if self.over_batches and self.method == "projected":
            raise ValueError("over_batches=True needs eigenvectors, which method='projected' has not; use 'lanczos'.")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is 'eval' or 'train', got {self.mode!r}; leave it out for 'eval'.")
        whole_number(self.top_k, "top_k", usual=10)
        whole_number(self.noise_samples, "noise_samples", usual=1)
        if self.micro_batch_size is not None:
            whole_number(self.micro_batch_size, "micro_batch_size", usual=8)
        check_patterns(self.parameters)
        if self.loss_fn is not None:
            check_loss_fn(self.loss_fn)
        check_hvp(self.hvp)
        if self.curvature != "hessian" and self.hvp != "auto":
            raise ValueError(
                f"hvp={self.hvp!r} applies to a Hessian only, got curvature={self.curvature!r}; leave hvp out."
            )
        if isinstance(self.per_layer, str):
            raise ValueError(
                f"per_layer is True or a list of patterns, got {self.per_layer!r}; use [{self.per_layer!r}]."
            )
        check_arguments(
            self.num_matvecs, self.dim, self.top_k, self.bottom_k, self.tol, self.density_probes, method=self.method
        )
        if (
            self.curvature != "hessian"
        ):  # never negative: the smallest eigenvalues are zeros, whose number stays unknown
            self.bottom_k = 0

    def compared(self, now: Stability) -> Stability:
        """Return the stability that eigenvalues of the matrix are compared with, of the optimizer's as it is now."""
        if self.curvature == "fisher":
            return now._replace(edge=math.nan, reason="the empirical Fisher matrix is not the curvature of the loss")
        if self.method == "projected":
            return now._replace(edge=math.nan, reason="eigenvalues of a projected matrix are approximate")
        if self.parameters != "*":
            return now._replace(optimizer=f"{now.optimizer}, parameters {self.parameters!r} alone")
        return now

    def check(self, module: nn.Module, batches: Sequence[ProbeBatch], distributed: bool) -> None:
        """Take three products as a sanity check, so that a setup that cannot work fails within seconds.

        Args:
            module: The module that is trained.
            batches: The probe batches that are there so far.
            distributed: Whether products are averaged over ranks.

        Raises:
            ValueError: If the matrix cannot be built or multiplied, if a pattern of `per_layer` matches no parameter,
                or if a Gauss-Newton matrix is of another loss than the one that is trained.
        """
        with agreement(distributed, _device(module)):
            self._check(self.matrix(module, batches, distributed), module)

    def _check(self, matrix: CurvatureOperator, module: nn.Module) -> None:
        for names in _layer_groups(matrix.layout, self.per_layer).values():
            Layout.of(module, names)
        matrix.loss()  # raises for a Gauss-Newton matrix of another loss than the one that is trained
        with matrix.hold():
            u, v = (start_vector(matrix, self.seed, name=name) for name in ("0", "defect"))
            checked_defect(matrix, u, v, random=True)

    def check_weights(self, module: nn.Module, batches: Sequence[ProbeBatch], distributed: bool) -> None:
        """Raise ValueError if the weight of a batch in the mean is unknown; to be called once all batches are there."""
        with agreement(distributed, _device(module)):
            self.matrix(module, batches, distributed).batches.check_weights()

    def measure(
        self,
        module: nn.Module,
        batches: Sequence[ProbeBatch],
        epoch: int,
        step: int,
        distributed: bool,
        on_product: Callable[[int, int], None] | None,
        precondition: Precondition | None = None,
        critical: Callable[[CurvatureOperator], CriticalLearningRate] | None = None,
    ) -> Measurement:
        """Estimate the spectrum of a module with its present weights.

        Args:
            module: The module that is measured.
            batches: The probe batches, on the module's device.
            epoch: The epoch that is recorded.
            step: The optimizer step that is recorded.
            distributed: Whether products are averaged over ranks.
            on_product: Called with the number of products done and their maximum, after each product.
            precondition: Makes the preconditioned matrix, whose spectrum is estimated instead, also of layers.
            critical: Returns the critical learning rate of the last step.
        """
        with agreement(distributed, _device(module)):
            return self._measure(module, batches, epoch, step, distributed, on_product, precondition, critical)

    def _measure(
        self,
        module: nn.Module,
        batches: Sequence[ProbeBatch],
        epoch: int,
        step: int,
        distributed: bool,
        on_product: Callable[[int, int], None] | None,
        precondition: Precondition | None,
        critical: Callable[[CurvatureOperator], CriticalLearningRate] | None,
    ) -> Measurement:
        start = time.perf_counter()
        matrix = self.matrix(module, batches, distributed)
        loss = matrix.loss()
        operator = precondition(matrix) if precondition else None
        with matrix.hold():
            gradient = matrix.gradient()
            measured = spectrum(
                operator or matrix,
                num_matvecs=self.num_matvecs,
                dim=self.dim,
                seed=self.seed,
                top_k=self.top_k,
                bottom_k=self.bottom_k,
                tol=self.tol,
                density_probes=self.density_probes,
                method=self.method,
                gradient=operator.scale * gradient if operator else gradient,
                over_batches=self.over_batches,
                on_product=on_product,
            )
        self.micro_batch_size = matrix.batches.micro_batch_size  # that fits in memory
        layers = _measure_layers(
            lambda names: (precondition or _same)(self.matrix(module, batches, distributed, parameters=names)),
            _layer_groups(matrix.layout, self.per_layer),
            self.seed,
            self.tol,
            self.density_probes,
        )
        own: dict[str, Any] = {
            "preconditioned": operator is not None,
            "critical": critical(matrix) if critical else None,
        }
        seconds = time.perf_counter() - start
        return Measurement(**vars(measured), epoch=epoch, step=step, loss=loss, seconds=seconds, layers=layers, **own)

    def matrix(
        self,
        module: nn.Module,
        batches: Sequence[ProbeBatch],
        distributed: bool = False,
        parameters: str | Sequence[str] | None = None,
    ) -> CurvatureOperator:
        """Return the curvature matrix of the mean loss over batches.

        Args:
            module: The module; its `training_step` gives the loss unless there is a `loss_fn`.
            batches: The probe batches.
            distributed: Whether products are averaged over ranks.
            parameters: A pattern, or names; the estimator's own pattern if None.
        """
        options: dict[str, Any] = {
            "parameters": self.parameters if parameters is None else parameters,
            "batch_dim": self.batch_dim,
            "micro_batch_size": self.micro_batch_size,
            "distributed": distributed,
            "mode": self.mode,
            "noise_samples": self.noise_samples,
            "noise_seed": self.seed,
        }
        if self.curvature == "ggn":
            options |= {"weight_fn": self.weight_fn, "num_examples": self.num_examples, "loss_fn": self.loss_fn}
            return GGN(module, [probe.batch for probe in batches], self.model_fn, self.output_loss_fn, **options)
        options |= {
            "weight_fn": self._probe_weight if self.weight_fn else None,
            "num_examples": _ProbeStructure(self.num_examples, self.batch_dim),
        }
        if self.curvature == "fisher":
            return EmpiricalFisher(self._loss, module, batches, **options)
        return Hessian(self._loss, module, batches, hvp=self.hvp, **options)

    def _probe_weight(self, probe: ProbeBatch) -> float:
        """Return the weight of a probe batch in the mean, by the user's `weight_fn`."""
        assert self.weight_fn is not None
        return self.weight_fn(probe.batch)

    def _loss(self, module: nn.Module, probe: ProbeBatch) -> Tensor:
        """Return the mean loss of a probe batch."""
        batch = copy.deepcopy(probe.batch)  # a training_step may change its batch in place
        try:
            with precision_of_training(module) if is_sharded(module) else nullcontext():
                if self.loss_fn:
                    return self.loss_fn(module, batch)
                return training_step_loss(module, batch, batch_idx=probe.index)
        except (RuntimeError, ValueError) as error:
            if self.mode == "train" or not str(error).startswith("training_step of"):
                raise
            error.args = (f"{error} In evaluation mode, that is: mode='train' measures in training mode.",)
            raise


class _ProbeStructure(BatchStructure):
    """Count the examples of a probe batch, and split it into probe batches."""

    def count(self, batch: ProbeBatch) -> int:
        """Return the number of examples."""
        return super().count(batch.batch)

    def parts(self, batch: ProbeBatch, size: int, examples: int | None = None) -> Iterator[tuple[ProbeBatch, int]]:
        """Yield parts of at most `size` examples, with their numbers of examples."""
        examples = self.count(batch) if examples is None else examples
        for part, number in super().parts(batch.batch, size, examples):
            yield replace(batch, batch=part), number


def _same(matrix: CurvatureOperator) -> CurvatureOperator:
    """Return the matrix as it is."""
    return matrix


def _device(module: nn.Module) -> torch.device:
    """Return the device of a module, on which ranks sum."""
    return next(module.parameters()).device


def _layer_groups(layout: Layout, per_layer: bool | Sequence[str]) -> dict[str, list[str]]:
    """Return the names or patterns of the parameters of each layer: one group per pattern, or per module with any."""
    if isinstance(per_layer, bool):
        found: dict[str, list[str]] = {}
        for name in layout.names if per_layer else ():
            found.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return found
    return {pattern: [pattern] for pattern in per_layer}


def _measure_layers(
    block: Callable[[list[str]], LinearOperator],
    groups: Mapping[str, list[str]],
    seed: int,
    tol: float,
    density_probes: int,
) -> dict[str, LayerCurvature]:
    """Measure the top eigenvalue and the trace of each layer's block, and its density if there are probes.

    At most 42 products each, and 16 more for each probe after the first.

    Args:
        block: Names of parameters -> the curvature matrix of these parameters alone.
        groups: The names of the parameters of each layer.
        seed: The seed of the start vectors.
        tol: The relative residual up to which an eigenvalue counts as converged.
        density_probes: The number of further start vectors for the density.
    """
    found = {}
    for group, parameters in groups.items():
        sp = spectrum(
            block(parameters),
            num_matvecs=_MATVECS,
            dim=1024,
            seed=seed,
            top_k=1,
            bottom_k=0,
            tol=tol,
            density_probes=density_probes,
            density_matvecs=_PROBE_MATVECS,
        )
        nodes, weights = sp.quadrature if density_probes and sp.quadrature else (None, None)
        found[group] = LayerCurvature(
            sp.lambda_max,
            float(sp.residuals[0]),
            bool(sp.converged[0]),
            sp.trace,
            sp.trace_sem,
            sp.num_products,
            nodes,
            weights,
        )
    return found


class InitialWeights:
    """A copy of a module's parameters and buffers.

    Args:
        module: The module whose present values are copied.
    """

    def __init__(self, module: nn.Module):
        reshard(module)
        self.values = {name: local(tensor).clone() for name, tensor in _state(module).items()}

    @contextmanager
    def loaded_into(self, module: nn.Module) -> Iterator[None]:
        """Give a module the copied values for as long as the context lasts, then its own tensors again."""
        reshard(module)
        state = _state(module)  # a buffer that was registered later is unaffected
        if is_sharded(module):  # FSDP refers to the memory of its shards
            with _written_into({state[name]: value for name, value in self.values.items() if name in state}):
                yield
            return
        now = {name: tensor.data for name, tensor in state.items() if name in self.values}
        try:
            for name in now:
                state[name].data = self.values[name]
            yield
        finally:
            for name, value in now.items():
                state[name].data = value


@contextmanager
def _written_into(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Write values into tensors, of sharded ones this rank's shard, and the present values again afterwards."""
    before = {tensor: local(tensor).clone() for tensor in values}
    try:
        for tensor, value in values.items():
            local(tensor).copy_(value)
        yield
    finally:
        for tensor, value in before.items():
            local(tensor).copy_(value)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name, also buffers that its state dict leaves out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
