"""The generalized Gauss-Newton matrix: the curvature of the loss if the model were linear in its parameters.

    G = sum_b w_b J_bᵀ H_b J_b / sum_b w_b

J_b    Jacobian of the model's output on batch b with respect to the parameters
H_b    Hessian of the batch's mean loss with respect to that output; G is positive semidefinite if every H_b is

For cross-entropy it is the Fisher information matrix of the model's own predictions.

Source: Schraudolph (2002), doi:10.1162/08997660260028683; Martens (2020), "New insights and perspectives on the
natural gradient method", JMLR 21(146), section 8.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch._arguments import check_loss_fn, not_scalar
from lightning_sketch.autodiff.batches import BatchStructure, differentiable
from lightning_sketch.autodiff.functional import HeldTargets, swap_tensors
from lightning_sketch.autodiff.losses import LossFn, OutputLossName, OutputModel
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.autodiff.second_derivatives import (
    Disagreement,
    Jacobian,
    disagreement,
    functions_in,
    graph_nodes,
    norm,
    nothing_dropped,
    second_derivative_errors,
)
from lightning_sketch.curvature.operator import CurvatureOperator, Product

_COMPARED = 8  # examples for which derivatives are compared with differences


class GGN(CurvatureOperator):
    """The Gauss-Newton matrix of the mean loss over batches, at the module's present parameters.

    Args:
        module: The module at whose present parameters the matrix is computed. See `CurvatureOperator` for more about
            this and the arguments from `parameters` on.
        batches: A list of batches, or any iterable that can be read again and again.
        model_fn: (module, batch) -> output, a tensor. By default `module(**batch)` for a mapping, else `module(x)`
            with x the first item of the batch. A LightningModule without `forward` is replaced by its only child with
            parameters; from what a Hugging Face model returns, the logits are taken.
        output_loss_fn: (output, batch) -> mean loss, convex in the output, or "cross_entropy", "binary_cross_entropy",
            "squared_error". A function is differentiated by autograd unless it has a method
            `hessian_matvec(output, batch, u)`, as `CrossEntropy` and `SquaredError` do. The default is the loss that a
            Hugging Face model returns beside its logits; else the one of the three whose value is that of the training
            loss; if this is not known, cross-entropy for integer labels and squared error for real ones. Labels are
            the batch's "labels", or its last item.
        loss_fn: The training loss, (module, batch) -> mean loss, with which a default output loss is compared on
            every batch. By default the module's own `training_step`; without one nothing is compared.
        parameters: Shell patterns that select parameters by name.
        mode: "eval", or "train" to leave each submodule in its mode.
        weight_fn: A function batch -> its weight in the mean; its number of examples by default.
        num_examples: The number of examples of a batch, or a function batch -> number; by default read off its tensors.
        batch_dim: The axis of the examples, 1 for (time, batch, ...).
        micro_batch_size: Most examples differentiated at once; larger batches are cut.
        distributed: Whether to sum over the ranks of the default process group, each with its own batches.
        noise_samples: The number of draws of random numbers that the loss is averaged over, if it draws any.
        noise_seed: The seed of these draws.

    Raises:
        TypeError: As in `CurvatureOperator`.
        ValueError: At a product, if output and labels do not fit, if the default loss of the output is ambiguous or
            not the training loss, or if an operation of the model cannot be differentiated twice; the message names it.

    A product costs two to three gradients, and little more than one for a single batch.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5], [3.0]])
    >>> GGN(module, [batch]).matvec(torch.tensor([1.0, 1.0]))  # squared error: 2 xᵀx / 2 times (1, 1)
    tensor([1., 4.])
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        model_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_loss_fn: OutputLossName | Callable[[Tensor, Any], Tensor] | None = None,
        *,
        loss_fn: LossFn | None = None,
        parameters: str | Sequence[str] = "*",
        mode: Mode = "eval",
        weight_fn: Callable[[Any], float] | None = None,
        num_examples: int | Callable[[Any], int] | BatchStructure | None = None,
        batch_dim: int = 0,
        micro_batch_size: int | None = None,
        distributed: bool = False,
        noise_samples: int = 1,
        noise_seed: int = 0,
    ):
        super().__init__(
            module,
            batches,
            parameters=parameters,
            mode=mode,
            weight_fn=weight_fn,
            num_examples=num_examples,
            batch_dim=batch_dim,
            micro_batch_size=micro_batch_size,
            distributed=distributed,
            noise_samples=noise_samples,
            noise_seed=noise_seed,
        )
        for name, function, arguments in (
            ("model_fn", model_fn, ("module", "batch")),
            ("output_loss_fn", output_loss_fn, ("output", "batch")),
            ("loss_fn", loss_fn, ("module", "batch")),
        ):
            if function is not None and not isinstance(function, str):
                check_loss_fn(function, name, arguments)
        self.model = OutputModel(module, model_fn, output_loss_fn, loss_fn)
        self._compared: set[int] = set()  # batches whose derivatives were compared with differences

    def linearize(self, batch: Any, keep: bool) -> Product:
        """Return v -> J_bᵀ H_b J_b v for one batch."""
        if self.batches.key[0] not in self._compared:
            self._compare(batch)
            self._compared.add(self.batches.key[0])
        output, own = self.evaluate(self.model.forward, batch)
        jacobian = Jacobian(self._differentiable(output), self.parameters)
        hessian = _loss_hessian(output, self._loss_of(output, own, batch), own, batch)
        return lambda pieces: jacobian.rmatvec(hessian(jacobian.matvec(pieces)), keep)

    def _compare(self, batch: Any) -> None:
        """Compare J v, and the Hessian of the output's loss times a vector, with differences, for a few examples.

        The first batch is compared, and every other one whose graph has a custom autograd function.

        Raises:
            ValueError: If they differ by more than the differences' own error.
        """
        few = self.batches.few(batch, _COMPARED)
        try:
            output, own = self.evaluate(self.model.forward, few)
            loss_fn = self._loss_of(output, own, few)
        except Exception:  # whatever a model makes of a smaller batch: the whole one is what it was given
            few = batch
            output, own = self.evaluate(self.model.forward, few)
            loss_fn = self._loss_of(output, own, few)
        output = self._differentiable(output)
        functions = functions_in(output)
        if not self._compared or functions:
            self._check(self._difference_of_outputs(few, output, not functions), "the Jacobian", functions)
        if loss_fn is None:
            return
        z = output.detach().double().requires_grad_()
        try:
            loss = loss_fn(z, differentiable(few, torch.float64))
            functions = functions_in(loss)
            if not self._compared or functions:
                found = self._difference_of_losses(z, loss_fn, differentiable(few, torch.float64))
                self._check(found, "the Hessian of the output's loss", functions)
        except (RuntimeError, TypeError):  # a loss that is not made for float64
            self._check(None, "the Hessian of the output's loss", functions)

    def _difference_of_outputs(self, batch: Any, output: Tensor, fine: bool) -> Disagreement | None:
        """Compare J v with differences of the output; with fine steps only if no function may round it on its way."""
        jacobian = Jacobian(output, self.parameters)
        v = [torch.randn_like(p) for p in self.parameters]
        for x, g in zip(v, jacobian.rmatvec(torch.randn_like(output), keep=True), strict=True):
            x.mul_(0 if g is None else (g.to_dense() if g.layout != torch.strided else g) != 0)
        if not (length := norm(v)):
            return None
        targets = HeldTargets()

        def at(t: float) -> tuple[float, list[Tensor]]:
            pairs = zip(self.parameters, v, strict=True)
            moved = [torch.add(p.detach(), x, alpha=t / length).requires_grad_() for p, x in pairs]
            with swap_tensors(self.module, self.parameters, moved):
                self._targets = targets
                try:
                    return 0.0, [self.evaluate(self.model.forward, batch)[0].detach()]
                finally:
                    self._targets = None

        fine = (
            fine
            and output.dtype == torch.float64
            and not any("ToCopy" in type(n).__name__ for n in graph_nodes(output))
        )
        return disagreement([jacobian.matvec(v) / length], at, None, fine=fine, coarse=True)

    def _difference_of_losses(
        self, z: Tensor, loss_fn: Callable[[Tensor, Any], Tensor], batch: Any
    ) -> Disagreement | None:
        """Compare the Hessian of the output's loss with differences of its gradient, in float64."""
        u = torch.randn_like(z)
        u /= u.norm()

        def at(t: float) -> tuple[float, list[Tensor]]:
            moved = (z.detach() + t * u).requires_grad_()
            loss = loss_fn(moved, batch)
            return float(loss.detach()), [torch.autograd.grad(loss, moved)[0]]

        slope = float((at(0.0)[1][0] * u).sum())
        return disagreement([_loss_hessian(z, loss_fn, None, batch)(u)], at, slope, fine=True, coarse=True)

    def _check(self, found: Disagreement | None, what: str, functions: Sequence[str]) -> None:
        if found is None and functions:
            warnings.warn(
                f"{what} could not be compared with differences, though {' and '.join(functions)} may compute a wrong "
                "derivative.",
                stacklevel=2,
            )
        if found is not None and not found.relative <= found.bound:
            raise ValueError(
                f"{what} by autograd differs from differences by {100 * found.relative:.2g}%: "
                f"{' or '.join(functions) or 'an operation or a hook'} computes a derivative that is not one; write it "
                "with plain operations, or pass model_fn and output_loss_fn without it."
            )

    def _check_again(self) -> None:
        super()._check_again()
        self._compared.clear()

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of the batch, by the output loss."""
        output, own = self.evaluate(self.model.forward, batch)
        loss_fn = self._loss_of(output, own, batch)
        # Without an output loss the model has returned its own.
        return _scalar(own if loss_fn is None else loss_fn(output, batch))

    def _loss_of(self, output: Tensor, own: Tensor | None, batch: Any) -> Callable[[Tensor, Any], Tensor] | None:
        """Return the output loss, compared with the training loss until every batch has been compared once."""
        self.draw()  # the training loss draws the same numbers as the output did
        return self.model.loss_of(output, own, batch, compare=not self._all_seen)


def _loss_hessian(
    output: Tensor, loss_fn: Callable[[Tensor, Any], Tensor] | None, loss: Tensor | None, batch: Any
) -> Callable[[Tensor], Tensor]:
    """Return u -> H_b u, by the loss's own `hessian_matvec` or by autograd."""
    if loss_fn is not None and hasattr(loss_fn, "hessian_matvec"):
        loss_fn(output, batch)  # raises an error if output and labels do not fit
        hessian_matvec = loss_fn.hessian_matvec
        return lambda u: hessian_matvec(output, batch, u)
    if loss_fn is not None:
        output = output.detach().requires_grad_()
        loss = loss_fn(output, batch)
    loss = _scalar(loss)
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the output; it may have been computed from detached tensors.")
    with second_derivative_errors(), nothing_dropped(loss):
        (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in the output
        return torch.zeros_like

    def product(u: Tensor) -> Tensor:
        with second_derivative_errors():
            return torch.autograd.grad(gradient, output, u, retain_graph=True)[0]

    return product


def _scalar(loss: Any) -> Tensor:
    """Return the mean loss of a batch, or refuse what is none."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(not_scalar("output_loss_fn", loss))
    return loss
