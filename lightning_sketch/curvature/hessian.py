"""The Hessian of a loss as a linear operator.

    H = ∇²L(θ),     L(θ) = sum_b w_b L_b(θ) / sum_b w_b          H: R^n -> R^n, symmetric

b      a batch, of weight w_b (its number of examples) and mean loss L_b
θ      the selected parameters, as one flat vector in the order of `Layout`

One product costs about three gradients of every batch, and less than two for a single batch, whose graph is
kept. Nothing of size n² is ever computed. The module `autodiff.second_derivatives` computes the products.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch._arguments import check_loss_fn, not_scalar
from lightning_sketch.autodiff.batches import BatchStructure, differentiable
from lightning_sketch.autodiff.functional import HeldTargets, in_precision
from lightning_sketch.autodiff.memory import is_out_of_memory
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.autodiff.second_derivatives import (
    Disagreement,
    NoSecondDerivative,
    OutsideModule,
    disagreement,
    double_backward,
    finite_differences,
    forward_over_reverse,
    functions_in,
    gradient_at,
    has_kinks,
    norm,
)
from lightning_sketch.autodiff.shards import is_sharded, reshard
from lightning_sketch.curvature.operator import CurvatureOperator, Product
from lightning_sketch.linalg.lanczos import dot, start_vector

_WIDENED = 1 << 26  # parameters up to which products are compared in float64, which takes about ten vectors
_COMPARED = 8  # examples for which a product is compared with differences of gradients

_SLOPE = 1e-3  # relative error of a loss's slope, along its gradient, above which the gradient is looked at again

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
            it has three correct digits on smooth losses, costs four gradients, and is refused where two steps
            disagree, as with ReLU.
        step: The step of finite differences, along a unit vector of parameters; 1e-3 if None, and of a sharded module
            chosen before the first product.
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
        ValueError: If `hvp` is unknown or `step` is not positive. At a product, if the loss is no scalar, is NaN, does
            not depend on the parameters, or contains an operation that PyTorch cannot differentiate twice; the message
            names it. Also if the product differs from a difference of gradients, with which it is compared when a
            matrix is first multiplied, for a custom autograd function may be right once and wrong twice.

    A module whose parameters are DTensors, as FSDP2 and tensor parallelism make them, has its Hessian in shards: see
    `curvature.sharded_hessian.ShardedHessian`, which this then is.

    Where a loss stops gradients (`detach`, targets computed under no_grad), these are held fixed: it is the Hessian of
    the loss as a function of the parameters that gradients reach.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> h = Hessian(lambda module, batch: module(batch).square().mean(), module, [x])
    >>> h.matvec(torch.tensor([1.0, 1.0]))  # 2 xᵀx / 2 times (1, 1)
    tensor([1., 4.])
    """

    def __new__(cls, loss_fn: Any = None, module: Any = None, *args: Any, **options: Any) -> "Hessian":
        """Return a `ShardedHessian` where parameters of the module are sharded."""
        if isinstance(module, nn.Module):
            reshard(module)  # after a forward pass FSDP has whole weights in the module
        if cls is Hessian and isinstance(module, nn.Module) and is_sharded(module):
            from lightning_sketch.curvature.sharded_hessian import ShardedHessian  # which is a Hessian

            return super().__new__(ShardedHessian)
        return super().__new__(cls)

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        module: nn.Module,
        batches: Iterable[Any],
        *,
        hvp: HVP = "auto",
        step: float | None = None,
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
        check_hvp(hvp)
        if step is not None and not step > 0:
            raise ValueError(f"need step > 0, got {step}.")
        self.loss_fn, self.step = loss_fn, step or 1e-3
        self.hvp: HVP = hvp
        self._looked = False  # whether finite differences were taken along vectors that show kinks
        self._holds = True  # whether stopped gradients are held fixed in finite differences
        self._compared: set[int] = set()  # batches whose product was compared with differences of gradients

    def __repr__(self) -> str:
        return f"{super().__repr__()}, hvp={self.hvp!r}"

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return H x for each vector x along the last axis, one after the other."""
        if self.hvp == "finite_differences" and not self._looked:
            self._look_for_kinks()
        try:
            return super().matvec(x)
        except NoSecondDerivative as first:  # on all ranks, if on one
            if self.hvp != "auto":
                raise
            try:
                self.hvp = "forward_over_reverse"
                self._forget()
                return super().matvec(x)
            except Exception as second:
                self.hvp = "auto"
                raise (second if isinstance(second, torch.OutOfMemoryError) else first) from second

    def _look_for_kinks(self) -> None:
        """Take differences along a random vector, and along what three products make of it, as a run does.

        Steps disagree along these where a loss has kinks, also if they happen to agree along another vector.
        """
        self._looked = True
        v = start_vector(self, 0, name="finite differences")
        try:
            with self.hold():
                for _ in range(4):
                    v = self.matvec(v)
                    v = v / (dot(v, v) ** 0.5 or 1.0)
        except BaseException:
            self._looked = False
            raise

    def linearize(self, batch: Any, keep: bool) -> Product:
        """Return v -> ∇²L_b v for one batch."""
        if self.hvp != "finite_differences" and self.batches.key[0] not in self._compared:
            self._compare(batch)
            self._compared.add(self.batches.key[0])
        return self._product_of(batch, keep)

    def _product_of(self, batch: Any, keep: bool) -> Product:
        loss_now = functools.partial(self._differentiable_loss, batch)
        if self.hvp == "finite_differences":
            moved = self._moved_loss(batch)
            return finite_differences(moved, self.module, self.parameters, self.step)
        if self.hvp == "forward_over_reverse":
            self._formulas.include(forward_ad=True)
            return forward_over_reverse(loss_now, self.module, self.parameters)
        return double_backward(loss_now, self.parameters, keep)

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of the batch, L_b(θ)."""
        loss = self.evaluate(self.loss_fn, self.module, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(not_scalar("loss_fn", loss))
        return loss

    def _differentiable_loss(self, batch: Any) -> Tensor:
        return self._differentiable(self.finite(self.batch_loss(batch)))

    def _check_again(self) -> None:
        super()._check_again()
        self._compared.clear()

    def _compare(self, batch: Any) -> None:
        """Compare a product for a few examples of a batch with differences of their gradient.

        The first batch is compared, and every other one where a derivative can be wrong though the gradient is right:
        with a custom autograd function, a derivative inside the loss, or forward differentiation.

        Raises:
            ValueError: If they differ by more than the differences' own error.
        """
        few = self.batches.few(batch, _COMPARED)
        try:
            loss = self._differentiable_loss(few)
        except Exception:  # whatever a model makes of a smaller batch: the whole one is what it was given
            few = batch
            loss = self._differentiable_loss(few)
        functions, kinks = functions_in(loss), has_kinks(loss)
        del loss
        if self._compared and not (functions or self._derives or self.hvp == "forward_over_reverse"):
            return
        suspect = bool(functions) or self._derives or self.hvp == "forward_over_reverse" or self._is_scripted
        found = None
        if self._n <= _WIDENED:
            found = self._disagreement(few, torch.float64, coarse=suspect or not kinks)
        if found is None and self.dtype != torch.float64:
            found = self._disagreement(few, self.dtype, coarse=suspect or not kinks)
        if found is None and suspect:
            warnings.warn(
                f"products could not be compared with differences of the gradient, though "
                f"{' and '.join(functions) or 'an operation'} may compute a wrong second derivative: the loss is not "
                "smooth enough, or does not run in other precision or at other parameters.",
                stacklevel=2,
            )
        if found is not None and not found.relative <= found.bound:
            raise ValueError(self._what_is_wrong(found, functions))

    @property
    def _is_scripted(self) -> bool:
        return any(isinstance(part, torch.jit.ScriptModule) for part in self.module.modules())

    def _disagreement(self, batch: Any, dtype: torch.dtype, coarse: bool) -> Disagreement | None:
        """Compare in one precision; None if the model does not run in it, or the differences say nothing."""
        present = self.parameters
        assert self._state is not None
        self._state.restore()
        try:
            with in_precision(self.module, present, dtype) as self.parameters, self._state.replaced():
                batch = differentiable(batch, dtype)
                loss_now = self._with_held_targets(batch)
                v = [torch.randn_like(p, dtype=torch.float32).to(p) for p in self.parameters]
                at = functools.partial(gradient_at, loss_now, self.module, self.parameters, v)
                slope = 0.0
                # What has no gradient may yet change the loss, such as the row of an embedding's padding_idx.
                for x, g in zip(v, gradient := at(0.0)[1], strict=True):
                    x.mul_(0 if g is None else (g.to_dense() if g.layout != torch.strided else g) != 0)
                if not (length := norm(v)):
                    return None
                for x, g in zip(v, gradient, strict=True):
                    x.div_(length)
                    slope += 0.0 if g is None else float((x * g).sum())
                del gradient
                claimed = self._product_of(batch, keep=False)(v)
                fine = dtype == torch.float64
                return disagreement(claimed, at, slope, fine=fine, coarse=coarse)
        except NoSecondDerivative:
            raise
        except OutsideModule:
            if self.hvp == "forward_over_reverse":  # which cannot do without
                raise
            return None
        except (RuntimeError, TypeError, ValueError) as error:  # the model is not made for this type
            if is_out_of_memory(error) and dtype == self.dtype:
                raise
            return None
        finally:
            self.parameters = present

    def _moved_loss(self, batch: Any) -> Callable[[], Tensor]:
        """Return the loss of a batch for differences, whose gradient is the derivative of what it is held fixed to.

        Raises:
            ValueError: If the gradient is not the derivative of the loss, neither with stopped gradients held fixed nor
                without, or the forward pass writes into the parameters.
        """
        if self._written:
            raise ValueError(
                "finite differences move the parameters, and the forward pass writes into them "
                "(Embedding(max_norm=...), or weights clamped in place); use hvp='auto'."
            )
        held, free = self._with_held_targets(batch), functools.partial(self._differentiable_loss, batch)
        if self.batches.key[0] in self._compared:
            return held if self._holds else free
        self._compared.add(self.batches.key[0])
        self._holds, off = True, self._slope_error(held)
        if off > _SLOPE and (freely := self._slope_error(free)) < off:
            self._holds, off = False, freely
        if off <= 50 * _SLOPE:
            return held if self._holds else free
        raise ValueError(
            f"the gradient is not the derivative of the loss, by {off:.0%} along itself: a function or a hook changes "
            "it, as gradient reversal and straight-through estimators do, so that there is no Hessian. Leave it out, "
            "or write the loss whose gradient it is."
        )

    def _slope_error(self, loss_now: Callable[[], Tensor]) -> float:
        """Return how far the loss changes otherwise along its gradient than this says, beyond rounding."""
        at = functools.partial(gradient_at, loss_now, self.module, self.parameters)
        value, gradient = at([torch.zeros_like(p) for p in self.parameters], 0.0)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(self.parameters, gradient, strict=True)
        ]
        if not (size := norm(dense)):
            return 0.0
        along = [g / size for g in dense]
        step = min(self.step, 1e-3)
        change = (at(along, step)[0] - at(along, -step)[0]) / (2 * step)
        rounding = 10 * torch.finfo(self.parameters[0].dtype).eps * abs(value) / step
        return max(0.0, abs(change - size) - rounding) / size

    def _with_held_targets(self, batch: Any) -> Callable[[], Tensor]:
        """Return the loss of a batch, with stopped gradients at their present values, as parameters are moved."""
        targets = HeldTargets()

        def loss_now() -> Tensor:
            self._targets = targets
            try:
                return self._differentiable_loss(batch)
            finally:
                self._targets = None

        loss_now()
        return loss_now

    def _what_is_wrong(self, found: Disagreement, functions: Sequence[str]) -> str:
        """Return a message that names what may compute a wrong second derivative."""
        where = ", ".join(self.layout.names[i] for i in found.tensors)
        if functions:
            cause = (
                f"{' or '.join(functions)} computes a wrong second derivative, as does a custom autograd.Function "
                "whose backward uses what its forward computed, or is not the derivative; write it with plain "
                "operations"
            )
        elif self.hvp == "forward_over_reverse":
            cause = "an operation has a wrong forward derivative in PyTorch; use hvp='double_backward'"
        else:
            cause = "an operation or a hook on a tensor has a wrong second derivative; replace it by plain operations"
        return (
            f"the Hessian by autograd differs from differences of the gradient by {100 * found.relative:.2g}%, most "
            f"in {where}: {cause}, or use hvp='finite_differences', which needs only the gradient. "
            "A training that has diverged, to a huge loss, may differ too."
        )


def check_hvp(hvp: str) -> None:
    """Refuse an unknown way to compute Hessian products.

    Raises:
        ValueError: If `hvp` is none of `HVP`.
    """
    if hvp not in get_args(HVP):
        raise ValueError(f"hvp is one of {', '.join(get_args(HVP))}, got {hvp!r}; leave it out for 'auto'.")
