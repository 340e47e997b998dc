"""The base class of sketches that mix all coordinates by one Hadamard transform before they reduce them.

    S x = scale · R H_N (s ∘ pad(x))

pad   zero-padding from n to N, the next power of two
s     N random signs
H_N   Walsh-Hadamard matrix with entries ±1
R     the kind's own map R^N -> R^dim

Such a sketch needs the whole vector: `columns` costs as much as the whole sketch. O(N log N) time; scratch
memory N numbers (one vector of a batch at a time) and a few pieces of 2^18, of 2^24 on a GPU; no diagonal is stored.
"""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import group_size, transform_
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.operators.random import flip_
from lightning_sketch.operators.sketch import Sketch


class FullSketch(Sketch):
    """A sketch behind a full Hadamard transform; a subclass defines `scale`, `reduce` and `expand`."""

    streams = False

    @property
    def padded(self) -> int:
        """The size N after padding: the smallest power of two that is at least n."""
        return 1 << (self.n - 1).bit_length()

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor in front of the product."""

    @abstractmethod
    def reduce(self, u: Float[Tensor, " padded"]) -> Float[Tensor, " dim"]:
        """Return R u; may overwrite u."""

    @abstractmethod
    def expand(self, y: Float[Tensor, " dim"]) -> Float[Tensor, " padded"]:
        """Return Rᵀ y."""

    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """Return S[:, start : start + size] x."""
        out = x.new_empty(len(x), self.dim, dtype=torch.promote_types(x.dtype, torch.float32))
        with full_precision(x.device):
            for row, vector in zip(out, x, strict=True):
                u = row.new_zeros(self.padded)
                u[start : start + len(vector)] = vector
                row[:] = self.reduce(transform_(self._flip_(u)))
        return out.mul_(self.scale)

    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """Return S[:, start : stop]ᵀ y."""
        y = self.scale * y.to(torch.promote_types(y.dtype, torch.float32))
        out = y.new_empty(len(y), stop - start)
        with full_precision(y.device):
            for row, vector in zip(out, y, strict=True):
                row[:] = self._flip_(transform_(self.expand(vector)))[start:stop]
        return out

    def pieces(self, device: torch.device) -> Iterator[slice]:
        """Yield slices of [0, N), each at least one sketch width long and small enough to stay in cache."""
        step = min(self.padded, max(group_size(device), self.width))
        for start in range(0, self.padded, step):
            yield slice(start, start + step)

    def _flip_(self, u: Tensor) -> Tensor:
        for piece in self.pieces(u.device):
            flip_(u[piece], self.key("signs"), piece.start)
        return u
