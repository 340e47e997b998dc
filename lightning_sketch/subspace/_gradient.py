"""The explicit gradient of w, by a backward pass of the network and a sketch, and helpers for losses.

There are two ways from a loss to the gradient of w, equal by the chain rule:

    explicit    g = ∇L(θ), by the network's own backward pass, then D g
    implicit    ∇_w L(θ₀ + Dᵀ w), by autograd through θ

Source: Schioppa (2024), "Efficient sketches for training data attribution and studying the loss landscape",
NeurIPS 2024, arXiv:2402.03994, which introduces both names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExplicitGradient(torch.autograd.Function):
    """Make a loss a function of w alone; backward runs the network's own backward pass and sketches its gradients."""

    @staticmethod
    def forward(ctx, loss: "OpaqueLoss", sketched: Callable[[], list[Tensor]], *w: Tensor) -> Tensor:
        """Return the value of the loss, detached from its graph."""
        ctx.loss, ctx.sketched = loss, sketched
        return loss.tensor.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return D g, split into the blocks of w.

        The network's pass is run by `backward`, since reentrant activation checkpointing does not support
        `autograd.grad`.
        """
        with torch.enable_grad():
            ctx.loss.backward(grad)
        return None, None, *ctx.sketched()


class OpaqueLoss:
    """A loss with its graph, wrapped in an object so that `ExplicitGradient` does not differentiate through it.

    Args:
        tensor: The loss, a scalar with its graph.
        parameters: The parameters whose gradients are sketched.
    """

    def __init__(self, tensor: Tensor, parameters: Sequence[nn.Parameter]):
        self.tensor, self.parameters = tensor, parameters

    def backward(self, grad: Tensor) -> None:
        """Set `.grad` of the parameters, and accumulate it in other trainable parameters of the network."""
        for parameter in self.parameters:
            parameter.grad = None
        with trainable(self.parameters):
            self.tensor.backward(grad)


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Set `requires_grad` of the parameters within the context, and restore it afterwards."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in the output of a `training_step`; None if the step is skipped."""
    return output.get("loss") if isinstance(output, dict) else output


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return the output of a `training_step` with its loss replaced."""
    return {**output, "loss": loss} if isinstance(output, dict) else loss
