"""Three ways to the Hessian of one loss times a vector.

    H v = ∇(∇L(θ)ᵀ v)                       double backward; the graph of ∇L can serve many v
        = d/dt ∇L(θ + t v) at t = 0         forward over reverse: less memory, no graph of a gradient
        ≈ (∇L(θ + ε v) - ∇L(θ - ε v)) / 2ε  central differences, ||v|| = 1: first derivatives only, and inexact

Sources: Pearlmutter (1994), "Fast exact multiplication by the Hessian", Neural Computation 6(1),
doi:10.1162/neco.1994.6.1.147; Griewank & Walther (2008), "Evaluating Derivatives", sections 3.3 and 1.
"""

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lightning_sketch.curvature.errors import nothing_dropped, second_derivative_errors
from lightning_sketch.curvature.operator import Product
from lightning_sketch.gradients import nowhere_else, substituted

LossNow = Callable[[], Tensor]
"""The loss at the parameters that the module has when it is called."""


def double_backward(loss_now: LossNow, parameters: Sequence[Tensor], keep: bool) -> Product:
    """By differentiating the gradient once more, in reverse."""
    loss = loss_now()
    with second_derivative_errors(), nothing_dropped(loss):
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)

    def product(pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(g, v) for g, v in zip(gradients, pieces, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return [None] * len(pieces)
        outputs, directions = zip(*pairs, strict=True)
        with second_derivative_errors():
            return torch.autograd.grad(outputs, parameters, directions, retain_graph=keep, allow_unused=True)

    return product


def forward_over_reverse(loss_now: LossNow, module: nn.Module, parameters: Sequence[Tensor]) -> Product:
    """By carrying the derivative along v through the gradient."""

    def product(pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        with forward_ad.dual_level(), second_derivative_errors():
            leaves = [p.detach().requires_grad_() for p in parameters]
            duals = [forward_ad.make_dual(p, v.to(p)) for p, v in zip(leaves, pieces, strict=True)]
            with substituted(module, parameters, duals):
                loss = loss_now()
                nowhere_else(loss, parameters)
                gradients = torch.autograd.grad(loss, duals, allow_unused=True)
            return [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]

    return product


def finite_differences(loss_now: LossNow, module: nn.Module, parameters: Sequence[Tensor], step: float) -> Product:
    """From two gradients, `step` to either side along v / ||v||."""

    def gradient(pieces: Sequence[Tensor], t: float) -> Sequence[Tensor | None]:
        moved = [torch.add(p.detach(), v, alpha=t).requires_grad_() for p, v in zip(parameters, pieces, strict=True)]
        with substituted(module, parameters, moved):
            loss = loss_now()
            nowhere_else(loss, parameters)
            return torch.autograd.grad(loss, moved, allow_unused=True)

    def product(pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        size = float(torch.stack([v.double().square().sum() for v in pieces]).sum().sqrt())
        if not size:
            return [None] * len(pieces)
        sides = zip(gradient(pieces, step / size), gradient(pieces, -step / size), strict=True)
        return [None if up is None else (up - down) * (size / (2 * step)) for up, down in sides]

    return product
