"""The base class of sketches that sum over chunks of the vector, each chunk mapped on its own.

    S x = scale · sum_c M_c x_c          x_c: the c-th chunk of `chunk` coordinates, the last one zero-padded

Such a sketch streams: a range of coordinates costs what the range costs, in any order, on any rank.
Chunks are processed in groups that stay in a CPU's cache, or that keep a GPU busy. Scratch memory: a few buffers of
max(2^18, chunk) numbers, 2^24 instead of 2^18 on a GPU, whatever n is.
"""

import bisect
import functools
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.operators._hadamard import group_size
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.operators.random import FLIP_SLACK, flip_, flip_chunks_
from lightning_sketch.operators.sketch import Sketch

# Indices of chunks: that of the first of consecutive chunks, or that of each chunk, per row or the same for all rows.
Which = int | Int[Tensor, "#rows group"]


class StreamingSketch(Sketch):
    """A sketch that maps each chunk of coordinates on its own; a subclass defines `chunk`, `gather` and `scatter`."""

    streams = True

    @property
    @abstractmethod
    def chunk(self) -> int:
        """The number of coordinates in a chunk."""

    @property
    def scale(self) -> float:
        """The factor in front of the sum."""
        return 1.0

    @abstractmethod
    def gather(
        self, chunks: Float[Tensor, "rows group chunk"], which: Which, spare: list[Tensor], total: Tensor
    ) -> None:
        """Add sum_c M_c x_c to `total`, without the scale; overwrites `chunks` and `spare`.

        Args:
            chunks: The chunks x_c of each row, contiguous.
            which: Index of the first of consecutive chunks, or the index of each chunk, which costs more.
            spare: Two buffers of the size of `chunks` and `FLIP_SLACK` more.
            total: The sums to add to, (rows, dim).
        """

    @abstractmethod
    def scatter(self, y: Float[Tensor, "rows dim"], first: int, spare: list[Tensor], chunks: Tensor) -> Tensor:
        """Return M_cᵀ y for the chunks first, first + 1, ..., unscaled, in the memory of `chunks` or of `spare`."""

    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """Return S[:, start : start + size] x."""
        return self._sum([(start, x)])

    def forward_pieces(self, pieces: Sequence[tuple[int, Tensor]]) -> Float[Tensor, "1 dim"]:
        """Return S x for a vector x given by pieces and where they begin, without a graph; the rest of it is zero."""
        if not self.is_sum_of_chunks:
            return super().forward_pieces(pieces)
        return self._sum([(start, x[None]) for start, x in pieces])

    @property
    def is_sum_of_chunks(self) -> bool:
        """Whether the sketch is what `gather` says, which a subclass with a `forward` of its own may not be."""
        return type(self).forward is StreamingSketch.forward

    def _sum(self, parts: list[tuple[int, Tensor]]) -> Tensor:
        """Return the sum over parts x, each with its first coordinate `start`, of S[:, start : start + size] x."""
        dtype = functools.reduce(torch.promote_types, (x.dtype for _, x in parts), torch.float32)
        out = parts[0][1].new_zeros(len(parts[0][1]), self.dim, dtype=dtype)
        begin, end = parts[0][0], parts[-1][0] + parts[-1][1].shape[1]
        with full_precision(out.device):
            for rows, first, low, high, group, spare in self._groups(out, begin, end):
                chunks = group.view(rows.stop - rows.start, -1)
                if self._fill(chunks, parts, rows, first * self.chunk, low, high):
                    self.gather(group, first, spare, out[rows])
        return out.mul_(self.scale)

    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """Return S[:, start : stop]ᵀ y."""
        y = self.scale * y.to(torch.promote_types(y.dtype, torch.float32))
        out = y.new_empty(len(y), stop - start)
        with full_precision(y.device):
            for rows, first, low, high, group, spare in self._groups(y, start, stop):
                chunks = self.scatter(y[rows], first, spare, group).view(rows.stop - rows.start, -1)
                head, tail = low - first * self.chunk, high - first * self.chunk
                out[rows, low - start : high - start] = chunks[:, head:tail]
        return out

    @staticmethod
    def _fill(target: Tensor, parts: list[tuple[int, Tensor]], rows: slice, base: int, low: int, high: int) -> bool:
        """Write the numbers of coordinates [low, high) to `target`, which begins at `base`; return whether any are."""
        done, first = 0, bisect.bisect(parts, low, key=lambda part: part[0]) - 1
        for start, x in itertools.islice(parts, max(0, first), None):
            if start >= high:
                break
            begin, end = max(low, start), min(high, start + x.shape[1])
            if begin < end:
                target[:, done : begin - base] = 0
                target[:, begin - base : end - base] = x[rows, begin - start : end - start]
                done = end - base
        target[:, done:] = 0
        return done > 0

    def _flip(self, chunks: Float[Tensor, "rows group chunk"], stream: str, which: Which, spare: Tensor) -> Tensor:
        """Multiply chunks by the signs of a stream, in place."""
        if isinstance(which, Tensor):
            return flip_chunks_(chunks, self.key(stream), which)
        return flip_(chunks.view(len(chunks), -1), self.key(stream), which * self.chunk, spare).view_as(chunks)

    def _groups(
        self, like: Tensor, start: int, stop: int
    ) -> Iterator[tuple[slice, int, int, int, Tensor, list[Tensor]]]:
        """Yield rows, the first chunk, the start and end of the coordinates, and buffers, for each group of chunks."""
        numbers = group_size(like.device)
        most_rows = max(1, numbers // self.chunk)
        first, last = start // self.chunk, -(-stop // self.chunk)
        for row in range(0, len(like), most_rows):
            rows = slice(row, min(row + most_rows, len(like)))
            count = rows.stop - rows.start
            size = min(-(-numbers // (self.chunk * count)), last - first)
            buffer, *spare = like.new_empty(3, count * size * self.chunk + FLIP_SLACK)
            for c in range(first, last, size):
                group = min(size, last - c)
                low, high = max(start, c * self.chunk), min(stop, (c + group) * self.chunk)
                yield rows, c, low, high, buffer[: count * group * self.chunk].view(count, group, self.chunk), spare
