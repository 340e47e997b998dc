"""The empirical Fisher matrix: the mean outer product of the gradients of single examples.

    F = sum_i g_i g_iᵀ / N = Jᵀ J / N

g_i    gradient of the loss of example i, at the true label
J      Jacobian of the examples' losses with respect to the parameters, N x n

It is neither the Fisher information nor an approximation of the Hessian far from a perfect fit.

Source: Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation for natural gradient
descent", NeurIPS 2019, arXiv:1905.12558, eq. (3).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch._arguments import check_loss_fn
from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.autodiff.second_derivatives import Jacobian
from lightning_sketch.curvature.operator import CurvatureOperator, Product


class EmpiricalFisher(CurvatureOperator):
    """The empirical Fisher matrix over batches, at the module's present parameters.

    Args:
        loss_fn: (module, batch) -> the losses of the examples, (examples,), which is fast; or their mean, a scalar,
            and then it is called for one example at a time.
        module: The module at whose present parameters the matrix is computed. See `CurvatureOperator` for more about
            this and the arguments from `parameters` on.
        batches: A list of batches, or any iterable that can be read again and again.
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
        ValueError: At a product, if `loss_fn` returns neither, or a mean that is not that of its examples.

    A product costs two to three gradients, or about ten times as much with one example at a time. Memory is that of
    the graphs of a batch, or of a micro-batch.

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
        *,
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
        check_loss_fn(loss_fn)
        self.loss_fn = loss_fn

    def linearize(self, batch: Any, keep: bool) -> Product:
        """Return v -> Jᵀ J v / N for one batch."""
        losses = self._differentiable(self._losses(batch))
        jacobian = Jacobian(losses, self.parameters)
        return lambda pieces: jacobian.rmatvec(jacobian.matvec(pieces) / len(losses), keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of the batch."""
        return self._call_loss(batch).mean()

    def _call_loss(self, batch: Any) -> Tensor:
        """Return what `loss_fn` returns: the mean loss, or the losses of the examples."""
        loss = self.evaluate(self.loss_fn, self.module, batch)
        if not isinstance(loss, Tensor) or (loss.ndim and loss.shape != (self.batches.structure.count(batch),)):
            examples = self.batches.structure.count(batch)
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"loss_fn returns the losses of {examples} examples, or their mean; got {got}; return the loss alone."
            )
        return loss

    def _losses(self, batch: Any) -> Tensor:
        """Return the losses of the examples, by one call or by one call for each."""
        loss = self.finite(self._call_loss(batch))
        if loss.ndim:
            return loss
        losses = torch.stack([self._call_loss(example).squeeze() for example in self._examples(batch)])
        if not self.batches.is_random and not torch.allclose(
            losses.detach().mean(), loss := loss.detach(), rtol=1e-3, atol=1e-6
        ):
            raise ValueError(
                f"the loss of the batch, {float(loss):.6g}, is not the mean of the losses of its examples, "
                f"{float(losses.detach().mean()):.6g}, so these have no gradients of their own; return one loss each."
            )
        return losses

    def _examples(self, batch: Any) -> Iterator[Any]:
        """Yield batches of one example each, which draw random numbers of their own."""
        index, start, draw = self.batches.key
        for i, (example, _) in enumerate(self.batches.structure.parts(batch, 1)):
            self.batches.key = index, start + i, draw
            yield example
        self.batches.key = index, start, draw
