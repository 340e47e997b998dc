"""The running sum of sketches of per-example gradients, from their factors.

    rows_b = S g_b = sum over factors f of S[:, a_f : e_f] g_bf          b: the examples, [a_f, e_f): the factor's range

A sketch is linear, so each factor is formed a slab at a time, sketched, and forgotten: no gradient is ever whole.

For a sketch that streams, S = scale · (M_1 M_2 ...) over its chunks. Whole chunks are written to a slab of about 2^20
numbers, a few examples side by side, and sketched where they lie: signs are made once for these examples, nothing is
copied. What covers a chunk in part is kept until its neighbors have come, since part of a chunk costs a chunk. Scratch
memory: four slabs, or a few chunks of every example if that is more, however much is written.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.operators.random import FLIP_SLACK
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.operators.streaming import StreamingSketch, Which
from lightning_sketch.per_example.factors import Factor, LowRank, SparseRows

SLAB = 1 << 20
"""Numbers that are formed and sketched at once: 4 MB in float32."""

ABREAST = 16
"""Examples in a slab at most: more would leave each so little of it that products with its factors are slow."""

Fill = Callable[[Tensor, slice, int, int, bool, Tensor], None]
"""fill(target, examples, low, high, add, scratch): write the numbers [low, high) of these examples' range, or add them.

