"""The Hessian of a loss as a linear operator.

    H = ∇²L(θ),     L(θ) = sum_b w_b L_b(θ) / sum_b w_b          H: R^n -> R^n, symmetric

b      a batch, of weight w_b (its number of examples) and mean loss L_b
θ      the chosen parameters, as one flat vector in the order of `Layout`

One product costs about three gradients of every batch, under two of a single one, whose graph is
kept; nothing of size n² is ever made. How it is made: `autodiff.second_derivatives`.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.second_derivatives import (
    NoSecondDerivative,
    double_backward,
    finite_differences,
    forward_over_reverse,
)
from lightning_sketch.curvature.operator import CurvatureOperator, Product
from lightning_sketch.linalg.lanczos import dot, start_vector

_STEPS_AGREE = 0.02


class Hessian(CurvatureOperator):
    """Hessian of the mean loss over batches, at the module's present parameters.

    Args:
        loss_fn: (module, batch) -> mean loss of the batch, a scalar.
        module: where the Hessian is taken; see `CurvatureOperator` for it and all further arguments.
        batches: a list of batches, or any iterable that can be read again and again.
        hvp: how products are made. "double_backward" serves most modules, and is kept ready for a single batch;
            "forward_over_reverse" takes less memory, and fails where PyTorch has no forward derivative; "auto" is
            the first, or the second where the first is impossible. "finite_differences" needs first derivatives only;
            it is good to three digits on smooth losses, and refused where two step sizes disagree, as with ReLU.
        step: of finite differences, along a unit vector of parameters.
        **options: parameters, mode, weight_fn, micro_batch_size, distributed: see `CurvatureOperator`.

    Raises:
        TypeError: as in `CurvatureOperator`.
        ValueError: at a product: if the loss is no scalar, does not depend on the parameters, or holds
            an operation that PyTorch cannot differentiate twice; the message names it.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> h = Hessian(lambda module, batch: module(batch).square().mean(), module, [x])
    >>> h.matvec(torch.tensor([1.0, 1.0]))  # 2 xᵀx / 2 times (1, 1)
    tensor([1., 4.])
    """

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        module: nn.Module,
        batches: Iterable[Any],
        *,
        hvp: str = "auto",
        step: float = 1e-3,
        **options: Any,
    ):
        super().__init__(module, batches, **options)
        check_hvp(hvp)
        if not step > 0:
            raise ValueError(f"need step > 0, got {step}.")
        self.loss_fn, self.hvp, self.step = loss_fn, hvp, step
        self._steps_agree = False  # not looked yet

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """H x for each vector along the last axis, one after the other."""
        if self.hvp == "finite_differences" and not self._steps_agree:
            self._check_steps()
        try:
            return super().matvec(x)
        except NoSecondDerivative as refusal:
            if self.hvp != "auto":
                raise
            try:
                self.hvp = "forward_over_reverse"
                self._forget()
                return super().matvec(x)
            except Exception as second:
                self.hvp = "auto"
                raise (second if isinstance(second, torch.OutOfMemoryError) else refusal) from second

    rmatvec = matvec

    def linearize(self, batch: Any, keep: bool) -> Product:
        """V -> ∇²L_b v."""
        loss_now = functools.partial(self._differentiable_loss, batch)
        if self.hvp == "finite_differences":
            return finite_differences(loss_now, self.module, self.parameters, self.step)
        if self.hvp == "forward_over_reverse":
            return forward_over_reverse(loss_now, self.module, self.parameters)
        return double_backward(loss_now, self.parameters, keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """L_b(θ)."""
        loss = self.loss_fn(self.module, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"loss_fn returns the mean loss of a batch, a scalar tensor; got {got}; use .mean().")
        return loss

    def _differentiable_loss(self, batch: Any) -> Tensor:
        return self._differentiable(self.batch_loss(batch))

    def _check_steps(self) -> None:
        """Compare two step sizes, on a random vector and on one that the operator has shaped."""
        v = start_vector(self, 0, "finite differences")
        with self.hold(), self._trusted():
            half = copy.copy(self)
            half.step = self.step / 2
            for vector in (v, self._smoothed(v)):
                fine, coarse = half.matvec(vector), self.matvec(vector)
                rest = fine - coarse
                change = (dot(rest, rest) / dot(fine, fine)) ** 0.5 if dot(rest, rest) else 0.0
                if not change <= _STEPS_AGREE:
                    raise ValueError(
                        f"finite differences with steps of {self.step:g} and {self.step / 2:g} differ by {change:.0%}: "
                        "the loss has kinks (ReLU, max-pooling) or the step does not fit it. Use hvp='auto', smooth "
                        "activations, or another step."
                    )

    @contextmanager
    def _trusted(self) -> Iterator[None]:
        """Take products without looking; for good, unless something is raised."""
        self._steps_agree = True
        try:
            yield
        except BaseException:
            self._steps_agree = False
            raise

    def _smoothed(self, v: Tensor) -> Tensor:
        """A³ v, scaled to length one: what a Krylov vector looks like."""
        for _ in range(3):
            v = self.matvec(v)
            v = v / (dot(v, v) ** 0.5 or 1.0)
        return v


def check_hvp(hvp: str) -> None:
    """Refuse an unknown way to a Hessian product."""
    ways = ("auto", "double_backward", "forward_over_reverse", "finite_differences")
    if hvp not in ways:
        raise ValueError(f"hvp is one of {', '.join(ways)}, got {hvp!r}.")
