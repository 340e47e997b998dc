"""The gradient of w by a backward pass of the network and a sketch, D ∇L(θ), behind outputs that depend on w.

It equals ∇_w L(θ₀ + Dᵀ w) by the chain rule, without a graph through Dᵀ.

Source: Schioppa (2024), "Efficient sketches for training data attribution and studying the loss landscape",
NeurIPS 2024, arXiv:2402.03994, which calls it the explicit gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def as_function_of_w(output: Any, w: Sequence[Tensor], theta: Sequence[nn.Parameter], sketched: Any) -> Any:
    """Return the outputs of a network as functions of w: their backward pass is the network's own and a sketch.

    Args:
        output: A tensor, or a nested structure of lists, tuples, dicts and Hugging Face outputs that contains some.
        w: The blocks of w.
        theta: The parameters that w determines, the leaves of the graph of `output`.
        sketched: A function that is called after the network's backward pass, and returns the gradient of each block.
    """
    leaves, structure = pytree.tree_flatten(output)
    other = [leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | complex | str | bytes | NoneType)]
    if other:
        raise TypeError(
            f"the output has a {type(other[0]).__name__}, whose tensors would not depend on w; return tensors, or "
            "compute output and loss inside `with model.following():`."
        )
    live = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if live:
        outputs = _Boundary.apply(_Graph([leaves[i] for i in live], theta, sketched), *w)
        for i, tensor in zip(live, outputs, strict=True):
            leaves[i] = tensor
    return pytree.tree_unflatten(leaves, structure)


class _Graph:
    """The graph of a network's outputs, in an object so that autograd does not look into it."""

    def __init__(self, outputs: list[Tensor], theta: Sequence[nn.Parameter], sketched: Callable[[], list[Tensor]]):
        self.outputs, self.theta, self.sketched = outputs, theta, sketched

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Run the network's backward pass, which accumulates into `.grad`, and return the gradient of w.

        By `backward`, since reentrant activation checkpointing does not support `autograd.grad`.
        """
        pairs = [(z, g) for z, g in zip(self.outputs, gradients, strict=True) if g is not None]
        with torch.enable_grad(), trainable(self.theta):
            torch.autograd.backward([z for z, _ in pairs], [g for _, g in pairs])
        return self.sketched()


class _Boundary(torch.autograd.Function):
    """The identity on outputs, with w as their only input."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *w: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs without their graph."""
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in graph.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of each block of w."""
        return None, *ctx.graph.backward(gradients)


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Set `requires_grad` of parameters within the context."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)
