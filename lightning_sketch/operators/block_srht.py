"""Block SRHT, the default sketch: a subsampled randomized Hadamard transform of each chunk.

    S x = b^(-1/2) sum_c fold( t_c ∘ H_b (s_c ∘ x_c) )

x_c        the c-th chunk of b coordinates, b the smallest power of two >= dim, the last one zero-padded
s_c, t_c   independent random signs, b of each per chunk, never shared between chunks
H_b        Walsh-Hadamard matrix with entries ±1
fold       row r is added to row r mod dim (nothing to do if dim is a power of two)

E[SᵀS] = I. After H_b every chunk spreads its energy evenly over all rows, so that with its own signs on
either side it behaves like a dense Gaussian map of the same dim: Var ||S x||² is about 2 / dim for
||x|| = 1, whatever x is, and smaller when the energy of x lies in one chunk (each M_c is a
multiple of an isometry). One pass over x, O(n log dim) time.

Source: Balabanov, Beaupère, Grigori & Lederer, "Block subsampled randomized Hadamard transform for
low-rank approximation on distributed architectures", ICML 2023, arXiv:2210.11295, eq. (1.3) there; they
sample rows where we fold, which uses every coordinate.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._hadamard import transform
from lightning_sketch.operators.streaming import StreamingSketch, Which

_Stream = Literal["in", "out"]  # names of the random streams of s_c and t_c


@dataclass(frozen=True)
class BlockSRHT(StreamingSketch):
    """The Block SRHT sketch: maps vectors of size `n` to `dim` numbers; the default of this package.

    >>> import torch
    >>> sketch = BlockSRHT(n=100_000, dim=1024, seed=0)
    >>> x = torch.ones(8, 100_000)
    >>> sketch.matvec(x).shape
    torch.Size([8, 1024])
    >>> y = sketch.matvec(x[0])
    >>> bool(abs(y @ y / (x[0] @ x[0]) - 1) < 0.2)  # five times the spread, √(2 / dim) = 4.4 %
    True
    """

    kind = "block_srht"

    @property
    def chunk(self) -> int:
        """The length b of a chunk: the smallest power of two that is at least dim."""
        return self.width

    @property
    def scale(self) -> float:
        """The factor b^(-1/2)."""
        return self.chunk**-0.5

    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """Add sum_c fold( t_c ∘ H (s_c ∘ x_c) ) to `total`."""
        summed = self._mix(chunks, "in", "out", which, spare).sum(1)
        total += summed[:, : self.dim]
        total[:, : self.chunk - self.dim] += summed[:, self.dim :]

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """Return s_c ∘ H (t_c ∘ unfold(y)) for each chunk."""
        chunks[:] = torch.cat((y, y[:, : self.chunk - self.dim]), dim=1)[:, None]
        return self._mix(chunks, "out", "in", first, spare)

    def _mix(self, x: Tensor, before: _Stream, after: _Stream, which: Which, spare: list[Tensor]) -> Tensor:
        """Multiply x by the signs of stream `before`, by H, and by the signs of stream `after`."""
        second, mask = spare
        self._flip(x, before, which, mask)
        return self._flip(transform(x, second[: x.numel()].view_as(x)), after, which, mask)
