"""Chunks from any place, a different set for each row, are mapped by the corresponding columns of the sketch."""

import pytest
import torch
from sketch_kinds import each_kind_and

from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.operators.random import (
    FLIP_SLACK,
    Key,
    flip_chunks_,
    integers,
    integers_at,
    normals,
    normals_at,
    signs,
    words,
    words_at,
)

KEY = Key(7, "pin")
STREAMING = [kind for kind in KINDS.values() if kind.streams]
FAR = 1 << 37  # the index of a word of signs passes 2^32 here


@pytest.mark.parametrize("origin", [0, 1, (1 << 32) - 9, FAR])
def test_numbers_at_an_index_are_those_of_the_range(origin):
    """Bit for bit: sketches outlive the process that made them."""
    order = torch.tensor([[4, 0, 9], [9, 3, 17]])
    assert torch.equal(words_at(KEY, origin + order), words(KEY, origin, origin + 18)[order])
    assert torch.equal(integers_at(KEY, origin + order, 1000), integers(KEY, origin, origin + 18, 1000)[order])
    assert torch.equal(normals_at(KEY, origin + order), normals(KEY, origin, origin + 18)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7, 64, 256, 768, 2048, 8192, 10_000, 1 << 14])
def test_flip_chunks_multiplies_by_the_signs(vectors, dtype, chunk):
    """Chunks within a block of random signs, of one, of several, and across the edges of some; bit for bit."""
    number = torch.tensor([[4, 0, 9], [1, 2, FAR // chunk]])
    x = vectors(2, 3, chunk, dtype=dtype)
    sign = torch.stack([signs(KEY, int(c) * chunk, int(c + 1) * chunk, dtype) for c in number.view(-1)]).view_as(x)
    assert torch.equal(flip_chunks_(x.clone(), KEY, number), x * sign)
    assert torch.equal(flip_chunks_(x.clone(), KEY, number[1:]), x * sign[1:])


@each_kind_and("dim", 33, 64, 512, kinds=STREAMING)
def test_scattered_chunks_are_columns_of_the_sketch(make, dim, vectors):
    """Compared with the sketch of vectors with the chunks in their places; a chunk that comes twice counts twice."""
    chunk = make(n=1000, dim=dim).chunk
    sketch = make(n=max(dim, 9 * chunk), dim=dim, seed=3)
    number = torch.tensor([[8, 2, 2, 0], [5, 6, 1, 7]])
    chunks = vectors(2, 4, sketch.chunk)
    dense = chunks.new_zeros(2, sketch.n // chunk, chunk)
    for row, numbers in enumerate(number):
        dense[row].index_add_(0, numbers, chunks[row])
    torch.testing.assert_close(gathered(sketch, chunks, number), sketch.matvec(dense.view(2, -1)))


@pytest.mark.parametrize("kind", STREAMING, ids=lambda kind: kind.__name__)
def test_numbers_shared_by_all_rows_and_consecutive_ones_agree(kind, vectors):
    """Both ways to give the indices are one map, also where indices pass 2^32; and `total` is added to."""
    sketch = kind(n=1 << 40, dim=256, seed=3)
    first = FAR // sketch.chunk
    chunks, number = vectors(3, 4, sketch.chunk), first + torch.arange(4)[None]
    expected = gathered(sketch, chunks, first)
    torch.testing.assert_close(gathered(sketch, chunks, number), expected)
    torch.testing.assert_close(gathered(sketch, chunks, number.expand(3, 4)), expected)


def gathered(sketch, chunks, which):
    """Return the scaled sum over the chunks; buffers contain NaN before, and the total starts from 1."""
    spare = list(chunks.new_full((2, chunks.numel() + FLIP_SLACK), torch.nan))
    total = chunks.new_ones(len(chunks), sketch.dim)
    sketch.gather(chunks.clone(), which, spare, total)
    return sketch.scale * (total - 1)
