"""Block SRHT on a CPU, one pass: signs from the hash, Hadamard transform in registers, private sums.

    forward:  sum over the units of t_u ∘ H (s_u ∘ x_u)
    adjoint:  x_u = s_u ∘ H (t_u ∘ y)

A unit is a chunk, or 256 numbers of shorter ones, and is transformed between its rows of 256 numbers and then inside
each row. A unit of up to 32 rows stays in a core's first cache meanwhile; a larger one is several blocks of 32 rows,
which are transformed among each other in between.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_sketch.operators.kernels.numba.memory import address, aligned, copy_out, fill, in_place, next_unit
from lightning_sketch.operators.kernels.numba.vectors import (
    BLOCK,
    LANES,
    ROW,
    jit,
    kept_jit,
    mix_blocks,
    mix_row,
    mix_rows,
    write_words,
)

_AT_ONCE = 16  # blocks that are transformed in registers
_KEPT = 64  # units in a sum before it is added to the whole one, which keeps rounding small


@jit
def _write_both(
    before: Any, after: Any, block: int, there: int, before0: Any, before1: Any, after0: Any, after1: Any
) -> int:
    """Write the words that flip a block before and after H, unless those of it are there; return its number."""
    if block != there:
        write_words(before, block, before0, before1)
        write_words(after, block, after0, after1)
    return block


@functools.cache
def compiled(chunk: int, adjoint: bool) -> Callable[..., None]:
    """Return a function that maps units of vectors, compiled for a size of chunks.

    It takes the pieces of each row (see `memory`), parts of their units, each with its first unit and the end of its
    units, vectors of a unit's size for each row and part (in the adjoint for each row), which rows and parts to work
    on, as a range of their numbers, and the keys of the signs before and after H. It writes the sum of the mapped units
    to a vector; the adjoint maps the vector, and writes the numbers of the units to the pieces.
    """
    unit = max(chunk, ROW)
    block = min(unit, BLOCK)
    blocks, rows, levels = unit // block, block // ROW, min(chunk, ROW).bit_length() - 1
    inner, outer = min(blocks, _AT_ONCE), max(1, blocks // _AT_ONCE)
    row, step = 4 * ROW, 4 * LANES  # bytes
    near, far = 4 * block, 4 * block * inner
    add = not adjoint

    @kept_jit
    def run(pieces, parts, vectors, begin, end, before0, before1, after0, after1):
        held, sums = aligned(unit), aligned(unit)
        before, after = aligned(ROW).view(np.uint32), aligned(ROW).view(np.uint32)
        held_at, sums_at = address(held), address(sums)
        before_at, after_at = address(before), address(after)
        hashed = -1
        for task in range(begin, end):
            which, part = task // len(parts), task % len(parts)
            own, vector = pieces[which], vectors[which, 0 if adjoint else part]
            done, piece, number = 0, 0, parts[part, 0]
            if add:
                vector[:] = 0
                sums[:] = 0
            while True:
                piece, number = next_unit(own, piece, number, unit)
                if piece == len(own) or number >= parts[part, 1]:
                    break
                start = number * unit
                there = in_place(own, piece, start, start + unit)
                source, half = address(vector) if adjoint else there, False
                if add and there == 0:
                    fill(held, own, piece, start, start + unit)
                    source = held_at
                elif add:
                    half = own[piece, 3] == 2

                for b in range(blocks):
                    index = start + b * block
                    hashed = _write_both(before, after, index // BLOCK, hashed, before0, before1, after0, after1)
                    bit = np.int32(index // ROW % 32)
                    for at in range(b * near, b * near + row, step):
                        if half:
                            mix_rows(rows, 2, source + at // 2, held_at + at, before_at + at % row, bit)
                        else:
                            mix_rows(rows, 4, source + at, held_at + at, before_at + at % row, bit)

                if inner > 1:
                    for high in range(outer):
                        for at in range(high * far, high * far + near, step):
                            mix_blocks(inner, near, held_at + at)
                if outer > 1:
                    for at in range(0, far, step):
                        mix_blocks(outer, far, held_at + at)

                target = there if adjoint and there != 0 else sums_at
                for b in range(blocks):
                    index = start + b * block
                    hashed = _write_both(before, after, index // BLOCK, hashed, before0, before1, after0, after1)
                    for r in range(rows):
                        at = b * near + r * row
                        mix_row(levels, add, held_at + at, target + at, after_at, np.int32(index // ROW % 32 + r))

                if adjoint and there == 0:
                    copy_out(sums, own, piece, start, start + unit)
                done, number = done + 1, number + 1
                if add and done % _KEPT == 0:
                    vector += sums
                    sums[:] = 0
            if add:
                vector += sums

    return run
