"""Operations on vectors of numbers in a CPU's registers, for functions that numba compiles.

Numba compiles loops, and LLVM finds most vectors in them by itself, but not in a Hadamard transform. So its two steps
are written in LLVM's own language here: H between rows of numbers, and H inside a row. Memory is given as addresses.

Signs come as words, a bit of each (see `operators.random`): a sign is applied by xor of a number's own sign bit.
"""

import functools
import hashlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic
from numpy import uint32

ROW = 256  # numbers in a row, which are flipped by the same bit of as many words
BLOCK = 32 * ROW  # numbers that are flipped by the bits of as many words as a row has numbers
AHEAD = 32 << 10  # bytes between what is read and what is fetched for later
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # numbers in a register

_INT = ir.IntType(32)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
_BYTES = 4 * LANES
_TOP = -(1 << 31)
_M1, _M2 = uint32(0x7FEB352D), uint32(0x5BD1E995)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that others call, without wrappers such as those that check types."""
    return numba.njit(nogil=True)(inspect.unwrap(function))


def kept_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as `jit` does, and keep the result on disk, beside the module or in the user's folder.

    Numba compiles it again when its module changes. Here its name in the cache also tells the modules that it uses.
    """
    plain = inspect.unwrap(function)
    plain.__qualname__ += f".{_contents()}"
    try:
        kept = numba.njit(nogil=True, cache=True)(plain)
    except RuntimeError:  # no folder that can be written to
        return jit(function)

    def run(*arguments: Any) -> None:
        nonlocal kept
        try:
            kept(*arguments)
        except (OSError, EOFError, pickle.PickleError):  # a full disk, or a file that was cut off
            kept = jit(function)
            kept(*arguments)

    return run


@functools.cache
def _contents() -> str:
    """Return a name for the contents of the modules of this package, as far as they can be read."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


@intrinsic(prefer_literal=True)
def mix_rows(context: Any, rows: Any, size: Any, source: Any, target: Any, words: Any, bit: Any) -> Any:
    """Write H X to `target`, X the matrix of `rows` rows at `source`, row r flipped by bit `bit` + r of words.

    The `size` of a number at `source` is 4 bytes in float32, 2 in bfloat16.
    """
    count, bytes_each = rows.literal_value, size.literal_value
    apart = bytes_each * ROW

    def write(b: Any, _: Any, source: Any, target: Any, words: Any, bit: Any) -> None:
        for r in range(count):
            _fetch(b, source, apart * r + AHEAD)
        above = b.sub(_INT(32 - count), bit)  # brings the sign of the last row to the top
        words = b.shl(_load(b, words, 0, _INTS), _all(b, above))
        held = []
        for r in range(count):
            word = b.shl(words, _vector(count - 1 - r)) if r < count - 1 else words
            x = _load(b, source, apart * r) if bytes_each == 4 else _load_half(b, source, apart * r)
            held.append(_flip(b, x, word))
        for r, x in enumerate(_transform(b, held)):
            _store(b, x, target, 4 * ROW * r)

    return _returns_nothing(write, rows, size, source, target, words, bit)


@intrinsic(prefer_literal=True)
def mix_blocks(context: Any, blocks: Any, stride: Any, at: Any) -> Any:
    """Replace X by H X, X the matrix of `blocks` rows of numbers at `at`, `stride` bytes apart."""
    count, apart = blocks.literal_value, stride.literal_value

    def write(b: Any, _: Any, at: Any) -> None:
        held = [_load(b, at, apart * r) for r in range(count)]
        for r, x in enumerate(_transform(b, held)):
            _store(b, x, at, apart * r)

    return _returns_nothing(write, blocks, stride, at)


@intrinsic(prefer_literal=True)
def mix_row(context: Any, levels: Any, add: Any, source: Any, target: Any, words: Any, bit: Any) -> Any:
    """Write a row, each 2^levels of its numbers transformed and all flipped by one bit of `words`, or add it."""
    inside, added = levels.literal_value, add.literal_value
    between = 1 << max(0, inside - (LANES.bit_length() - 1))

    def write(b: Any, _: Any, source: Any, target: Any, words: Any, bit: Any) -> None:
        held = [_load(b, source, _BYTES * r) for r in range(ROW // LANES)]
        distance = 1
        while distance < min(1 << inside, LANES):
            held = [_transform_lanes(b, x, distance) for x in held]
            distance *= 2
        above = _all(b, b.sub(_INT(31), bit))
        for first in range(0, len(held), between):
            for r, x in enumerate(_transform(b, held[first : first + between]), first):
                x = _flip(b, x, b.shl(_load(b, words, _BYTES * r, _INTS), above))
                _store(b, b.fadd(_load(b, target, _BYTES * r), x) if added else x, target, _BYTES * r)

    return _returns_nothing(write, levels, add, source, target, words, bit)


@intrinsic
def floats(context: Any, address: Any) -> Any:
    """Return a pointer to numbers in float32."""
    return types.CPointer(types.float32)(address), lambda c, b, s, a: b.inttoptr(a[0], ir.FloatType().as_pointer())


@intrinsic
def halves(context: Any, address: Any) -> Any:
    """Return a pointer to integers of 16 bits."""
    return types.CPointer(types.uint16)(address), lambda c, b, s, a: b.inttoptr(a[0], ir.IntType(16).as_pointer())


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """Return the number in float32 that has these 32 bits."""
    return types.float32(bits), lambda c, b, s, a: b.bitcast(
        b.trunc(a[0], _INT) if s.args[0].bitwidth > 32 else a[0], ir.FloatType()
    )


@intrinsic
def as_bits(context: Any, number: Any) -> Any:
    """Return the 32 bits of a number in float32."""
    return types.uint32(number), lambda c, b, s, a: b.bitcast(a[0], _INT)


@jit
def word(index: int, k0: Any, k1: Any) -> Any:
    """Return `operators.random.words` at an index, for a key (k0, k1)."""
    high = uint32(index >> 32)
    h = uint32(index) ^ uint32(k0 ^ uint32(high * _M2))
    h = uint32((h ^ (h >> uint32(16))) * _M1) ^ uint32(k1 ^ uint32(high * _M1))
    h = uint32((h ^ (h >> uint32(15))) * _M2)
    return uint32(h ^ (h >> uint32(16)))


@jit
def write_words(words: Any, block: int, k0: Any, k1: Any) -> None:
    """Write the words whose bits flip a block of numbers."""
    for i in range(ROW):
        words[i] = word(block * ROW + i, k0, k1)


def _returns_nothing(write: Callable[..., None], *arguments: Any) -> Any:
    """Return the signature and the code of an intrinsic whose first argument is a literal."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        write(builder, *values[1:])
        return context.get_dummy_value()

    return types.void(*arguments), code


