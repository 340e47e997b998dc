"""The running sum of sketches of per-example gradients, from their factors.

    rows_b = S g_b = sum over factors f of S[:, a_f : e_f] g_bf          b: the examples, [a_f, e_f): the factor's range

A sketch is linear, so each factor is formed one buffer at a time, sketched, and forgotten: no gradient is ever whole.

For a sketch that streams, S = scale · (M_1 M_2 ...) over its chunks. Whole chunks are written to a buffer of about 2^20
numbers (2^24 on a GPU), a few examples side by side, and sketched there.
Numbers that fill a chunk only in part are kept until those around them have come, since a part of a chunk costs as much
as the chunk; but not those at the ends of many chunks. Scratch memory: five buffers, or a few chunks of every example
if that is more.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import kernels
from lightning_sketch.operators._hadamard import group_size
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.operators.random import FLIP_SLACK
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.operators.streaming import StreamingSketch
from lightning_sketch.per_example.factors import Factor, LowRank, SparseRows, separate
from lightning_sketch.per_example.precondition import GradientMap

# Numbers that are formed and sketched at once on a CPU: 4 MB in float32; on a GPU as many as a sketch handles at once.
_BUFFER = 1 << 20

# The most examples side by side in a buffer; with more, products with the factors of each would be small and slow.
_SIDE_BY_SIDE = 16

# Chunks from which on what fills a chunk only in part is sketched as it is.
_LONG = 8

# fill(target, examples, low, high, add, scratch): write the numbers [low, high) of these examples' range to `target`,
# or add them. `scratch` is flat, has any content, and has room for a quarter more than a buffer. It returns the
# numbers, which unless they are added may lie elsewhere instead.
_Fill = Callable[[Tensor, slice, int, int, bool, Tensor], Tensor]


class SketchAccumulator:
    """Sum of sketches of per-example gradients, to which factors are added one by one.

    Works on the device of the parameters, in float32 (float64 if a parameter is), whatever autocast says; buffers are
    kept from batch to batch. With a sketch that streams, time is proportional to the size of the gradients, and scratch
    memory is 6 to 20 MB (16 times that on a GPU), or a few times the size of the rows if that is more. A sketch that
    does not stream (AFFD, FJL, QK) forms each factor whole and costs a whole sketch for each: correct, and slow.

    Args:
        sketch: The sketch, of vectors of the layout's size.
        layout: Where in the flat vector each parameter lies.
        parameters: The parameters that factors may belong to, by their names in the layout.
        gradient_map: A linear map of the gradients, which each factor goes through before it is sketched.

    Raises:
        ValueError: if sizes disagree, or a parameter is not in the layout.

    >>> layer = nn.Linear(3, 2, bias=False)
    >>> layout = Layout.of(layer)
    >>> from lightning_sketch.operators.count_sketch import CountSketch
    >>> accumulator = SketchAccumulator(CountSketch(layout.n, dim=4), layout, parameters={"weight": layer.weight})
    >>> accumulator.start(examples=5)
    >>> accumulator.add(LowRank(layer.weight, left=torch.ones(5, 1, 2), right=torch.ones(5, 1, 3)))
    >>> accumulator.rows().shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        sketch: Sketch,
        layout: Layout,
        *,
        parameters: Mapping[str, nn.Parameter],
        gradient_map: GradientMap | None = None,
    ):
        if sketch.n != layout.n:
            raise ValueError(f"the sketch takes n={sketch.n} numbers, the layout has {layout.n}; use n={layout.n}.")
        self._sketch, self._map = sketch, gradient_map
        self._parameters = dict(parameters)  # keeps them alive, and with them their ids
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
        self._sums: _ChunkedSums | _WholeSums | None = None

    @property
    def joins_biases(self) -> bool:
        """Whether the factor of a matrix is to come with its layer's bias."""
        return self._map is not None

    @torch.no_grad()
    def start(self, examples: int) -> None:
        """Begin a new batch of this number of examples, with rows of zeros."""
        dtypes = (parameter.dtype for parameter in self._parameters.values())
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        device = next((parameter.device for parameter in self._parameters.values()), None)
        like = torch.empty(0, dtype=dtype, device=device)
        if self._sums is None or (like.dtype, like.device) != (self._sums.like.dtype, self._sums.like.device):
            if isinstance(self._sketch, StreamingSketch) and self._sketch.is_sum_of_chunks:
                self._sums = _ChunkedSums(self._sketch, like)
            else:
                self._sums = _WholeSums(self._sketch, like)
        self._examples = examples
        self._sums.start(examples)

    @torch.no_grad()
    def add(self, factor: Factor) -> None:
        """Add a factor to the gradients of this batch.

        Raises:
            ValueError: if the factor belongs to no known parameter, leaves its parameter, or has another number of
                examples than the batch.
            RuntimeError: before the first `start`.
        """
        sums = self._started()
        self._place(factor)
        with full_precision(sums.like.device):
            for own in separate(factor) if self._map is None else self._map.factors(factor):
                self._write(sums, own)

    def _write(self, sums: "_ChunkedSums | _WholeSums", factor: Factor) -> None:
        """Add a factor of one parameter."""
        offset, start, size = self._place(factor)
        if isinstance(factor, SparseRows):
            index = factor.index.to(sums.like.device, torch.int64)
            sums.write_rows(offset, index, _plain(factor.values, sums.like))
        elif isinstance(factor, LowRank):
            scale = None if factor.scale is None else _plain(factor.scale, sums.like)
            fill = _product(_plain(factor.left, sums.like), _plain(factor.right, sums.like), scale)
            sums.write(offset + start, offset + start + size, fill)
        else:
            sums.write(offset + start, offset + start + size, _copy(_plain(factor.values, sums.like)))

    @torch.no_grad()
    def rows(self) -> Float[Tensor, "examples dim"]:
        """Return the sketches of the gradients that were added since `start`.

        Raises:
            RuntimeError: before the first `start`.
        """
        sums = self._started()
        with full_precision(sums.like.device):
            return sums.total()

    def _started(self) -> "_ChunkedSums | _WholeSums":
        if self._sums is None:
            raise RuntimeError("the accumulator has no batch yet; call start(examples) first.")
        return self._sums

    def _place(self, factor: Factor) -> tuple[int, int, int]:
        """Return the offset of the parameter in the flat vector, that of the factor in it, and the factor's size."""
        offset = self._offsets.get(id(factor.parameter))
        if offset is None:
            shape = tuple(factor.parameter.shape)
            raise ValueError(
                f"a factor belongs to a parameter of shape {shape}, none of this accumulator's; pass that parameter to "
                "SketchAccumulator."
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
                f"{type(factor).__name__} covers {size} numbers from {start} on for {examples} examples, but its "
                f"parameter has {factor.parameter.numel()} numbers and the batch {self._examples} examples; give all "
                "of a batch, inside the parameter."
            )
        return offset, start, size


