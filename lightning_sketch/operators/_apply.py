"""A sketch as an operation of PyTorch: differentiable to any order, under vmap, jvp and torch.compile.

    d(S x) = S dx        the backward of S is Sᵀ, the backward of Sᵀ is S

Nothing is saved for the backward. The arithmetic itself happens on plain tensors, in the sketch's own
`forward` and `adjoint`.
"""

import torch
from torch import Tensor

from lightning_sketch._private import required


def apply(sketch, start: int, stop: int, adjoint: bool, x: Tensor) -> Tensor:
    """S x (or Sᵀ x if `adjoint`) along the last axis of x, for the columns [start, stop) of S."""
    if torch.compiler.is_compiling():  # traced as one opaque operation: the loops inside do not unroll
        if required(torch.autograd.forward_ad, "_current_level") >= 0:  # it has no rule there, and would give zeros
            raise RuntimeError("forward-mode derivatives of a sketch cannot be compiled; use torch.compiler.disable.")
        return _compiled(x, sketch.kind, sketch.n, sketch.dim, sketch.seed, start, stop, adjoint)
    return _Apply.apply(x, sketch, start, stop, adjoint)


def _run(x: Tensor, sketch, start: int, stop: int, adjoint: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = sketch.adjoint(rows, start, stop) if adjoint else sketch.forward(rows, start)
    return out.view(*x.shape[:-1], out.shape[-1])


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(x, sketch, start, stop, adjoint):
        return _run(x, sketch, start, stop, adjoint)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.map = inputs

    @staticmethod
    def backward(ctx, grad):
        sketch, start, stop, adjoint = ctx.map
        return _Apply.apply(grad, sketch, start, stop, not adjoint), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Apply.apply(tangent, *ctx.map)

    @staticmethod
    def vmap(info, in_dims, x, *rest):
        return _Apply.apply(x.movedim(in_dims[0], 0), *rest), 0


@torch.library.custom_op("lightning_sketch::apply", mutates_args=())
def _compiled(x: Tensor, kind: str, n: int, dim: int, seed: int, start: int, stop: int, adjoint: bool) -> Tensor:
    from lightning_sketch.operators.kinds import make_sketch  # the table of kinds imports this file

    return _run(x, make_sketch(kind, n=n, dim=dim, seed=seed), start, stop, adjoint)


@_compiled.register_fake
def _(x: Tensor, kind: str, n: int, dim: int, seed: int, start: int, stop: int, adjoint: bool) -> Tensor:
    size = stop - start if adjoint else dim
    return x.new_empty((*x.shape[:-1], size), dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    x, *ctx.map = inputs
    ctx.dtype = x.dtype


def _backward(ctx, grad):
    *fields, adjoint = ctx.map
    return _compiled(grad, *fields, not adjoint).to(ctx.dtype), *[None] * len(ctx.map)


_compiled.register_autograd(_backward, setup_context=_setup_context)
