"""A sketch as an operation of PyTorch: differentiable to any order, under vmap and jvp; in compiled code by backward().

    d(S x) = S dx        the backward of S is Sᵀ, the backward of Sᵀ is S

Nothing is saved for the backward. The arithmetic itself happens on plain tensors, in the kernel in use.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_sketch._private import required
from lightning_sketch.operators import kernels

if TYPE_CHECKING:
    from lightning_sketch.operators.sketch import Sketch


def apply(sketch: "Sketch", start: int, stop: int, adjoint: bool, x: Tensor) -> Tensor:
    """Return the product of x with the columns [start, stop) of a sketch S, differentiably.

    Args:
        sketch: The sketch S.
        start: The first column.
        stop: The end of the columns.
        adjoint: Whether to multiply by the adjoint of these columns instead.
        x: Vectors along the last axis.
    """
    if torch.compiler.is_compiling():  # traced as one opaque operation: the loops inside do not unroll
        if _forward_level() >= 0:  # the opaque operation has no forward-mode rule: tangents would be zero
            raise RuntimeError("forward-mode derivatives of a sketch cannot be compiled; use torch.compiler.disable.")
        return _compiled(x, sketch.kind, sketch.n, sketch.dim, sketch.seed, start, stop, adjoint)
    if is_followed(x):
        return _Apply.apply(x, sketch, start, stop, adjoint)
    return _run(x, sketch, start, stop, adjoint)  # without a Function, which takes the host longer than all else


def is_followed(*tensors: Tensor) -> bool:
    """Return whether PyTorch follows what is done to tensors: compiles, differentiates or transforms it."""
    followed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    transformed = required(torch._C, "_are_functorch_transforms_active")
    return followed or torch.compiler.is_compiling() or _forward_level() >= 0 or transformed()


def _forward_level() -> int:
    """Return the level of forward-mode differentiation; -1 outside of it."""
    return cast(int, required(torch.autograd.forward_ad, "_current_level"))


def _run(x: Tensor, sketch: "Sketch", start: int, stop: int, adjoint: bool) -> Tensor:
    rows = x.resolve_neg().reshape(-1, x.shape[-1])
    out = kernels.adjoint(sketch, rows, start, stop) if adjoint else kernels.forward(sketch, rows, start)
    return out.view(*x.shape[:-1], out.shape[-1])


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, sketch: "Sketch", start: int, stop: int, adjoint: bool) -> Tensor:
        return _run(x, sketch, start, stop, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, *ctx.map = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sketch, start, stop, adjoint = ctx.map
        return _Apply.apply(grad, sketch, start, stop, not adjoint), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Apply.apply(tangent, *ctx.map)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return _Apply.apply(x.movedim(in_dims[0], 0), *rest), 0


@torch.library.custom_op("lightning_sketch::apply", mutates_args=())
def _compiled(x: Tensor, kind: str, n: int, dim: int, seed: int, start: int, stop: int, adjoint: bool) -> Tensor:
    from lightning_sketch.operators.kinds import make_sketch  # that module imports this one

    return _run(x, make_sketch(kind, n=n, dim=dim, seed=seed), start, stop, adjoint)


@_compiled.register_fake
def _(x: Tensor, kind: str, n: int, dim: int, seed: int, start: int, stop: int, adjoint: bool) -> Tensor:
    size = stop - start if adjoint else dim
    return x.new_empty((*x.shape[:-1], size), dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *ctx.map = inputs
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *fields, adjoint = ctx.map
    return _compiled(grad, *fields, not adjoint).to(ctx.dtype), *[None] * len(ctx.map)


_compiled.register_autograd(_backward, setup_context=_setup_context)


@_compiled.register_vmap
def _(info: Any, in_dims: tuple, x: Tensor, *fields: Any) -> tuple[Tensor, int]:
    return _compiled(x.movedim(in_dims[0], 0), *fields), 0
