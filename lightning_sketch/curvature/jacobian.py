"""The Jacobian of a tensor with respect to parameters, in both directions, by reverse mode alone.

    Jᵀ u         the ordinary backward pass
    J v          = ∂(Jᵀ u)/∂u, transposed, times v: the backward pass is linear in u, and differentiated for it

So whatever has a second derivative in PyTorch works here too.

Source: Townsend (2017), "A new trick for calculating Jacobian vector products", https://j-towns.github.io/2017/06/12/
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sketch.curvature.errors import nothing_dropped, second_derivative_errors


class Jacobian:
    """J = ∂output/∂parameters, at the point where the output was computed; its graph is held."""

    def __init__(self, output: Tensor, parameters: Sequence[Tensor]):
        self.output, self.parameters = output, parameters
        self._u = torch.ones_like(output, requires_grad=True)
        with second_derivative_errors(), nothing_dropped(output):
            self._pulled = torch.autograd.grad(output, parameters, self._u, create_graph=True, allow_unused=True)

    def matvec(self, pieces: Sequence[Tensor]) -> Tensor:
        """J v, in the shape of the output."""
        pairs = [(g, v) for g, v in zip(self._pulled, pieces, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.output)
        outputs, directions = zip(*pairs, strict=True)
        with second_derivative_errors():
            return torch.autograd.grad(outputs, self._u, directions, retain_graph=True)[0]

    def rmatvec(self, u: Tensor, keep: bool) -> Sequence[Tensor | None]:
        """Jᵀ u, in the shapes of the parameters."""
        return torch.autograd.grad(self.output, self.parameters, u, retain_graph=keep, allow_unused=True)
