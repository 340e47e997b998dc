"""The generalized Gauss-Newton matrix: curvature of the loss, as if the model were linear in its parameters.

    G = sum_b w_b J_bᵀ H_b J_b / sum_b w_b

J_b    Jacobian of the model's output on batch b with respect to the parameters
H_b    Hessian of the batch's mean loss with respect to that output; G is positive semidefinite if it is

For cross-entropy it is the Fisher information matrix of the model's own predictions.

Source: Schraudolph (2002), doi:10.1162/08997660260028683; Martens (2020), "New insights and perspectives on the
natural gradient method", JMLR 21(146), section 8.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.output_losses import usual_loss
from lightning_sketch.autodiff.second_derivatives import Jacobian, nothing_dropped, second_derivative_errors
from lightning_sketch.curvature.operator import CurvatureOperator, Product


class GGN(CurvatureOperator):
    """Gauss-Newton matrix of the mean loss over batches, at the module's present parameters.

    Args:
        module: where the matrix is taken; see `CurvatureOperator` for it and all further arguments.
        batches: a list of batches, or any iterable that can be read again and again.
        model_fn: (module, batch) -> output, a tensor. By default `module(**batch)` for a mapping, else `module(x)`
            with x the first item of the batch; of what a Hugging Face model returns, the logits.
        output_loss_fn: (output, batch) -> mean loss, convex in the output. It is differentiated by autograd unless it
            has a method `hessian_matvec(output, batch, u)`, as `CrossEntropy` and `SquaredError` do. By default the
            loss that a Hugging Face model returns beside its logits; else cross-entropy for whole-number labels,
            squared error for real ones. Labels are the batch's "labels", or its last item.
        **options: parameters, mode, weight_fn, micro_batch_size, distributed: see `CurvatureOperator`.

    Raises:
        TypeError: as in `CurvatureOperator`.
        ValueError: at a product: if output and labels do not fit, or an operation of the model cannot be
            differentiated twice; the message names it.

    A product costs two to three gradients, little more than one for a single batch.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> GGN(module, [batch]).matvec(torch.tensor([1.0, 1.0]))  # squared error: 2 xᵀx / 2 times (1, 1)
    tensor([1., 4.])
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        model_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_loss_fn: Callable[[Tensor, Any], Tensor] | None = None,
        **options: Any,
    ):
        super().__init__(module, batches, **options)
        self.model_fn, self.output_loss_fn = model_fn or _call, output_loss_fn

    def linearize(self, batch: Any, keep: bool) -> Product:
        """V -> J_bᵀ H_b J_b v."""
        output, loss_fn, loss = self._forward(batch)
        jacobian = Jacobian(self._differentiable(output), self.parameters)
        hessian = _loss_hessian(output, loss_fn, loss, batch)
        return lambda pieces: jacobian.rmatvec(hessian(jacobian.matvec(pieces)), keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """L_b, the mean loss of the batch."""
        output, loss_fn, loss = self._forward(batch)
        return loss_fn(output, batch) if loss is None else loss

    def _forward(self, batch: Any) -> tuple[Tensor, Callable | None, Tensor | None]:
        """The output, and either the loss as a function of it or the loss that the model made of it."""
        returned = self.model_fn(self.module, batch)
        output = getattr(returned, "logits", returned)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the model returned a {type(returned).__name__}; pass model_fn=lambda module, batch: ... that returns "
                "its output as one tensor."
            )
        own = getattr(returned, "loss", None)
        if self.output_loss_fn is None and own is not None:
            return output, None, own
        return output, self.output_loss_fn or usual_loss(batch), None


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        try:
            return module(**batch)
        except TypeError as error:
            raise ValueError(
                f"{type(module).__name__} cannot be called with {', '.join(map(str, batch))}: {error}. Pass "
                "model_fn=lambda module, batch: output, and output_loss_fn."
            ) from error
    return module(batch[0] if isinstance(batch, list | tuple) else batch)


def _loss_hessian(
    output: Tensor, loss_fn: Callable | None, loss: Tensor | None, batch: Any
) -> Callable[[Tensor], Tensor]:
    """U -> H_b u."""
    if hasattr(loss_fn, "hessian_matvec"):
        loss_fn(output, batch)  # refuses what does not fit
        return lambda u: loss_fn.hessian_matvec(output, batch, u)
    if loss is None:
        output = output.detach().requires_grad_()
        loss = loss_fn(output, batch)
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"output_loss_fn returns the mean loss of a batch, a scalar tensor; got {got}; use .mean().")
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
