"""The empirical Fisher matrix: the mean outer product of the examples' own gradients.

    F = sum_i g_i g_iᵀ / N = Jᵀ J / N

g_i    gradient of the loss of example i, at the true label
J      Jacobian of the examples' losses with respect to the parameters, N x n

It is neither the Fisher information nor an approximation of the Hessian far from a perfect fit.

Source: Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation for natural gradient
descent", NeurIPS 2019, arXiv:1905.12558, eq. (3).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.second_derivatives import Jacobian
from lightning_sketch.curvature.operator import CurvatureOperator, Product


class EmpiricalFisher(CurvatureOperator):
    """Empirical Fisher matrix over batches, at the module's present parameters.

    Args:
        loss_fn: (module, batch) -> either the losses of the examples, one each, which is fast; or their mean, a
            scalar: then it is called for one example at a time.
        module: where the matrix is taken; see `CurvatureOperator` for it and all further arguments.
        batches: a list of batches, or any iterable that can be read again and again.
        **options: parameters, mode, weight_fn, micro_batch_size, distributed: see `CurvatureOperator`.

    Raises:
        TypeError: as in `CurvatureOperator`.
        ValueError: at a product: if the loss is neither, or a mean that is not that of its examples.

    A product costs two to three gradients, ten times that one example at a time; memory is that of the graphs of a
    batch, or a micro-batch.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> f = EmpiricalFisher(lambda module, batch: module(batch)[:, 0], module, [x])
    >>> f.as_matrix()  # gradients are the rows of x
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        module: nn.Module,
        batches: Iterable[Any],
        **options: Any,
    ):
        super().__init__(module, batches, **options)
        self.loss_fn = loss_fn

    def linearize(self, batch: Any, keep: bool) -> Product:
        """V -> Jᵀ J v / N."""
        losses = self._differentiable(self._losses(batch))
        jacobian = Jacobian(losses, self.parameters)
        return lambda pieces: jacobian.rmatvec(jacobian.matvec(pieces) / len(losses), keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """The mean loss of the batch."""
        return self._one_or_each(batch).mean()

    def _one_or_each(self, batch: Any) -> Tensor:
        loss = self.loss_fn(self.module, batch)
        if not isinstance(loss, Tensor) or (loss.ndim and loss.shape != (self.batches.structure.count(batch),)):
            examples = self.batches.structure.count(batch)
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"loss_fn returns the losses of {examples} examples, or their mean; got {got}.")
        return loss

    def _losses(self, batch: Any) -> Tensor:
        loss = self._one_or_each(batch)
        if loss.ndim:
            return loss
        examples = self.batches.structure.parts(batch, 1)
        losses = torch.stack([self._one_or_each(example).squeeze() for example, _ in examples])
        if not torch.allclose(losses.detach().mean(), loss := loss.detach(), rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"the loss of the batch, {float(loss):.6g}, is not the mean of the losses of its examples, "
                f"{float(losses.detach().mean()):.6g}, so these have no gradients of their own; return one loss each."
            )
        return losses
