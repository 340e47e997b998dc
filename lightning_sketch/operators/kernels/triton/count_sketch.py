"""CountSketch on a GPU, one pass: signs and shifts from the hash, private sums.

    forward:  sums[g] = sum over the chunks of program g of roll(s_c ∘ x_c, r_c)
    adjoint:  x_c = s_c ∘ roll(y, -r_c)

A program owns WIDTH places of the sketch (of a chunk, in the adjoint) and walks over chunks, CHUNKS at a time. A rolled
chunk shares no words of signs among its threads, so that each number computes its own word.
"""

import triton.language as tl

from lightning_sketch.operators.kernels.triton.language import range, triton_jit

_M1, _M2 = tl.constexpr(0x7FEB352D), tl.constexpr(0x5BD1E995)
_NUMBERS = ["start", "stop", "stride", "first", "count", "groups", "dim", "sign0", "sign1", "shift0", "shift1"]


@triton_jit
def _word(low, high, k0, k1, WIDE: tl.constexpr):
    """Return the random word at index 2^32 high + low; `high` is zero unless WIDE.

    A key is mixed in after the shift, as k ^ k >> s: that is the same, and is computed once.
    """
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    h = low
    if WIDE:
        h = h ^ (high * _M2)
    h = (h ^ (h >> 16) ^ (k0 ^ (k0 >> 16))) * _M1
    if WIDE:
        h = h ^ (high * _M1)
    h = (h ^ (h >> 15) ^ (k1 ^ (k1 >> 15))) * _M2
    return h ^ (h >> 16)


@triton_jit
def _shift(chunk, dim, k0, k1):
    """Return the shift of each chunk."""
    word = _word(chunk.to(tl.uint32), (chunk >> 32).to(tl.uint32), k0, k1, True)
    return (word.to(tl.uint64) * dim.to(tl.uint64) >> 32).to(tl.int32)


@triton_jit
def _flip(x, base, place, k0, k1, WIDE: tl.constexpr):
    """Multiply x by the signs at the indices base + place, for places from 0 to 2^22."""
    near = ((base & 8191).to(tl.int32) + place).to(tl.uint32)  # from the start of a block of 2^13 signs, 2^8 words
    word = (base >> 13) << 8
    local = (near >> 5) & 0xFFFFFF00 | near & 255
    if WIDE:
        index = word + local.to(tl.int64)
        h = _word(index.to(tl.uint32), (index >> 32).to(tl.uint32), k0, k1, True)
    else:
        h = _word(word.to(tl.uint32) + local, 0, k0, k1, False)
    sign = (h << ((near >> 8 & 31) ^ 31)) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton_jit
def _inside(place, base, start, stop, dim):
    """Return whether the indices base + place lie in a chunk and in [start, stop)."""
    low, high = tl.maximum(start - base, 0), tl.maximum(tl.minimum(stop - base, dim), 0)
    return (place >= low.to(tl.int32)) & (place < high.to(tl.int32))


@triton_jit
def _rolled(
    x, at, chunk, start, stop, dim, sign0, sign1, shift0, shift1,
    MASKED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the numbers of roll(s ∘ x, r) at some places of each chunk; zeros outside [start, stop) if MASKED."""
    back = (at - _shift(chunk, dim, shift0, shift1)).to(tl.uint32)
    place = tl.minimum(back, back + dim.to(tl.uint32)).to(tl.int32)  # a negative number is a large one without a sign
    base = chunk * dim
    here = x + (base - start) + place
    if MASKED:
        number = tl.load(here, mask=_inside(place, base, start, stop, dim) & (at < dim), other=0.0)
    elif EVEN:
        number = tl.load(here)
    else:
        number = tl.load(here, mask=at < dim, other=0.0)
    return _flip(number.to(tl.float32), base, place, sign0, sign1, WIDE)


@triton_jit(do_not_specialize=_NUMBERS)
def forward(
    x, sums,
    start, stop, stride, first, count, groups, dim, sign0, sign1, shift0, shift1,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum the mapped chunks of each program: sums[row, group] for the numbers [start, stop) of each row of x.

    A unit is CHUNKS chunks; `count` units from chunk number `first` on touch the range. All but the first and the last
    lie inside, and are loaded without masks. EVEN says that WIDTH divides dim, WIDE that an index of a word of signs
    may need more than 32 bits.
    """
    start, stop, first = start.to(tl.int64), stop.to(tl.int64), first.to(tl.int64)
    parts = tl.cdiv(dim, WIDTH)
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, row = program % groups, program // groups
    x += row * stride.to(tl.int64)
    at = part * WIDTH + tl.arange(0, WIDTH)[None, :]
    chunk = first + tl.arange(0, CHUNKS)[:, None]
    total = tl.zeros([CHUNKS, WIDTH], tl.float32)
    low = (first * dim < start).to(tl.int32)
    high = count - ((first + count * CHUNKS) * dim > stop).to(tl.int32)
    for c in range(low + group, high, groups):
        total += _rolled(
            x, at, chunk + c * CHUNKS, start, stop, dim, sign0, sign1, shift0, shift1, False, EVEN, WIDE
        )  # fmt: skip
    for c in range(0, count, tl.maximum(count - 1, 1)):
        if ((c < low) | (c >= high)) & (c % groups == group):
            total += _rolled(
                x, at, chunk + c * CHUNKS, start, stop, dim, sign0, sign1, shift0, shift1, True, EVEN, WIDE
            )  # fmt: skip
    at = part * WIDTH + tl.arange(0, WIDTH)
    tl.store(sums + program.to(tl.int64) * dim + at, tl.sum(total, 0), mask=at < dim)


@triton_jit(do_not_specialize=_NUMBERS)
def adjoint(
    y, out,
    start, stop, stride, first, count, groups, dim, sign0, sign1, shift0, shift1,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write s_c ∘ roll(y, -r_c) for the numbers [start, stop) of each row of `out`."""
    start, stop, first = start.to(tl.int64), stop.to(tl.int64), first.to(tl.int64)
    parts = tl.cdiv(dim, WIDTH)
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, row = program % groups, program // groups
    y += row.to(tl.int64) * dim
    out += row * stride.to(tl.int64)
    place = part * WIDTH + tl.arange(0, WIDTH)[None, :]
    for c in range(group, count, groups):
        chunk = first + c * CHUNKS + tl.arange(0, CHUNKS)[:, None]
        base = chunk * dim
        ahead = (place + _shift(chunk, dim, shift0, shift1)).to(tl.uint32)
        at = tl.minimum(ahead, ahead - dim.to(tl.uint32)).to(tl.int32)
        there = out + (base - start) + place
        begin = (first + c * CHUNKS) * dim
        if EVEN & (begin >= start) & (begin + CHUNKS * dim <= stop):
            tl.store(there, _flip(tl.load(y + at).to(tl.float32), base, place, sign0, sign1, WIDE))
        else:
            inside = _inside(place, base, start, stop, dim)
            number = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(there, _flip(number, base, place, sign0, sign1, WIDE), mask=inside)
