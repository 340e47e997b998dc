"""What pieces of per-example gradients are added to.

    rows_b = S g_b = sum over pieces p of S[:, a_p : e_p] g_bp          b: the examples, [a_p, e_p): the piece's range

A sketch is linear, so each piece is formed a slab at a time, sketched, and forgotten: no gradient is ever whole.
"""

import functools
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sketch.gradients.pieces import Outer, Piece, Rows
from lightning_sketch.gradients.slabs import Fill, Slabs
from lightning_sketch.operators.precision import full_precision
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.operators.streaming import StreamingSketch
from lightning_sketch.params import Layout


class SketchSink:
    """Sketches of the gradients of single examples, from their pieces.

    Works on the device of the parameters, in float32 (float64 if a parameter is), whatever autocast says; buffers are
    kept from batch to batch. A sketch that streams costs about as much as its numbers and takes 13 to 18 MB of scratch
    memory, or a few times what it returns if that is more. One that does not (AFFD, FJL, QK) forms each piece whole
    and costs all of the sketch for each: correct, and slow.

    Args:
        sketch: takes vectors of the layout's size.
        layout: where in the flat vector each parameter lies.
        parameters: those that pieces may belong to, by their names in the layout.

    Raises:
        ValueError: if sizes disagree, or a parameter is not in the layout.

    >>> layer = nn.Linear(3, 2, bias=False)
    >>> layout = Layout.of(layer)
    >>> from lightning_sketch.operators.count_sketch import CountSketch
    >>> sink = SketchSink(CountSketch(layout.n, dim=4), layout, dict(layer.named_parameters()))
    >>> sink.start(examples=5)
    >>> sink.add(Outer(layer.weight, left=torch.ones(5, 1, 2), right=torch.ones(5, 1, 3)))
    >>> sink.rows().shape
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
        self._sums: Slabs | _Whole | None = None
        self._like: Tensor | None = None

    @torch.no_grad()
    def start(self, examples: int) -> None:
        """A new batch of this size: all rows are zero."""
        dtypes = (parameter.dtype for parameter in self._parameters.values())
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        device = next((parameter.device for parameter in self._parameters.values()), None)
        like = torch.empty(0, dtype=dtype, device=device)
        if self._sums is None or (like.dtype, like.device) != (self._like.dtype, self._like.device):
            self._like = like
            kind = Slabs if isinstance(self._sketch, StreamingSketch) else _Whole
            self._sums = kind(self._sketch, like)
        self._examples = examples
        self._sums.start(examples)

    @torch.no_grad()
    def add(self, piece: Piece) -> None:
        """Add to the gradients of this batch.

        Raises:
            ValueError: if the piece belongs to no known parameter, leaves it, or has another number of examples.
            RuntimeError: before the first `start`.
        """
        offset, start, size = self._place(piece)
        with full_precision(self._like.device):
            if isinstance(piece, Rows):
                index = piece.index.to(self._like.device, torch.int64)
                self._sums.write_rows(offset, index, self._plain(piece.values))
            elif isinstance(piece, Outer):
                fill = _product(self._plain(piece.left), self._plain(piece.right))
                self._sums.write(offset + start, offset + start + size, fill)
            else:
                self._sums.write(offset + start, offset + start + size, _copy(self._plain(piece.values)))

    @torch.no_grad()
    def rows(self) -> Float[Tensor, "examples dim"]:
        """The sketches of what was added since `start`.

        Raises:
            RuntimeError: before the first `start`.
        """
        self._started()
        with full_precision(self._like.device):
            return self._sums.total()

    def _started(self) -> None:
        if self._sums is None:
            raise RuntimeError("the sink has no batch yet; call start(examples) first.")

    def _place(self, piece: Piece) -> tuple[int, int, int]:
        """Where the parameter begins in the flat vector, where the piece begins in the parameter, and its size."""
        self._started()
        offset = self._offsets.get(id(piece.parameter))
        if offset is None:
            shape = tuple(piece.parameter.shape)
            raise ValueError(f"a piece belongs to a parameter of shape {shape}, none of this sink's; pass it to it.")
        if isinstance(piece, Rows):
            examples, start, size = len(piece.values), 0, piece.parameter.numel()
            fits = piece.values.shape[2:].numel() * len(piece.parameter) == size
        elif isinstance(piece, Outer):
            examples, start, size = len(piece.left), piece.start, piece.left.shape[2] * piece.right.shape[2]
            fits = 0 <= start <= start + size <= piece.parameter.numel()
        else:
            examples, start, size = len(piece.values), piece.start, piece.values.shape[1]
            fits = 0 <= start <= start + size <= piece.parameter.numel()
        if not fits or examples != self._examples:
            raise ValueError(
                f"{type(piece).__name__} gives {examples} examples {size} numbers from {start} on, of a parameter of "
                f"{piece.parameter.numel()}, to a batch of {self._examples}; give all of a batch, inside the parameter."
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


class _Whole:
    """As `Slabs`, for sketches that do not stream: every range is formed whole, for all examples."""

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
            piece = self._sketch.columns(start + first * columns, start + last * columns)
            self._total += piece.matvec(whole.view(examples, -1))

    def total(self) -> Float[Tensor, "examples dim"]:
        return self._total.clone()
