"""CountSketch by rolling: each chunk is multiplied by random signs, cyclically shifted and added to the others.

    S x = sum_c roll(s_c ∘ x_c, r_c)

x_c   the c-th chunk of dim coordinates, the last one zero-padded
s_c   dim random signs, independent for each chunk
r_c   a random shift in [0, dim), independent for each chunk

E[SᵀS] = I and Var ||S x||² <= 2 / dim for every x with ||x|| = 1: the spread of a dense Gaussian map, in
O(n) time and one pass, without a scatter, hence with a fixed order of additions. No other kind is faster.

**When not to use it.** Its tails are weaker: two large coordinates meet with probability 1 / dim, and
then their product is lost or doubled. A bound that must hold with probability 1 - δ needs dim of order
1 / δ, where `BlockSRHT` needs log(1 / δ).

Source: Charikar, Chen & Farach-Colton (2002), "Finding frequent items in data streams", ICALP,
doi:10.1007/3-540-45465-9_59; there every coordinate draws its own bucket, here a chunk shares one shift.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.random import integers, integers_at
from lightning_sketch.operators.streaming import StreamingSketch, Which


@dataclass(frozen=True)
class CountSketch(StreamingSketch):
    """The CountSketch: maps vectors of size `n` to `dim` numbers as fast as memory allows.

    >>> import torch
    >>> CountSketch(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "count_sketch"

    @property
    def chunk(self) -> int:
        """The length of a chunk, dim."""
        return self.dim

    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """Add sum_c roll(s_c ∘ x_c, r_c) to `total`."""
        rows, group, dim = chunks.shape
        self._flip(chunks, "signs", which, spare[0])
        windows = _windows(chunks)
        start = torch.arange(0, rows * group * 2 * dim, 2 * dim, device=chunks.device).view(rows, group)
        total += windows[start + (dim - self._shifts(which, group, chunks))].sum(1)

    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """Return s_c ∘ roll(y, -r_c) for each chunk."""
        rows, group, dim = chunks.shape
        windows = _windows(y)
        start = torch.arange(0, rows * 2 * dim, 2 * dim, device=y.device)[:, None]
        torch.index_select(windows, 0, (start + self._shifts(first, group, y)).view(-1), out=chunks.view(-1, dim))
        return self._flip(chunks, "signs", first, spare[0])

    def _shifts(self, which: Which, group: int, like: Tensor) -> Tensor:
        if isinstance(which, Tensor):
            return integers_at(self.key("shifts"), which, self.dim)
        return integers(self.key("shifts"), which, which + group, self.dim, like.device)


def _windows(x: Float[Tensor, "... dim"]) -> Float[Tensor, "windows dim"]:
    """Return a view whose rows are all runs of dim consecutive numbers in (x_1, x_1, x_2, x_2, ...).

    Each cyclic shift of a vector x_i is such a run.
    """
    dim = x.shape[-1]
    twice = torch.cat((x, x), dim=-1).view(-1)
    return twice.as_strided((len(twice) - dim + 1, dim), (1, 1))
