"""CountSketch on a GPU, one pass: signs and shifts from the hash, private sums.

    forward:  sums[g] = sum over the chunks of program g of roll(s_c ∘ x_c, r_c)
    adjoint:  x_c = s_c ∘ roll(y, -r_c)

A program owns WIDTH places of the sketch (of a chunk, in the adjoint) and walks over chunks, CHUNKS at a time. A rolled
chunk shares no words of signs among its threads, so that each number computes its own word.
"""

import triton.language as tl

from lightning_sketch.operators.kernels.triton.language import range, triton_jit

_M1, _M2 = tl.constexpr(0x7FEB352D), tl.constexpr(0x5BD1E995)
_KEYS = ["start", "stop", "stride", "first", "count", "groups", "dim", "sign0", "sign1", "shift0", "shift1"]


@triton_jit
def _word(low, high, k0, k1, WIDE: tl.constexpr):
    """Return the random word at index 2^32 high + low; `high` is zero unless WIDE."""
    h = low ^ k0.to(tl.uint32)
    if WIDE:
        h = h ^ (high * _M2)
    h = (h ^ (h >> 16)) * _M1
    h = h ^ k1.to(tl.uint32)
    if WIDE:
        h = h ^ (high * _M1)
    h = (h ^ (h >> 15)) * _M2
    return h ^ (h >> 16)


@triton_jit
def _shift(chunk, dim, k0, k1):
    """Return the shift of each chunk."""
    word = _word(chunk.to(tl.uint32), (chunk >> 32).to(tl.uint32), k0, k1, True)
    return (word.to(tl.uint64) * dim.to(tl.uint64) >> 32).to(tl.int32)


@triton_jit
def _flip(x, base, place, k0, k1, WIDE: tl.constexpr):
    """Multiply x by the signs at the indices base + place, for places from 0 to 2^22."""
    near = (base & 8191).to(tl.int32) + place  # from the start of a block of 2^13 signs, 2^8 words
    word = (base >> 13) << 8
    local = ((near >> 13) << 8 | near & 255).to(tl.uint32)
    if WIDE:
        index = word + local.to(tl.int64)
        h = _word(index.to(tl.uint32), (index >> 32).to(tl.uint32), k0, k1, True)
    else:
        h = _word(word.to(tl.uint32) + local, 0, k0, k1, False)
    sign = (h << (31 - (near >> 8 & 31)).to(tl.uint32)) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton_jit(do_not_specialize=_KEYS)
def forward(
    x, sums,
    start, stop, stride, first, count, groups, dim, sign0, sign1, shift0, shift1,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum the mapped chunks of each program: sums[row, group] for the numbers [start, stop) of each row of x."""
    start, stop, first = start.to(tl.int64), stop.to(tl.int64), first.to(tl.int64)
    parts = tl.cdiv(dim, WIDTH)
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, row = program % groups, program // groups
    x += row * stride.to(tl.int64)
    at = part * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for c in range(group, count, groups):
        chunk = first + c * CHUNKS + tl.arange(0, CHUNKS)[:, None]
        place = at - _shift(chunk, dim, shift0, shift1)
        place = tl.where(place < 0, place + dim, place)
        base = chunk * dim
        low, high = tl.maximum(start - base, 0), tl.maximum(tl.minimum(stop - base, dim), 0)
        inside = (place >= low.to(tl.int32)) & (place < high.to(tl.int32)) & (at < dim)
        number = tl.load(x + (base - start) + place, mask=inside, other=0.0).to(tl.float32)
        total += _flip(number, base, place, sign0, sign1, WIDE)
    at = part * WIDTH + tl.arange(0, WIDTH)
    tl.store(sums + program.to(tl.int64) * dim + at, tl.sum(total, 0), mask=at < dim)


@triton_jit(do_not_specialize=_KEYS)
def adjoint(
    y, out,
    start, stop, stride, first, count, groups, dim, sign0, sign1, shift0, shift1,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
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
        at = place + _shift(chunk, dim, shift0, shift1)
        at = tl.where(at >= dim, at - dim, at)
        base = chunk * dim
        low, high = tl.maximum(start - base, 0), tl.maximum(tl.minimum(stop - base, dim), 0)
        inside = (place >= low.to(tl.int32)) & (place < high.to(tl.int32))
        number = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + (base - start) + place, _flip(number, base, place, sign0, sign1, WIDE), mask=inside)
