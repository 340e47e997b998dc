"""The generalized Gauss-Newton matrix: curvature of the loss, as if the model were linear in its parameters.

    G = sum_b w_b J_bᵀ H_b J_b / sum_b w_b

J_b    Jacobian of the model's output on batch b with respect to the parameters
H_b    Hessian of the batch's mean loss with respect to that output; G is positive semidefinite if it is

For cross-entropy it is the Fisher information matrix of the model's own predictions.

Source: Schraudolph (2002), doi:10.1162/08997660260028683; Martens (2020), "New insights and perspectives on the
natural gradient method", JMLR 21(146), section 8.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.losses import LossFn, OutputModel
from lightning_sketch.autodiff.second_derivatives import Jacobian, nothing_dropped, second_derivative_errors
from lightning_sketch.curvature.operator import CurvatureOperator, Product


class GGN(CurvatureOperator):
    """Gauss-Newton matrix of the mean loss over batches, at the module's present parameters.

    Args:
        module: where the matrix is taken; see `CurvatureOperator` for it and all further arguments.
        batches: a list of batches, or any iterable that can be read again and again.
        model_fn: (module, batch) -> output, a tensor. By default `module(**batch)` for a mapping, else `module(x)`
            with x the first item of the batch, and of a LightningModule without `forward` its only child with
            parameters; of what a Hugging Face model returns, the logits.
        output_loss_fn: (output, batch) -> mean loss, convex in the output, or "cross_entropy", "binary_cross_entropy",
            "squared_error". It is differentiated by autograd unless it has a method `hessian_matvec(output, batch, u)`,
            as `CrossEntropy` and `SquaredError` do. By default the loss that a Hugging Face model returns beside its
            logits; else the one of the three that has the value of the loss that is trained; where that is not known,
            cross-entropy for whole-number labels, squared error for real ones. Labels are the batch's "labels", or its
            last item.
        loss_fn: the loss that is trained, (module, batch) -> mean loss, by which a default output loss is checked on
            every batch; the module's own `training_step` if None, and nothing where it has none.
        **options: parameters, mode, weight_fn, micro_batch_size, distributed: see `CurvatureOperator`.

    Raises:
        TypeError: as in `CurvatureOperator`.
        ValueError: at a product: if output and labels do not fit, if the default loss of the output is not the one
            that is trained or cannot be told, or an operation of the model cannot be differentiated twice; the message
            names it.

    A product costs two to three gradients, little more than one for a single batch.

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
        output_loss_fn: str | Callable[[Tensor, Any], Tensor] | None = None,
        *,
        loss_fn: LossFn | None = None,
        **options: Any,
    ):
        super().__init__(module, batches, **options)
        self.model = OutputModel(module, model_fn, output_loss_fn, loss_fn)

    def linearize(self, batch: Any, keep: bool) -> Product:
        """V -> J_bᵀ H_b J_b v."""
        output, own = self.model.forward(batch)
        jacobian = Jacobian(self._differentiable(output), self.parameters)
        hessian = _loss_hessian(output, self._loss_of(output, own, batch), own, batch)
        return lambda pieces: jacobian.rmatvec(hessian(jacobian.matvec(pieces)), keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """L_b, the mean loss of the batch."""
        output, own = self.model.forward(batch)
        loss_fn = self._loss_of(output, own, batch)
        return own if loss_fn is None else loss_fn(output, batch)

    def _loss_of(self, output: Tensor, own: Tensor | None, batch: Any) -> Callable[[Tensor, Any], Tensor] | None:
        """Compared with the loss that is trained until every batch was, which then come again."""
        return self.model.loss_of(output, own, batch, compare=not self._all_seen)


def _loss_hessian(
    output: Tensor, loss_fn: Callable | None, loss: Tensor | None, batch: Any
) -> Callable[[Tensor], Tensor]:
    """U -> H_b u."""
    if hasattr(loss_fn, "hessian_matvec"):
        loss_fn(output, batch)  # refuses what does not fit
        return lambda u: loss_fn.hessian_matvec(output, batch, u)
    if loss_fn is not None:
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
