"""Random numbers as a pure function: (seed, stream, index) -> number. Version "v1".

    h = lo ^ k0 ^ a(hi)          index = 2^32 hi + lo,   64-bit key (k0, k1)
    h = (h ^ h >> 16) m1
    h = h ^ k1 ^ b(hi)           all modulo 2^32
    h = (h ^ h >> 15) m2
    word = h ^ h >> 16

No generator, no state: any slice can be made on any device at any time, bit for bit the same, so that a
sketch is fully described by its few integers; the cache of some pages of words (1 MB) only saves time.
Every product stays below 2^63: nothing relies on how a device wraps around. For a fixed `hi`, index -> word
is a bijection.

A word is 32 signs. Bit k of word w of a block is the sign of its element k·W + w, with W = 256 words
a block: unpacking then runs along contiguous memory for each bit.

Changing anything here changes every sketch ever stored: a new version needs a new name (`RNG`).

Source: the finalizer has the shape of Wellons' lowbias32 (2018), with a second multiplier below 2^31.
"""

import functools
import hashlib
import sys

import torch
from jaxtyping import Float, Int
from torch import Tensor

RNG = "v1"

_Device = torch.device | str | None

_MASK = 0xFFFFFFFF
_M1, _M2 = 0x7FEB352D, 0x5BD1E995
_W = 256
_BLOCK = 32 * _W
_PAGE = 1 << 16
_LOW = 0 if sys.byteorder == "little" else 1  # place of the low half of an integer of 64 bits

FLIP_SLACK = 2 * _BLOCK  # numbers that a scratch buffer of `flip_` needs beyond those of its argument


class Key(tuple):
    """A 64-bit key of random bits, as a pair of 32-bit integers."""

    def __new__(cls, seed: int, stream: str) -> "Key":
        """Make the key of a named stream of a seed, e.g. `Key(0, "affd/signs")`."""
        digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
        return super().__new__(cls, divmod(int.from_bytes(digest, "little"), 1 << 32))


def words(key: Key, start: int, stop: int, device: _Device = None) -> Int[Tensor, " count"]:
    """Return independent uniform integers in [0, 2^32), one for each index in [start, stop)."""
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    return words_at(key, index, wide=stop > _MASK)


def words_at(key: Key, index: Int[Tensor, "*any"], wide: bool = True) -> Int[Tensor, "*any"]:
    """Return `words` at each index of a tensor of int64; `wide` says whether an index may reach 2^32."""
    k0, k1 = key
    h = index ^ k0
    if wide:
        h = (h & _MASK) ^ ((index >> 32) * _M2 & _MASK)
    h ^= h >> 16
    h.mul_(_M1).bitwise_and_(_MASK)
    h ^= k1
    if wide:
        h ^= (index >> 32) * _M1 & _MASK
    h ^= h >> 15
    h.mul_(_M2).bitwise_and_(_MASK)
    h ^= h >> 16
    return h


def flip_(x: Float[Tensor, "... count"], key: Key, start: int, spare: Tensor | None = None) -> Tensor:
    """Multiply x[..., i] by the sign at index start + i, in place; x is contiguous.

    A sign is applied by xor of the float's own sign bit: exact, and cheaper than a product. `spare` is
    scratch memory of x's type, at least `count + FLIP_SLACK` numbers.
    """
    ints, top = _ints(x)
    stop = start + x.shape[-1]
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    word = _sign_words(key, first * _W, last * _W, ints, x.device)
    shift = (top - torch.arange(32, device=x.device)).to(ints)[:, None]
    if spare is None:
        spare = x.new_empty((last - first) * _BLOCK)
    mask = spare.view(ints)[: (last - first) * _BLOCK].view(-1, 32, _W)
    torch.bitwise_left_shift(word.view(-1, 1, _W), shift, out=mask)
    mask &= torch.iinfo(ints).min
    x.view(ints).bitwise_xor_(mask.view(-1)[start - first * _BLOCK : stop - first * _BLOCK])
    return x