def _plain(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like).contiguous()  # else products would copy it for every buffer


def _copy(values: Float[Tensor, "examples numbers"]) -> _Fill:
    def fill(target: Tensor, examples: slice, low: int, high: int, add: bool, scratch: Tensor) -> Tensor:
        return target.add_(values[examples, low:high]) if add else values[examples, low:high]

    return fill


def _product(
    left: Float[Tensor, "examples tokens rows"],
    right: Float[Tensor, "examples tokens columns"],
    scale: Float[Tensor, "rows columns"] | None = None,
) -> _Fill:
    """Return a function that writes numbers low..high of each example's flattened matrix scale * sum_t left_t right_tᵀ.

    Where the range is one of whole rows, they are written in place; else they are cut out of whole rows.
    """
    columns, transposed = right.shape[2], left.mT

    def fill(target: Tensor, examples: slice, low: int, high: int, add: bool, scratch: Tensor) -> Tensor:
        first, last = low // columns, -(-high // columns)
        rows = transposed[examples, first:last]
        shape = (len(target), last - first, columns)
        in_place = not add and low == first * columns and high == last * columns
        if in_place or math.prod(shape) <= len(scratch):
            whole = target.view(shape) if in_place else scratch[: math.prod(shape)].view(shape)
            torch.bmm(rows, right[examples], out=whole)
            if scale is not None:
                whole *= scale[first:last]
            numbers = whole.flatten(1)[:, low - first * columns : high - first * columns]
            return target.add_(numbers) if add else numbers
        else:  # two or three rows, long ones
            for row in range(first, last):
                start, stop = max(low, row * columns), min(high, (row + 1) * columns)
                within = slice(start - row * columns, stop - row * columns)
                part = torch.bmm(transposed[examples, row, None], right[examples, :, within])[:, 0]
                if scale is not None:
                    part *= scale[row, within]
                own = target[:, start - low : stop - low]
                own.add_(part) if add else own.copy_(part)
            return target

    return fill