def _vector(number: int) -> Any:
    return ir.Constant(_INTS, [number] * LANES)


def _all(b: Any, number: Any) -> Any:
    """Return a vector that has a number in each place."""
    one = b.insert_element(ir.Constant(_INTS, ir.Undefined), number, _INT(0))
    return b.shuffle_vector(one, one, _vector(0))


def _pointer(b: Any, address: Any, offset: int, kind: ir.Type) -> Any:
    return b.inttoptr(b.add(address, address.type(offset)), kind.as_pointer())


def _load(b: Any, address: Any, offset: int, kind: ir.Type = _FLOATS) -> Any:
    return b.load(_pointer(b, address, offset, kind), align=4)


def _load_half(b: Any, address: Any, offset: int) -> Any:
    """Load numbers in bfloat16, which are the upper halves of numbers in float32."""
    half = b.load(_pointer(b, address, offset, ir.VectorType(ir.IntType(16), LANES)), align=2)
    return b.bitcast(b.shl(b.zext(half, _INTS), _vector(16)), _FLOATS)


def _store(b: Any, value: Any, address: Any, offset: int) -> None:
    b.store(value, _pointer(b, address, offset, value.type), align=4)


def _fetch(b: Any, address: Any, offset: int) -> None:
    """Ask for memory that is read soon: of many short streams a CPU does not guess what comes next."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    name = "llvm.prefetch.p0"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [_pointer(b, address, offset, ir.IntType(8)), _INT(0), _INT(2), _INT(1)])


def _flip(b: Any, x: Any, words: Any) -> Any:
    """Multiply numbers by the signs in the top bits of words."""
    return b.bitcast(b.xor(b.bitcast(x, _INTS), b.and_(words, _vector(_TOP))), _FLOATS)


def _transform(b: Any, rows: list[Any]) -> list[Any]:
    """Return the Hadamard transform of vectors, as vectors."""
    distance = 1
    while distance < len(rows):
        rows = [
            b.fsub(rows[r - distance], x) if r & distance else b.fadd(x, rows[r + distance])
            for r, x in enumerate(rows)
        ]  # fmt: skip
        distance *= 2
    return rows


def _transform_lanes(b: Any, x: Any, distance: int) -> Any:
    """Return a vector transformed along one bit of the places of its numbers."""
    other = b.shuffle_vector(x, x, ir.Constant(_INTS, [lane ^ distance for lane in range(LANES)]))
    return b.fadd(other, _flip(b, x, ir.Constant(_INTS, [_TOP if lane & distance else 0 for lane in range(LANES)])))
