"""Launches of the kernels in Triton: BlockSRHT and CountSketch on a CUDA device."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.kernels.triton import block_srht as hadamard
from lightning_sketch.operators.kernels.triton import count_sketch as rolling
from lightning_sketch.operators.kernels.triton.plans import Plan, Tiles, constants, plan_of, tiles_of

if TYPE_CHECKING:
    from lightning_sketch.operators.sketch import Sketch

# Numbers from which on a piece of a vector is read where it is; smaller ones are joined, since a launch takes the host
# as long as such a copy takes the device.
_JOINED = 1 << 24
_REGISTERS = 128  # of a thread at most; with 80, and more programs at once, all kernels took longer


def forward(sketch: "Sketch", x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
    """Return S[:, start : start + size] x for each row, in float32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        if sketch.kind == "count_sketch":
            return count_sketch_forward(sketch, x, start, tiles_of(sketch.dim, False))
        return block_srht_forward(sketch, x, start, plan_of(sketch.width, x.element_size(), False))


def forward_pieces(sketch: "Sketch", pieces: Sequence[tuple[int, Tensor]]) -> Float[Tensor, "1 dim"]:
    """Return S x, x given by pieces of it and where they begin; small pieces that follow each other are joined."""
    total = pieces[0][1].new_zeros(1, sketch.dim, dtype=torch.float32)
    joined: list[Tensor] = []
    begin = end = 0
    for start, x in [*pieces, (-1, pieces[0][1][:0])]:
        if joined and (start != end or x.dtype != joined[0].dtype or end - begin >= _JOINED or len(x) >= _JOINED):
            whole = joined[0] if len(joined) == 1 else torch.cat(joined)
            total += forward(sketch, whole[None], begin)
            joined = []
        if not joined:
            begin = end = start
        joined.append(x)
        end += len(x)
    return total


def adjoint(sketch: "Sketch", y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
    """Return S[:, start : stop]ᵀ y for each row, in float32."""
    with torch.cuda.device_of(y):
        if sketch.kind == "count_sketch":
            return count_sketch_adjoint(sketch, y.contiguous(), start, stop, tiles_of(sketch.dim, True))
        return block_srht_adjoint(sketch, y, start, stop, plan_of(sketch.width, 4, True))


def block_srht_forward(sketch: "Sketch", x: Tensor, start: int, plan: Plan) -> Tensor:
    """Return the sketch of rows by programs of a plan."""
    rows, stop, dim, chunk = len(x), start + x.shape[1], sketch.dim, sketch.width
    fixed, parts = constants(plan, chunk), plan.parts(chunk)
    unit = parts << plan.bits
    first, count = _units(start, stop, unit)
    groups = _groups(count, plan.programs, rows * parts, x.device)
    sums = x.new_empty(rows, groups, unit, dtype=torch.float32)
    stride = x.stride(0) if rows > 1 else 0
    align = 16 if start % 16 == stride % 16 == 0 else 1
    hadamard.forward[(rows * groups * parts,)](
        x, sums, chunk**-0.5, start // align, stop, stride // align, first, count, groups,
        *_keys(sketch, "in", "out"),
        align, PREFETCH=plan.prefetch and parts == 1, **fixed, num_warps=plan.warps, maxnreg=_REGISTERS,
    )  # fmt: skip
    total = sums.view(rows, -1, chunk).sum(1)
    if dim == chunk:
        return total
    out = total[:, :dim].contiguous()
    out[:, : chunk - dim] += total[:, dim:]
    return out


def block_srht_adjoint(sketch: "Sketch", y: Tensor, start: int, stop: int, plan: Plan) -> Tensor:
    """Return the adjoint of the sketch by programs of a plan."""
    rows, size, chunk = len(y), stop - start, sketch.width
    y = torch.cat((y, y[:, : chunk - sketch.dim]), dim=1).contiguous() if sketch.dim < chunk else y.contiguous()
    fixed, parts = constants(plan, chunk), plan.parts(chunk)
    first, count = _units(start, stop, parts << plan.bits)
    groups = _groups(count, plan.programs, rows * parts, y.device)
    out = y.new_empty(rows, size, dtype=torch.float32)
    align = 16 if start % 16 == 0 and (rows == 1 or size % 16 == 0) else 1
    hadamard.adjoint[(rows * groups * parts,)](
        y, out, chunk**-0.5, start // align, stop, size // align, first, count, groups,
        *_keys(sketch, "in", "out"),
        align, CHUNK=chunk, **fixed, num_warps=plan.warps, maxnreg=_REGISTERS,
    )  # fmt: skip
    return out


def count_sketch_forward(sketch: "Sketch", x: Tensor, start: int, tiles: Tiles) -> Tensor:
    """Return the sketch of rows by programs of some tiles."""
    rows, stop, dim = len(x), start + x.shape[1], sketch.dim
    parts = -(-dim // tiles.width)
    first, count = _units(start, stop, dim)
    count = -(-count // tiles.chunks)
    groups = _groups(count, tiles.programs, rows * parts, x.device)
    sums = x.new_empty(rows, groups, dim, dtype=torch.float32)
    rolling.forward[(rows * groups * parts,)](
        x, sums, start, stop, x.stride(0) if rows > 1 else 0, first, count, groups, dim,
        *_keys(sketch, "signs", "shifts"),
        tiles.chunks, tiles.width, dim % tiles.width == 0, _wide(stop), num_warps=tiles.warps,
    )  # fmt: skip
    return sums.sum(1)


def count_sketch_adjoint(sketch: "Sketch", y: Tensor, start: int, stop: int, tiles: Tiles) -> Tensor:
    """Return the adjoint of the sketch by programs of some tiles."""
    rows, size, dim = len(y), stop - start, sketch.dim
    parts = -(-dim // tiles.width)
    first, count = _units(start, stop, dim)
    count = -(-count // tiles.chunks)
    groups = _groups(count, tiles.programs, rows * parts, y.device)
    out = y.new_empty(rows, size, dtype=torch.float32)
    rolling.adjoint[(rows * groups * parts,)](
        y, out, start, stop, size, first, count, groups, dim,
        *_keys(sketch, "signs", "shifts"),
        tiles.chunks, tiles.width, dim % tiles.width == 0, _wide(stop), num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _units(start: int, stop: int, unit: int) -> tuple[int, int]:
    """Return the first of the units of numbers that a range touches, and how many they are."""
    return start // unit, -(-stop // unit) - start // unit


def _groups(count: int, programs: int, others: int, device: torch.device) -> int:
    """Return over how many groups of programs `count` units are shared, with `programs` on each multiprocessor."""
    return min(count, max(1, programs * _multiprocessors(device) // others))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2  # in Triton's interpreter


def _wide(stop: int) -> bool:
    """Return whether the index of a word of signs may need more than 32 bits."""
    return stop > 1 << 37


@functools.lru_cache(maxsize=64)
def _keys(sketch: "Sketch", *streams: str) -> tuple[int, ...]:
    """Return the keys of streams as signed integers of 32 bits, so that a kernel is compiled once for all keys."""
    return tuple((number ^ 1 << 31) - (1 << 31) for stream in streams for number in sketch.key(stream))