class _ChunkedSums:
    """Sums of sketches that stream, one row for each example, over whole chunks.

    Args:
        sketch: The sketch.
        like: A tensor whose device and type are used throughout.
    """

    def __init__(self, sketch: StreamingSketch, like: Tensor):
        self.like, self._sketch, self._chunk = like, sketch, sketch.chunk
        self._most = max(2, max(_BUFFER, group_size(like.device)) // sketch.chunk)  # chunks in a buffer
        room = self._most * sketch.chunk
        self._buffer, *self._spare = like.new_empty(3, room + max(room // 4, FLIP_SLACK))
        self._room = like.new_empty(0)

    def start(self, examples: int) -> None:
        """Begin anew with `examples` rows of zeros."""
        self._total = self._buffer.new_zeros(examples, self._sketch.dim)
        partial = max(1, self._most // max(1, examples))
        if len(self._room) < examples * partial * self._chunk:
            self._room = self._room.new_empty(examples * partial * self._chunk)
        self._partial = self._room[: examples * partial * self._chunk].view(examples, partial, self._chunk)
        self._slots: dict[int, int] = {}

    def write(self, start: int, stop: int, fill: _Fill) -> None:
        """Add numbers to the coordinates [start, stop) of every example's vector."""
        chunk = self._chunk
        low, high = -(-start // chunk) * chunk, stop // chunk * chunk
        if low > high:
            self._keep(start, stop, start, fill)
            return
        if high - low < _LONG * chunk:
            self._keep(start, low, start, fill)
            self._keep(high, stop, start, fill)
        else:
            low, high = start, stop
        for examples, group in self._groups(1):
            at = low
            while at < high:
                end = min(high, (at // chunk + group) * chunk)
                target = self._buffer[: (examples.stop - examples.start) * (end - at)].view(-1, end - at)
                numbers = fill(target, examples, at - start, end - start, False, self._spare[0])
                self._total[examples] += kernels.forward(self._sketch, numbers, at)
                at = end

    def write_rows(
        self, start: int, index: Int[Tensor, "examples tokens"], values: Float[Tensor, "examples tokens columns"]
    ) -> None:
        """Add per-example gradients of single table rows (an embedding's) to the running sketches.

        The table begins at coordinate `start`; only the chunks that the rows touch are sketched.
        """
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
        """Return the sketches of all that was added, (examples, dim)."""
        self._flush()
        return self._total.clone()

    def _write_runs(
        self, at: Int[Tensor, "n runs"], values: Float[Tensor, "n runs width"], examples: slice, parts: int
    ) -> None:
        """Add runs of numbers from ascending coordinates on; each chunk that they touch has one place in the buffer."""
        width = values.shape[2]
        low, high = at // self._chunk, (at + width - 1) // self._chunk
        fresh = high - low + 1
        fresh[:, 1:] -= (high[:, :-1] - low[:, 1:] + 1).clamp_(min=0)
        last = fresh.cumsum(1) - 1
        first = last - (high - low)
        # The most that there can be, on a device that would have to be waited for.
        places = int(last.max()) + 1 if at.device.type == "cpu" else at.shape[1] * parts
        buffer = self._take(examples, places).zero_()
        unused = -(-self._sketch.n // self._chunk)  # numbers of chunks after the last one, for places of zeros
        number = (unused + torch.arange(buffer.shape[1], device=at.device)).repeat(len(buffer), 1)
        for part in range(parts):
            number.scatter_(1, (first + part).minimum(last), (low + part).minimum(high))
        place = (first * self._chunk + at % self._chunk)[..., None] + torch.arange(width, device=at.device)
        buffer.flatten(1).scatter_add_(1, place.flatten(1), values.flatten(1))
        self._gather(buffer, number, examples)

    def _keep(self, low: int, high: int, start: int, fill: _Fill) -> None:
        """Add numbers to a part of one chunk, which is kept and sketched later."""
        if low == high:
            return
        number = low // self._chunk
        if number not in self._slots:
            if len(self._slots) == self._partial.shape[1]:
                self._flush()
            self._slots[number] = len(self._slots)
            self._partial[:, self._slots[number]] = 0
        target = self._partial[:, self._slots[number], low - number * self._chunk : high - number * self._chunk]
        fill(target, slice(0, len(target)), low - start, high - start, True, self._spare[0])

    def _flush(self) -> None:
        """Sketch the chunks that are kept."""
        if self._slots:
            number = torch.tensor([list(self._slots)], device=self._total.device)
            for examples, group in self._groups(1):
                for s in range(0, len(self._slots), group):
                    some = number[:, s : s + group]
                    buffer = self._take(examples, some.shape[1])
                    self._gather(buffer.copy_(self._partial[examples, s : s + some.shape[1]]), some, examples)
            self._slots.clear()

    def _groups(self, parts: int) -> Iterator[tuple[slice, int]]:
        """Yield groups of examples, with how many times `parts` chunks of each example fit into a buffer."""
        most = max(1, min(_SIDE_BY_SIDE, self._most // parts))
        for row in range(0, len(self._total), most):
            examples = slice(row, min(row + most, len(self._total)))
            yield examples, self._most // (parts * (examples.stop - examples.start))

    def _take(self, examples: slice, group: int) -> Float[Tensor, "n group chunk"]:
        shape = (examples.stop - examples.start, group, self._chunk)
        return self._buffer[: math.prod(shape)].view(shape)

    def _gather(self, buffer: Tensor, which: Tensor, examples: slice) -> None:
        self._total[examples] += kernels.gather(self._sketch, buffer, which, self._spare)


class _WholeSums:
    """Sums of sketches that do not stream, like `_ChunkedSums`; every range is formed whole, for all examples."""

    def __init__(self, sketch: Sketch, like: Tensor):
        self._sketch, self.like = sketch, like

    def start(self, examples: int) -> None:
        """Begin anew with `examples` rows of zeros."""
        self._total = self.like.new_zeros(examples, self._sketch.dim)

    def write(self, start: int, stop: int, fill: _Fill) -> None:
        """Add numbers to the coordinates [start, stop) of every example's vector."""
        if start < stop:
            whole = self.like.new_empty(len(self._total), stop - start)
            numbers = fill(whole, slice(None), 0, stop - start, False, whole[:0])
            self._total += kernels.forward(self._sketch, numbers, start)

    def write_rows(
        self, start: int, index: Int[Tensor, "examples tokens"], values: Float[Tensor, "examples tokens columns"]
    ) -> None:
        """Add to rows of a table that begins at coordinate `start`."""
        examples, _, columns = values.shape
        if index.numel():
            first, last = int(index.min()), int(index.max()) + 1
            whole = values.new_zeros(examples * (last - first), columns)
            offset = (last - first) * torch.arange(examples, device=index.device)[:, None]
            whole.index_add_(0, (index - first + offset).flatten(), values.flatten(0, 1))
            factor = self._sketch.columns(start + first * columns, start + last * columns)
            self._total += factor.matvec(whole.view(examples, -1))

    def total(self) -> Float[Tensor, "examples dim"]:
        """Return the sketches of all that was added, (examples, dim)."""
        return self._total.clone()
