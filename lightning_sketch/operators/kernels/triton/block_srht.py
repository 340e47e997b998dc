"""Block SRHT on a GPU, one pass: signs from the hash, Hadamard transform in registers, private sums.

    forward:  sums[g] = sum over the chunks of program g of t_c ∘ H (s_c ∘ x_c)
    adjoint:  x_c = s_c ∘ H (t_c ∘ y)

A program works on tiles of 2^13 or 2^14 numbers, (blocks of random signs, 32 bits of a word, 256 words). A thread holds
32 numbers of a tile, and transforms it along five bits of their index at a time, by additions and subtractions in its
registers; between, the tile moves through shared memory so that five other bits lie in a thread. A chunk larger than
a tile is two or more of them, and a program transforms one part of it: the sum, with signs, of all its tiles.
"""

import triton.language as tl

from lightning_sketch.operators.kernels.triton.language import gl, jit, range

_WORDS = tl.constexpr(256)  # of random signs in a block, 32 signs each
_M1, _M2 = tl.constexpr(0x7FEB352D), gl.constexpr(0x5BD1E995)


@jit
def _flip(x, start, k0, k1, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Multiply a tile, whose first number has the index `start` (a multiple of its size), by the signs of a key."""
    SLICE: tl.constexpr = gl.SliceLayout(1, LAYOUT)
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, SLICE))
    lane = gl.arange(0, _WORDS, gl.SliceLayout(0, SLICE))
    index = (block[:, None] * _WORDS + lane[None, :]).to(gl.uint32)
    first = start // 32
    low, high = first.to(gl.uint32), (first >> 32).to(gl.uint32)
    h = index ^ (low ^ k0.to(gl.uint32) ^ (high * _M2).to(gl.uint32))
    h = (h ^ (h >> 16)) * _M1
    h = h ^ (k1.to(gl.uint32) ^ (high * _M1).to(gl.uint32))
    h = (h ^ (h >> 15)) * _M2
    h = h ^ (h >> 16)
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))).to(gl.uint32)
    shift = (31 - bit)[None, :, None]
    sign = (h[:, None, :] << shift) & 0x80000000
    return (x.to(gl.uint32, bitcast=True) ^ sign).to(gl.float32, bitcast=True)


@jit
def _transform_held(x, BITS: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Transform a tile along the bits of the index that are set in BITS; they lie in the registers of a thread."""
    x = gl.convert_layout(x, LAYOUT)
    for bit in gl.static_range(15):
        if (BITS >> bit) & 1:
            x = gl.reshape(x, [BLOCKS * 8192 >> (bit + 1), 2, 1 << bit])
            a, b = gl.split(gl.permute(x, [0, 2, 1]))
            x = gl.permute(gl.join(a + b, a - b), [0, 2, 1])
    return gl.convert_layout(gl.reshape(x, [BLOCKS, 32, _WORDS]), LAYOUT, assert_trivial=True)


@jit
def _transform(
    x, BITS_A: tl.constexpr, BITS_B: tl.constexpr, BITS_C: tl.constexpr,
    BLOCKS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Transform a tile in layout A along all bits that are set; the result is in layout C."""
    x = _transform_held(x, BITS_A, BLOCKS, A)
    x = _transform_held(x, BITS_B, BLOCKS, B)
    return _transform_held(x, BITS_C, BLOCKS, C)


@jit
def _index(BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the places of a tile's numbers."""
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    word = gl.arange(0, _WORDS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return block[:, None, None] * 8192 + bit[None, :, None] * _WORDS + word[None, None, :]


@jit
def _inside(base, start, stop, SIZE: tl.constexpr):
    """Return the range of the places of a tile whose indices lie in [start, stop)."""
    return gl.maximum(start - base, 0).to(gl.int32), gl.minimum(stop - base, SIZE).to(gl.int32)


@jit
def _load(x, base, start, stop, MASKED: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Load the tile from index `base` on of the numbers [start, stop), which lie at x; zeros outside if MASKED."""
    place = _index(BLOCKS, LAYOUT)
    if MASKED:
        low, high = _inside(base, start, stop, BLOCKS * 8192)
        tile = gl.load(x + (base - start) + place, mask=(place >= low) & (place < high), other=0.0)
    else:  # as wide as the alignment allows
        tile = gl.load(x + (base - start) + place)
    return tile


@jit
def _parity(q: tl.constexpr, part):
    """Return the entry ±1 of a small Hadamard matrix."""
    odd = q & part
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1)
    return (1 - 2 * (odd & 1)).to(gl.float32)


@jit
def _flipped(
    x, base, part, start, stop, k0, k1,
    MASKED: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return s ∘ x for the unit that begins at index `base`; where it has several tiles, their part of a transform."""
    tile = _flip(_load(x, base, start, stop, MASKED, BLOCKS, LAYOUT).to(gl.float32), base, k0, k1, BLOCKS, LAYOUT)
    for q in gl.static_range(1, PARTS):
        there = base + q * BLOCKS * 8192
        other = _load(x, there, start, stop, MASKED, BLOCKS, LAYOUT).to(gl.float32)
        tile += _parity(q, part) * _flip(other, there, k0, k1, BLOCKS, LAYOUT)
    return tile


@jit(do_not_specialize=["start", "stop", "stride", "first", "count", "groups", "in0", "in1", "out0", "out1"])
def forward(
    x, sums, scale,
    start, stop, stride, first, count, groups, in0, in1, out0, out1,
    ALIGN: tl.constexpr, PREFETCH: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    BITS_A: tl.constexpr, BITS_B: tl.constexpr, BITS_C: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum the mapped units of each program: sums[row, group, part] for the numbers [start, stop) of each row of x.

    A unit is a tile, of one chunk or many, or a chunk of PARTS tiles; `count` units from number `first` on touch the
    range. All but the first and the last lie inside, and are loaded without masks.
    """
    SIZE: tl.constexpr = BLOCKS * 8192
    UNIT: tl.constexpr = SIZE * PARTS
    start, stop, first = start.to(gl.int64) * ALIGN, stop.to(gl.int64), first.to(gl.int64)
    part, group, row = gl.program_id(0) % PARTS, gl.program_id(0) // PARTS % groups, gl.program_id(0) // PARTS // groups
    x += row * stride.to(gl.int64) * ALIGN
    total = gl.full([BLOCKS, 32, _WORDS], 0.0, gl.float32, C)
    low = (first * UNIT < start).to(gl.int32)
    high = count - ((first + count) * UNIT > stop).to(gl.int32)
    if PREFETCH:
        ahead = (first + low + group) * UNIT
        tile = _load(x, ahead, start, stop, True, BLOCKS, A)
    for c in range(low + group, high, groups):
        base = (first + c) * UNIT
        if PREFETCH:
            ahead = (first + gl.minimum(c + groups, high - 1)) * UNIT
            flipped = _flip(tile.to(gl.float32), base, in0, in1, BLOCKS, A)
            tile = _load(x, ahead, start, stop, False, BLOCKS, A)
        else:
            flipped = _flipped(x, base, part, start, stop, in0, in1, False, BLOCKS, PARTS, A)
        mixed = _transform(flipped, BITS_A, BITS_B, BITS_C, BLOCKS, A, B, C)
        total += _flip(mixed, base + part * SIZE, out0, out1, BLOCKS, C)
    for c in range(0, count, gl.maximum(count - 1, 1)):
        if ((c < low) | (c >= high)) & (c % groups == group):
            base = (first + c) * UNIT
            flipped = _flipped(x, base, part, start, stop, in0, in1, True, BLOCKS, PARTS, A)
            mixed = _transform(flipped, BITS_A, BITS_B, BITS_C, BLOCKS, A, B, C)
            total += _flip(mixed, base + part * SIZE, out0, out1, BLOCKS, C)
    gl.store(sums + gl.program_id(0).to(gl.int64) * SIZE + _index(BLOCKS, C), total * scale)


@jit(do_not_specialize=["start", "stop", "stride", "first", "count", "groups", "in0", "in1", "out0", "out1"])
def adjoint(
    y, out, scale,
    start, stop, stride, first, count, groups, in0, in1, out0, out1,
    ALIGN: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    BITS_A: tl.constexpr, BITS_B: tl.constexpr, BITS_C: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write s_c ∘ H (t_c ∘ unfold(y)) for the numbers [start, stop) of each row of `out`."""
    SIZE: tl.constexpr = BLOCKS * 8192
    start, stop, first = start.to(gl.int64) * ALIGN, stop.to(gl.int64), first.to(gl.int64)
    part, group, row = gl.program_id(0) % PARTS, gl.program_id(0) // PARTS % groups, gl.program_id(0) // PARTS // groups
    out += row * stride.to(gl.int64) * ALIGN
    place = _index(BLOCKS, C)
    y += row.to(gl.int64) * CHUNK
    if PARTS == 1:
        held = scale * gl.load(y + _index(BLOCKS, A) % CHUNK).to(gl.float32)
    for c in range(group, count, groups):
        base = (first + c) * (SIZE * PARTS)
        if PARTS == 1:
            tile = _flip(held, base, out0, out1, BLOCKS, A)
        else:
            tile = gl.full([BLOCKS, 32, _WORDS], 0.0, gl.float32, A)
            for q in gl.static_range(PARTS):
                other = gl.load(y + q * SIZE + _index(BLOCKS, A)).to(gl.float32)
                tile += scale * _parity(q, part) * _flip(other, base + q * SIZE, out0, out1, BLOCKS, A)
        tile = _transform(tile, BITS_A, BITS_B, BITS_C, BLOCKS, A, B, C)
        base += part * SIZE
        tile = _flip(tile, base, in0, in1, BLOCKS, C)
        if (base >= start) & (base + SIZE <= stop):
            gl.store(out + (base - start) + place, tile)
        else:
            low, high = _inside(base, start, stop, SIZE)
            gl.store(out + (base - start) + place, tile, mask=(place >= low) & (place < high))
