"""The numbers of a vector where they lie in memory, for functions that numba compiles.

A vector is given by its pieces, rows of integers in the order of their place in the vector:

    address, first index, end of the indices, bytes of a number (4 in float32, 2 in bfloat16)

What no piece covers is zero.
"""

from typing import Any

import numpy as np
from numba import carray

from lightning_sketch.operators.kernels.numba.vectors import floats, halves, jit


@jit
def address(array: Any) -> Any:
    """Return where an array lies in memory."""
    return np.int64(array.ctypes.data)  # which is unsigned, and with signed integers would make floating-point numbers


@jit
def aligned(count: int) -> Any:
    """Return new memory for numbers in float32, at the start of a line of the cache."""
    memory = np.empty(count + 16, np.float32)
    skipped = -address(memory) % 64 // 4
    return memory[skipped : skipped + count]


@jit
def next_unit(pieces: Any, piece: int, unit: int, size: int) -> tuple[int, int]:
    """Return the first piece from `piece` on, and the first unit of `size` numbers from `unit` on, that meet.

    The piece is `len(pieces)` if none is left. Units between pieces are skipped, since they are zero.
    """
    while piece < len(pieces) and pieces[piece, 2] <= unit * size:
        piece += 1
    if piece < len(pieces):
        unit = max(unit, pieces[piece, 1] // size)
    return piece, unit


@jit
def in_place(pieces: Any, piece: int, low: int, high: int) -> int:
    """Return the address of the numbers [low, high) if a piece has them all, else 0."""
    if piece < len(pieces) and pieces[piece, 1] <= low and high <= pieces[piece, 2]:
        return pieces[piece, 0] + pieces[piece, 3] * (low - pieces[piece, 1])
    return 0


@jit
def fill(target: Any, pieces: Any, piece: int, low: int, high: int) -> None:
    """Write the numbers [low, high) to `target`, in float32; `piece` is the first that has some of them."""
    done = low
    while piece < len(pieces) and pieces[piece, 1] < high:
        start, stop = max(low, pieces[piece, 1]), min(high, pieces[piece, 2])
        target[done - low : start - low] = 0
        count, skipped, to = stop - start, start - pieces[piece, 1], start - low
        if pieces[piece, 3] == 4:
            target[to : to + count] = carray(floats(pieces[piece, 0] + 4 * skipped), count)
        else:
            source = carray(halves(pieces[piece, 0] + 2 * skipped), count)
            bits = target.view(np.uint32)[to : to + count]
            for i in range(count):
                bits[i] = np.uint32(source[i]) << np.uint32(16)
        done, piece = stop, piece + 1
    target[done - low : high - low] = 0


@jit
def copy_out(source: Any, pieces: Any, piece: int, low: int, high: int) -> None:
    """Write those of the numbers [low, high) that a piece has from `source` to it."""
    start, stop = max(low, pieces[piece, 1]), min(high, pieces[piece, 2])
    target = carray(floats(pieces[piece, 0] + 4 * (start - pieces[piece, 1])), stop - start)
    target[:] = source[start - low : stop - low]
