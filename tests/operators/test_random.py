"""Random numbers are a pure function of (seed, stream, index), pinned forever, and as good as independent.

Statistics are tested within five standard errors; seeds are fixed, so that a result never changes.
"""

import math

import pytest
import torch
from marks import slow

from lightning_sketch.operators import random
from lightning_sketch.operators.random import Key, flip_, integers, normals, signs, words

KEY = Key(7, "pin")
FAR = 1 << 32  # where the upper half of the index begins to count
STARTS = [0, 1, 255, 8191, 8193, 32 * FAR - 5]  # on both sides of the edges of words and blocks


def test_words_are_pinned_forever():
    """A change here would silently break every sketch ever stored."""
    assert KEY == (873353424, 3244648290)
    assert words(KEY, 0, 3).tolist() == [34860526, 3880069339, 2559315226]
    assert words(KEY, FAR - 1, FAR + 2).tolist() == [2855172377, 996636111, 3994459385]
    assert words(KEY, 5 * FAR + 3, 5 * FAR + 5).tolist() == [1447939928, 1996821692]
    assert words(Key((1 << 63) - 1, "pin"), 0, 2).tolist() == [2597084109, 1522706764]


def reference(key, index):
    """Return the word by the formula of the docstring, in Python's own integers."""
    mask, m1, m2 = 2**32 - 1, 0x7FEB352D, 0x5BD1E995
    high, low = divmod(index, 2**32)
    h = low ^ key[0] ^ high * m2 & mask
    h = (h ^ h >> 16) * m1 & mask
    h ^= key[1] ^ high * m1 & mask
    h = (h ^ h >> 15) * m2 & mask
    return h ^ h >> 16


@pytest.mark.parametrize("start", [0, FAR - 50, 12345 * FAR + 678, (1 << 63) - 101])
def test_words_follow_their_formula_modulo_2_to_32(start):
    assert words(KEY, start, start + 100).tolist() == [reference(KEY, start + i) for i in range(100)]


def test_signs_are_pinned_forever():
    assert (signs(KEY, 0, 12) < 0).int().tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert (signs(KEY, 250, 262) < 0).int().tolist() == [1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0]
    assert (signs(KEY, 8186, 8198) < 0).int().tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0]


def test_a_sign_is_a_bit_of_a_word():
    """Bit k of word w of a block of 8192 signs is the sign of its element 256 k + w; 1 means -1."""
    block = words(KEY, 3 * 256, 4 * 256)
    bits = block >> torch.arange(32)[:, None] & 1
    assert torch.equal(signs(KEY, 3 * 8192, 4 * 8192), 1.0 - 2 * bits.view(-1))


@pytest.mark.parametrize("draw", [words, signs, normals, lambda *range: integers(*range, below=10)])
@pytest.mark.parametrize("origin", [0, 8190, FAR - 10])
def test_a_slice_does_not_depend_on_the_range_around_it(draw, origin):
    whole = draw(KEY, origin, origin + 20)
    for start, stop in [(0, 1), (3, 20), (9, 12), (10, 20)]:
        assert torch.equal(draw(KEY, origin + start, origin + stop), whole[start:stop])


@pytest.mark.parametrize(
    ("dtype", "start"),
    [
        *((torch.float32, start) for start in STARTS),
        (torch.float64, STARTS[-1]),
        *(slow(torch.float64, start) for start in STARTS[:-1]),
    ],
)
@pytest.mark.parametrize("count", [1, 300, 8192, 20_000])
def test_flip_multiplies_by_the_signs(vectors, dtype, start, count):
    x = vectors(2, count, dtype=dtype)
    assert torch.equal(flip_(x.clone(), KEY, start), x * signs(KEY, start, start + count, dtype))


def test_streams_do_not_repeat_each_other():
    """Two streams, two seeds, and two stretches of one index 2^32 apart: uncorrelated, and no shared words.

    Of 10^8 pairs of words of 32 bits, 0.02 are equal by chance.
    """
    count = 10_000
    streams = [(KEY, 0), (Key(7, "other"), 0), (Key(8, "pin"), 0), (KEY, FAR), (KEY, 2 * FAR), (KEY, 1 << 50)]
    for i, (key, start) in enumerate(streams):
        for other, origin in streams[:i]:
            product = signs(key, 32 * start, 32 * start + count) * signs(other, 32 * origin, 32 * origin + count)
            assert abs(product.mean()) < 5 / math.sqrt(count)
            here, there = words(key, start, start + count), words(other, origin, origin + count)
            assert not torch.isin(here, there).any()


def test_beyond_2_to_32_the_words_are_no_permutation_of_the_first_ones():
    """The upper half of the index enters twice; once alone would give, at index 2^32 + i, the word of i ^ _M2."""
    start, shift = random._M2 & -1024, random._M2 & 1023
    first = words(KEY, start, start + 1024)[torch.arange(1024) ^ shift]  # at index i: the word of i ^ _M2
    assert not torch.isin(words(KEY, FAR, FAR + 1024), first).any()


def test_for_a_fixed_upper_half_no_word_comes_twice():
    for start in (0, FAR):
        assert words(KEY, start, start + (1 << 18)).unique().numel() == 1 << 18


def test_every_bit_of_the_index_flips_every_bit_of_the_word_half_of_the_time():
    """Avalanche: 63 x 32 frequencies over 128 keys with 64 neighboring indices each."""
    near = torch.arange(64)
    keys = [Key(seed, "avalanche") for seed in range(128)]
    starts = [int(i) & -64 | int(j) >> 1 << 32 for i, j in words(KEY, 0, 256).view(-1, 2)]
    plain = [words(key, start, start + 64) for key, start in zip(keys, starts, strict=True)]
    for bit in range(63):
        here = [start ^ (1 << bit & -64) for start in starts]
        flipped = [words(key, start, start + 64)[near ^ 1 << bit & 63] for key, start in zip(keys, here, strict=True)]
        changed = torch.cat(plain) ^ torch.cat(flipped)
        frequency = (changed >> torch.arange(32)[:, None] & 1).double().mean(1)
        assert (frequency - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(changed)), f"bit {bit}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_are_the_same_bits_on_every_device(device):
    for draw in (words, signs, normals):
        assert torch.equal(draw(KEY, FAR - 99, FAR + 9999, device=device).cpu(), draw(KEY, FAR - 99, FAR + 9999))
