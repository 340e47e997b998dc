"""Streaming sketches of many vectors at once, written in ranges, in any order, through buffers of a fixed size.

    total_b = scale · sum_c M_c x_bc       b: the examples, c: the chunks of the sketch, x_bc: what was written there

Whole chunks are written to a slab of about 2^20 numbers, a few examples side by side, and sketched where they lie:
signs are made once for these examples, nothing is copied. What covers a chunk in part is kept until its neighbors
have come, since part of a chunk costs a chunk. Scratch memory: four slabs, or a few chunks
of every example if that is more, however much is written.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.operators.random import FLIP_SLACK
from lightning_sketch.operators.streaming import StreamingSketch, Which

SLAB = 1 << 20
"""Numbers that are formed and sketched at once: 4 MB in float32."""

ABREAST = 16
"""Examples in a slab at most: more would leave each so little of it that products with its factors are slow."""

Fill = Callable[[Tensor, slice, int, int, bool, Tensor], None]
"""fill(target, examples, low, high, add, scratch): write the numbers [low, high) of these examples' range, or add them.

`scratch` is flat and holds anything; there is room for a quarter more than a slab.
"""


class Slabs:
    """Sums of sketches, one row for each example.

    Args:
        sketch: takes vectors of size n.
        like: on whose device and in whose type all is done.
    """

    def __init__(self, sketch: StreamingSketch, like: Tensor):
        self._sketch, self._chunk = sketch, sketch.chunk
        self._most = max(2, SLAB // sketch.chunk)  # chunks in a slab
        room = self._most * sketch.chunk
        self._slab, *self._spare = like.new_empty(3, room + max(room // 4, FLIP_SLACK))
        self._room = like.new_empty(0)

    def start(self, examples: int) -> None:
        """From here on `examples` rows, all zero."""
        self._total = self._slab.new_zeros(examples, self._sketch.dim)
        kept = max(1, self._most // (4 * max(1, examples)))
        if len(self._room) < examples * kept * self._chunk:
            self._room = self._room.new_empty(examples * kept * self._chunk)
        self._kept = self._room[: examples * kept * self._chunk].view(examples, kept, self._chunk)
        self._slots: dict[int, int] = {}

    def write(self, start: int, stop: int, fill: Fill) -> None:
        """Add a range of coordinates of every example's vector."""
        first, last = -(-start // self._chunk), stop // self._chunk
        if first > last:
            self._keep(start, stop, start, fill)
            return
        self._keep(start, first * self._chunk, start, fill)
        for examples, group in self._groups(1):
            for c in range(first, last, group):
                slab = self._take(examples, min(group, last - c))
                low = c * self._chunk - start
                fill(slab.flatten(1), examples, low, low + slab[0].numel(), False, self._spare[0])
                self._gather(slab, c, examples)
        self._keep(last * self._chunk, stop, start, fill)

    def write_rows(
        self, start: int, index: Int[Tensor, "examples tokens"], values: Float[Tensor, "examples tokens columns"]
    ) -> None:
        """Add rows of a table that begins at coordinate `start`: only the chunks that they touch are sketched."""
        tokens, columns = values.shape[1:]
        if not values.numel():
            return
        index, order = index.sort(dim=1)
        width = min(columns, (self._most - 1) * self._chunk)
        aligned = start % width == columns % width == self._chunk % width == 0
        parts = 1 if aligned else (width + self._chunk - 2) // self._chunk + 1
        for column in range(0, columns, width):
            at = start + index * columns + column
            block = values[:, :, column : column + width]
            block = block.gather(1, order[..., None].expand_as(block))
            for examples, group in self._groups(parts):
                for t in range(0, tokens, group):
                    self._write_runs(at[examples, t : t + group], block[examples, t : t + group], examples, parts)

    def total(self) -> Float[Tensor, "examples dim"]:
        """The sum over all that was written."""
        self._flush()
        return self._sketch.scale * self._total

    def _write_runs(
        self, at: Int[Tensor, "n runs"], values: Float[Tensor, "n runs width"], examples: slice, parts: int
    ) -> None:
        """Runs of numbers from ascending coordinates on: each chunk that they touch has one place in the slab."""
        width = values.shape[2]
        low, high = at // self._chunk, (at + width - 1) // self._chunk
        fresh = high - low + 1
        fresh[:, 1:] -= (high[:, :-1] - low[:, 1:] + 1).clamp_(min=0)
        last = fresh.cumsum(1) - 1
        first = last - (high - low)
        slab = self._take(examples, int(last.max()) + 1).zero_()
        number = at.new_zeros(slab.shape[:2])
        for part in range(parts):
            number.scatter_(1, (first + part).minimum(last), (low + part).minimum(high))
        place = (first * self._chunk + at % self._chunk)[..., None] + torch.arange(width, device=at.device)
        slab.flatten(1).scatter_add_(1, place.flatten(1), values.flatten(1))
        self._gather(slab, number, examples)

    def _keep(self, low: int, high: int, start: int, fill: Fill) -> None:
        """Part of one chunk."""
        if low == high:
            return
        number = low // self._chunk
        if number not in self._slots:
            if len(self._slots) == self._kept.shape[1]:
                self._flush()
            self._slots[number] = len(self._slots)
            self._kept[:, self._slots[number]] = 0
        target = self._kept[:, self._slots[number], low - number * self._chunk : high - number * self._chunk]
        fill(target, slice(0, len(target)), low - start, high - start, True, self._spare[0])

    def _flush(self) -> None:
        """Sketch the kept chunks."""
        if self._slots:
            number = torch.tensor([list(self._slots)], device=self._total.device)
            for examples, group in self._groups(1):
                for s in range(0, len(self._slots), group):
                    some = number[:, s : s + group]
                    slab = self._take(examples, some.shape[1])
                    self._gather(slab.copy_(self._kept[examples, s : s + some.shape[1]]), some, examples)
            self._slots.clear()

    def _groups(self, parts: int) -> Iterator[tuple[slice, int]]:
        """Examples, and how many times `parts` chunks of each fit into a slab."""
        most = max(1, min(ABREAST, self._most // parts))
        for row in range(0, len(self._total), most):
            examples = slice(row, min(row + most, len(self._total)))
            yield examples, self._most // (parts * (examples.stop - examples.start))

    def _take(self, examples: slice, group: int) -> Float[Tensor, "n group chunk"]:
        count = examples.stop - examples.start
        return self._slab[: count * group * self._chunk].view(count, group, self._chunk)

    def _gather(self, slab: Tensor, which: Which, examples: slice) -> None:
        self._sketch.gather(slab, which, self._spare, self._total[examples])
