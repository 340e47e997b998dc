"""CountSketch on a CPU, one pass: signs and shifts from the hash, private sums.

    forward:  sum over the chunks of roll(s_c ∘ x_c, r_c)
    adjoint:  x_c = s_c ∘ roll(y, -r_c)

The numbers of a chunk are handled in runs that lie together in the sketch too, and whose signs are one bit of
consecutive words.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import carray

from lightning_sketch.operators.kernels.numba.memory import address, aligned, copy_out, fill, in_place, next_unit
from lightning_sketch.operators.kernels.numba.vectors import (
    BLOCK,
    ROW,
    as_bits,
    as_float,
    floats,
    kept_jit,
    word,
    write_words,
)  # fmt: skip

_KEPT = 64  # chunks in a sum before it is added to the whole one, which keeps rounding small


@functools.cache
def compiled(adjoint: bool) -> Callable[..., None]:
    """Return a function that maps chunks of vectors, which have the size of the sketch.

    It takes what the function of `block_srht.compiled` takes, with chunks for units, and the keys of signs and shifts.
    """

    @kept_jit
    def run(pieces, parts, sketches, begin, end, sign0, sign1, shift0, shift1):
        dim = sketches.shape[2]
        held, sums = aligned(dim), aligned(dim)
        words = np.empty(ROW, np.uint32)
        hashed = -1
        for task in range(begin, end):
            row, part = task // len(parts), task % len(parts)
            own, sketch = pieces[row], sketches[row, 0 if adjoint else part]
            mapped = sketch if adjoint else sums
            done, piece, number = 0, 0, parts[part, 0]
            if not adjoint:
                sketch[:] = 0
                sums[:] = 0
            while True:
                piece, number = next_unit(own, piece, number, dim)
                if piece == len(own) or number >= parts[part, 1]:
                    break
                start = number * dim
                there = in_place(own, piece, start, start + dim)
                if there != 0 and own[piece, 3] != 4:
                    there = 0
                if there == 0 and not adjoint:
                    fill(held, own, piece, start, start + dim)
                numbers = carray(floats(address(held) if there == 0 else there), dim)
                shift = np.int64(np.uint64(word(number, shift0, shift1)) * np.uint64(dim) >> np.uint64(32))
                place = 0
                while place < dim:
                    index = start + place
                    to = place + shift if place + shift < dim else place + shift - dim
                    lane = index % ROW
                    count = min(ROW - lane, dim - place, dim - to)
                    if index // BLOCK != hashed:
                        hashed = index // BLOCK
                        write_words(words, hashed, sign0, sign1)
                    above = np.uint32(31 - index // ROW % 32)
                    signs, x, y = words[lane : lane + count], numbers[place : place + count], mapped[to : to + count]
                    for i in range(count):
                        sign = np.uint32(np.uint32(signs[i] << above) & np.uint32(1 << 31))
                        if adjoint:
                            x[i] = as_float(as_bits(y[i]) ^ sign)
                        else:
                            y[i] += as_float(as_bits(x[i]) ^ sign)
                    place += count
                if adjoint and there == 0:
                    copy_out(held, own, piece, start, start + dim)
                done, number = done + 1, number + 1
                if not adjoint and done % _KEPT == 0:
                    sketch += sums
                    sums[:] = 0
            if not adjoint:
                sketch += sums

    return run