`scratch` is flat and holds anything; there is room for a quarter more than a slab.
"""


class SketchAccumulator:
    """Sketches of the gradients of single examples, from their factors.

    Works on the device of the parameters, in float32 (float64 if a parameter is), whatever autocast says; buffers are
    kept from batch to batch. A sketch that streams costs about as much as its numbers and takes 13 to 18 MB of scratch
    memory, or a few times what it returns if that is more. One that does not (AFFD, FJL, QK) forms each factor whole
    and costs all of the sketch for each: correct, and slow.

    Args:
        sketch: takes vectors of the layout's size.
        layout: where in the flat vector each parameter lies.
        parameters: those that factors may belong to, by their names in the layout.

    Raises:
        ValueError: if sizes disagree, or a parameter is not in the layout.

    >>> layer = nn.Linear(3, 2, bias=False)
    >>> layout = Layout.of(layer)
    >>> from lightning_sketch.operators.count_sketch import CountSketch
    >>> accumulator = SketchAccumulator(CountSketch(layout.n, dim=4), layout, dict(layer.named_parameters()))
    >>> accumulator.start(examples=5)
    >>> accumulator.add(LowRank(layer.weight, left=torch.ones(5, 1, 2), right=torch.ones(5, 1, 3)))
    >>> accumulator.rows().shape
    torch.Size([5, 4])
    """

    def __init__(self, sketch: Sketch, layout: Layout, parameters: Mapping[str, nn.Parameter]):
        if sketch.n != layout.n:
            raise ValueError(f"the sketch takes n={sketch.n} numbers, the layout has {layout.n}; use n={layout.n}.")
        self._sketch = sketch
        self._parameters = dict(parameters)  # keeps them, and with them their ids
        self._offsets: dict[int, int] = {}
        start = 0
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if name in parameters:
                if parameters[name].shape != shape:
                    raise ValueError(
                        f"{name} has shape {tuple(parameters[name].shape)}, the layout says {tuple(shape)}."
                    )
                self._offsets[id(parameters[name])] = start
            start += shape.numel()
        unknown = parameters.keys() - set(layout.names)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: not in the layout, which starts with {layout.names[:10]}.")
        self._sums: _Slabs | _Whole | None = None
        self._like: Tensor | None = None

    @torch.no_grad()
    def start(self, examples: int) -> None:
        """Begin a new batch of this size: all rows are zero."""
        dtypes = (parameter.dtype for parameter in self._parameters.values())
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        device = next((parameter.device for parameter in self._parameters.values()), None)
        like = torch.empty(0, dtype=dtype, device=device)
        if self._sums is None or (like.dtype, like.device) != (self._like.dtype, self._like.device):
            self._like = like
            kind = _Slabs if isinstance(self._sketch, StreamingSketch) else _Whole
            self._sums = kind(self._sketch, like)
        self._examples = examples
        self._sums.start(examples)

    @torch.no_grad()
    def add(self, factor: Factor) -> None:
        """Add to the gradients of this batch.

        Raises:
            ValueError: if the factor belongs to no known parameter, leaves it, or has another number of examples.
            RuntimeError: before the first `start`.
        """
        offset, start, size = self._place(factor)
        with full_precision(self._like.device):
            if isinstance(factor, SparseRows):
                index = factor.index.to(self._like.device, torch.int64)
                self._sums.write_rows(offset, index, self._plain(factor.values))
            elif isinstance(factor, LowRank):
                fill = _product(self._plain(factor.left), self._plain(factor.right))
                self._sums.write(offset + start, offset + start + size, fill)
            else:
                self._sums.write(offset + start, offset + start + size, _copy(self._plain(factor.values)))

    @torch.no_grad()
    def rows(self) -> Float[Tensor, "examples dim"]:
        """Return the sketches of what was added since `start`.

        Raises:
            RuntimeError: before the first `start`.
        """
        self._started()
        with full_precision(self._like.device):
            return self._sums.total()

    def _started(self) -> None:
        if self._sums is None:
            raise RuntimeError("the accumulator has no batch yet; call start(examples) first.")

    def _place(self, factor: Factor) -> tuple[int, int, int]:
        """Where the parameter begins in the flat vector, where the factor begins in the parameter, and its size."""
        self._started()
        offset = self._offsets.get(id(factor.parameter))
        if offset is None:
            shape = tuple(factor.parameter.shape)
            raise ValueError(
                f"a factor belongs to a parameter of shape {shape}, none of this accumulator's; pass it to it."
            )
        if isinstance(factor, SparseRows):
            examples, start, size = len(factor.values), 0, factor.parameter.numel()
            fits = factor.values.shape[2:].numel() * len(factor.parameter) == size
        elif isinstance(factor, LowRank):
            examples, start, size = len(factor.left), factor.start, factor.left.shape[2] * factor.right.shape[2]
            fits = 0 <= start <= start + size <= factor.parameter.numel()
        else:
            examples, start, size = len(factor.values), factor.start, factor.values.shape[1]
            fits = 0 <= start <= start + size <= factor.parameter.numel()
        if not fits or examples != self._examples:
            raise ValueError(
                f"{type(factor).__name__} gives {examples} examples {size} numbers from {start} on, of a parameter of "
                f"{factor.parameter.numel()}, to a batch of {self._examples}; give all of a batch, inside the "
                "parameter."
            )
        return offset, start, size

    def _plain(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._like).contiguous()  # else products would copy it for every slab


def _copy(values: Float[Tensor, "examples numbers"]) -> Fill:
    def fill(target: Tensor, examples: slice, low: int, high: int, add: bool, scratch: Tensor) -> None:
        _write(target, values[examples, low:high], add)

    return fill


def _product(left: Float[Tensor, "examples tokens rows"], right: Float[Tensor, "examples tokens columns"]) -> Fill:
    """Any range of sum_t left_t right_tᵀ: in its place if it is made of whole rows, else cut out of whole rows."""
    columns, transposed = right.shape[2], left.mT

    def fill(target: Tensor, examples: slice, low: int, high: int, add: bool, scratch: Tensor) -> None:
        first, last = low // columns, -(-high // columns)
        rows = transposed[examples, first:last]
        shape = (len(target), last - first, columns)
        if not add and low == first * columns and high == last * columns:
            torch.bmm(rows, right[examples], out=target.view(shape))
        elif math.prod(shape) <= len(scratch):
            whole = scratch[: math.prod(shape)].view(shape)
            torch.bmm(rows, right[examples], out=whole)
            _write(target, whole.flatten(1)[:, low - first * columns : high - first * columns], add)
        else:  # two or three rows, long ones
            for row in range(first, last):
                start, stop = max(low, row * columns), min(high, (row + 1) * columns)
                part = right[examples, :, start - row * columns : stop - row * columns]
                _write(target[:, start - low : stop - low], torch.bmm(transposed[examples, row, None], part)[:, 0], add)

    return fill


def _write(target: Tensor, values: Tensor, add: bool) -> None:
    target.add_(values) if add else target.copy_(values)


class _Slabs:
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
        """Return the sum over all that was written."""
        self._flush()
        return self._sketch.scale * self._total

    def _write_runs(
        self, at: Int[Tensor, "n runs"], values: Float[Tensor, "n runs width"], examples: slice, parts: int
    ) -> None:
        """Write runs of numbers from ascending coordinates on: each chunk they touch has one place in the slab."""
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


class _Whole:
    """As `_Slabs`, for sketches that do not stream: every range is formed whole, for all examples."""

    def __init__(self, sketch: Sketch, like: Tensor):
        self._sketch, self._like = sketch, like

    def start(self, examples: int) -> None:
        self._total = self._like.new_zeros(examples, self._sketch.dim)

    def write(self, start: int, stop: int, fill: Fill) -> None:
        if start < stop:
            whole = self._like.new_empty(len(self._total), stop - start)
            fill(whole, slice(None), 0, stop - start, False, whole[:0])
            self._total += self._sketch.columns(start, stop).matvec(whole)

    def write_rows(
        self, start: int, index: Int[Tensor, "examples tokens"], values: Float[Tensor, "examples tokens columns"]
    ) -> None:
        examples, _, columns = values.shape
        if index.numel():
            first, last = int(index.min()), int(index.max()) + 1
            whole = values.new_zeros(examples * (last - first), columns)
            offset = (last - first) * torch.arange(examples, device=index.device)[:, None]
            whole.index_add_(0, (index - first + offset).flatten(), values.flatten(0, 1))
            factor = self._sketch.columns(start + first * columns, start + last * columns)
            self._total += factor.matvec(whole.view(examples, -1))

    def total(self) -> Float[Tensor, "examples dim"]:
        return self._total.clone()
