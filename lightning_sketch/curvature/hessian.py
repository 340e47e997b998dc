"""The Hessian of a loss as a linear operator.

    H = ∇²L(θ),     L(θ) = sum_b w_b L_b(θ) / sum_b w_b          H: R^n -> R^n, symmetric

b      a batch, of weight w_b (its number of examples) and mean loss L_b
θ      the selected parameters, as one flat vector in the order of `Layout`

One product costs about three gradients of every batch, and less than two for a single batch, whose graph is
kept. Nothing of size n² is ever computed. The module `autodiff.second_derivatives` computes the products.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.autodiff.second_derivatives import (
    NoSecondDerivative,
    double_backward,
    finite_differences,
    forward_over_reverse,
)
from lightning_sketch.curvature.operator import CurvatureOperator, Product
from lightning_sketch.linalg.lanczos import dot, start_vector

_STEPS_AGREE = 0.02  # largest relative difference between finite differences with two steps

HVP = Literal["auto", "double_backward", "forward_over_reverse", "finite_differences"]


class Hessian(CurvatureOperator):
    """The Hessian of the mean loss over batches, at the module's present parameters.

    Args:
        loss_fn: (module, batch) -> mean loss of the batch, a scalar.
        module: The module at whose present parameters the Hessian is computed. See `CurvatureOperator` for more about
            this and the arguments from `parameters` on.
        batches: A list of batches, or any iterable that can be read again and again.
        hvp: How products are computed. "double_backward" supports most modules, and keeps the graph of a single batch;
            "forward_over_reverse" needs less memory, and fails where PyTorch has no forward derivative; "auto" is
            the first, or the second where the first is impossible. "finite_differences" needs first derivatives only;
            it has three correct digits on smooth losses, and is refused where two steps disagree, as with ReLU.
        step: The step of finite differences, along a unit vector of parameters.
        parameters: Shell patterns that select parameters by name.
        mode: "eval", or "train" to leave each submodule in its mode.
        weight_fn: A function batch -> its weight in the mean; its number of examples by default.
        num_examples: The number of examples of a batch, or a function batch -> number; by default read off its tensors.
        batch_dim: The axis of the examples, 1 for (time, batch, ...).
        micro_batch_size: Most examples differentiated at once; larger batches are cut.
        distributed: Whether to sum over the ranks of the default process group, each with its own batches.

    Raises:
        TypeError: As in `CurvatureOperator`.
        ValueError: If `hvp` is unknown or `step` is not positive. At a product, if the loss is no scalar, does not
            depend on the parameters, or contains an operation that PyTorch cannot differentiate twice; the message
            names it.

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
        hvp: HVP = "auto",
        step: float = 1e-3,
        parameters: str | Sequence[str] = "*",
        mode: Mode = "eval",
        weight_fn: Callable[[Any], float] | None = None,
        num_examples: int | Callable[[Any], int] | BatchStructure | None = None,
        batch_dim: int = 0,
        micro_batch_size: int | None = None,
        distributed: bool = False,
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
        )
        check_hvp(hvp)
        if not step > 0:
            raise ValueError(f"need step > 0, got {step}.")
        self.loss_fn, self.step = loss_fn, step
        self.hvp: HVP = hvp
        self._steps_agree = False  # becomes True once two steps have been compared

    def __repr__(self) -> str:
        return f"{super().__repr__()}, hvp={self.hvp!r}"

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return H x for each vector x along the last axis, one after the other."""
        if self.hvp == "finite_differences" and not self._steps_agree:
            self._check_steps()
        try:
            return super().matvec(x)
        except NoSecondDerivative as first:
            if self.hvp != "auto":
                raise
            try:
                self.hvp = "forward_over_reverse"
                self._forget()
                return super().matvec(x)
            except Exception as second:
                self.hvp = "auto"
                raise (second if isinstance(second, torch.OutOfMemoryError) else first) from second

    def linearize(self, batch: Any, keep: bool) -> Product:
        """Return v -> ∇²L_b v for one batch."""
        loss_now = functools.partial(self._differentiable_loss, batch)
        if self.hvp == "finite_differences":
            return finite_differences(loss_now, self.module, self.parameters, self.step)
        if self.hvp == "forward_over_reverse":
            return forward_over_reverse(loss_now, self.module, self.parameters)
        return double_backward(loss_now, self.parameters, keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of the batch, L_b(θ)."""
        loss = self.loss_fn(self.module, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"loss_fn returns the mean loss of a batch, a scalar tensor; got {got}; use .mean().")
        return loss

    def _differentiable_loss(self, batch: Any) -> Tensor:
        return self._differentiable(self.batch_loss(batch))

    def _check_steps(self) -> None:
        """Refuse finite differences if two steps disagree, on a random vector or on A³ times it."""
        v = start_vector(self, 0, name="finite differences")
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
        """Take products without comparing steps, inside and, unless an error is raised, also afterwards."""
        self._steps_agree = True
        try:
            yield
        except BaseException:
            self._steps_agree = False
            raise

    def _smoothed(self, v: Tensor) -> Tensor:
        """Return A³ v, scaled to length one: similar to the Krylov vectors of a run."""
        for _ in range(3):
            v = self.matvec(v)
            v = v / (dot(v, v) ** 0.5 or 1.0)
        return v


def check_hvp(hvp: str) -> None:
    """Refuse an unknown way to compute Hessian products.

    Raises:
        ValueError: If `hvp` is none of `HVP`.
    """
    if hvp not in get_args(HVP):
        raise ValueError(f"hvp is one of {', '.join(get_args(HVP))}, got {hvp!r}.")
