"""The two ways from a loss to the gradient of w: the same number, by the chain rule.

    explicit    g = ∇L(θ) as ever, by its own backward pass, then D g
    implicit    ∇_w L(θ₀ + Dᵀ w), through the graph

Source: Schioppa (2024), "Efficient sketches for training data attribution and studying the loss landscape",
NeurIPS 2024, arXiv:2402.03994; the names are from there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExplicitGradient(torch.autograd.Function):
    """The loss as a function of w alone; its backward runs the backward pass of the network, whole, and sketches."""

    @staticmethod
    def forward(ctx, loss: "Held", sketched: Callable[[], list[Tensor]], *w: Tensor) -> Tensor:
        """The value of the loss, away from its graph."""
        ctx.loss, ctx.sketched = loss, sketched
        return loss.tensor.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """D g, cut as w is.

        By `backward` and not by `autograd.grad`: activation checkpointing of the reentrant kind allows no other.
        """
        with torch.enable_grad():
            ctx.loss.backward(grad)
        return None, None, *ctx.sketched()


class Held:
    """A loss with its graph and the parameters that it is to be differentiated by, hidden from autograd."""

    def __init__(self, tensor: Tensor, parameters: Sequence[nn.Parameter]):
        self.tensor, self.parameters = tensor, parameters

    def backward(self, grad: Tensor) -> None:
        """Fill `.grad` of the parameters, and of whatever else of the network is trained."""
        for parameter in self.parameters:
            parameter.grad = None
        with trainable(self.parameters):
            self.tensor.backward(grad)


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """With gradients for them; as they were after that."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a `training_step` returns."""
    return output.get("loss") if isinstance(output, dict) else output


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same with another loss."""
    return {**output, "loss": loss} if isinstance(output, dict) else loss
