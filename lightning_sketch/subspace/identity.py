"""The map that changes nothing: what `dim = n` means."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.sketch import Sketch


@dataclass(frozen=True)
class Identity(Sketch, register=False):
    """S = I, as a sketch with dim = n.

    >>> Identity(n=3, dim=3).matvec(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1., 2., 3.])
    """

    kind = "identity"
    streams = False

    def __post_init__(self):
        super().__post_init__()
        if self.dim != self.n:
            raise ValueError(f"Identity needs dim = n, got dim={self.dim}, n={self.n}.")

    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """x, with zeros around it."""
        out = x.new_zeros(len(x), self.dim, dtype=torch.promote_types(x.dtype, torch.float32))
        out[:, start : start + x.shape[1]] = x
        return out

    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """A part of y."""
        return y[:, start:stop].to(torch.promote_types(y.dtype, torch.float32), copy=True)