def flip_chunks_(x: Float[Tensor, "rows group chunk"], key: Key, number: Int[Tensor, "#rows group"]) -> Tensor:
    """Multiply x[r, g, i] by the sign at index chunk · number[r, g] + i, in place, for chunks at any place.

    Scratch memory: two tensors of x's shape. A chunk that is neither a power of two nor a multiple of a block takes
    ten times as long as other sizes, since its numbers share no words.
    """
    ints, top = _ints(x)
    size = x.shape[-1]
    shared = size % _W == 0 and (_BLOCK % size == 0 or size % _BLOCK == 0)
    run, lanes = (min(size, _BLOCK), _W) if shared else (1, 1)
    start = number[..., None] * size + torch.arange(0, size, run, device=x.device)
    index = (start // _BLOCK * _W + start % _W)[..., None] + torch.arange(lanes, device=x.device)
    bit = (start % _BLOCK // _W)[..., None] + torch.arange(run // lanes, device=x.device)
    word, shift = _narrowed(words_at(key, index), ints), (top - bit).to(ints)
    mask = (word[..., None, :] << shift[..., None]).bitwise_and_(torch.iinfo(ints).min)
    x.view(ints).bitwise_xor_(mask.view(*number.shape, size))
    return x


def _sign_words(key: Key, start: int, stop: int, ints: torch.dtype, device: torch.device) -> Int[Tensor, " count"]:
    """Return `words` in a type of integers, from cached pages, which small vectors share; large ones draw their own."""
    pages = range(start // _PAGE, -(-stop // _PAGE))
    if len(pages) > 4:
        return _narrowed(words(key, start, stop, device), ints)
    parts = [_page(key, n, ints, device)[max(start - n * _PAGE, 0) : stop - n * _PAGE] for n in pages]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _page(key: Key, number: int, ints: torch.dtype, device: torch.device) -> Int[Tensor, " count"]:
    with torch.inference_mode(False):
        return _narrowed(words(key, number * _PAGE, (number + 1) * _PAGE, device), ints)


def _ints(x: Tensor) -> tuple[torch.dtype, int]:
    """Return the integer type as wide as x, and the index of its sign bit."""
    ints = {4: torch.int32, 8: torch.int64}[x.element_size()]
    return ints, torch.iinfo(ints).bits - 1


def _narrowed(word: Tensor, ints: torch.dtype) -> Tensor:
    """Return words in an integer type with the same low 32 bits, as signed numbers if it has no more bits."""
    return word.view(ints)[..., _LOW::2].contiguous() if ints == torch.int32 else word


def signs(key: Key, start: int, stop: int, dtype: torch.dtype = torch.float32, device: _Device = None) -> Tensor:
    """Return Rademacher variables, -1 or +1 with equal probability, one for each index in [start, stop)."""
    return flip_(torch.ones(stop - start, dtype=dtype, device=device), key, start)


def integers(key: Key, start: int, stop: int, below: int, device: _Device = None) -> Int[Tensor, " count"]:
    """Return uniform integers in [0, below), with relative errors of probabilities up to below / 2^32."""
    return words(key, start, stop, device) * below >> 32


def integers_at(key: Key, index: Int[Tensor, "*any"], below: int) -> Int[Tensor, "*any"]:
    """Return `integers` at each index of a tensor."""
    return words_at(key, index) * below >> 32


def normals(key: Key, start: int, stop: int, dtype: torch.dtype = torch.float32, device: _Device = None) -> Tensor:
    """Return standard normal variables on a grid of 2^16 quantiles, two to a word.

    The table has mean 0 and variance 1 exactly; its largest value is 4.3. It replaces `log` and `cos`, whose
    last bits differ between devices.
    """
    word = words(key, start // 2, -(-stop // 2), device)
    halves = torch.stack((word & 0xFFFF, word >> 16), dim=-1).view(-1)
    return _quantiles(dtype, device)[halves[start % 2 :][: stop - start]]


def normals_at(key: Key, index: Int[Tensor, "*any"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*any"]:
    """Return `normals` at each index of a tensor."""
    return _quantiles(dtype, index.device)[words_at(key, index // 2) >> index % 2 * 16 & 0xFFFF]


@functools.lru_cache(maxsize=4)  # 2^16 numbers each, whatever n is
def _quantiles(dtype: torch.dtype, device: _Device) -> Tensor:
    lower = torch.special.ndtri((torch.arange(1 << 15, dtype=torch.float64, device="cpu") + 0.5) / (1 << 16))
    table = torch.cat((lower, -lower))
    table /= table.square().mean().sqrt()
    return table.float().to(device, dtype)
