"""Sizes of the kernels: what a program holds at once, and which thread holds which number.

Those of `plan_of` and `tiles_of` were the fastest that were tried on an NVIDIA H200 (driver 580.159.04, PyTorch 2.11.0,
Triton 3.6.0, 2026-11-27), with vectors of 2^24 and 2^27 numbers in float32 and bfloat16 and dims 2^8, 2^12 and 2^15;
`benchmarks/results/gpu_2026-11-27_kernels.jsonl` has the times of all.
"""

import functools
from typing import Any, NamedTuple

from lightning_sketch.operators.kernels.triton.language import INTERPRETED, gl

_BLOCK_BITS, _WORD_BITS = 13, 8  # a block of random signs is 32 x 2^8 numbers


class Plan(NamedTuple):
    """The sizes of a kernel of BlockSRHT.

    Attributes:
        bits: The base-2 logarithm of the size of a tile, at least 13.
        warps: The number of warps of a program.
        stages: The bits of the index that a thread holds at each of three stages; the first one loads.
        programs: The number of programs for each multiprocessor.
        prefetch: Whether the next tile is loaded while one is transformed, where a chunk is no larger than a tile.
    """

    bits: int
    warps: int
    stages: tuple[tuple[int, ...], ...]
    programs: int
    prefetch: bool = False

    def parts(self, chunk: int) -> int:
        """Return the number of tiles that a chunk of this length is made of."""
        return max(1, chunk >> self.bits)


class Tiles(NamedTuple):
    """The sizes of a kernel of CountSketch.

    Attributes:
        width: The places of a chunk that a program holds.
        chunks: The number of chunks that it handles at once.
        warps: The number of warps of a program.
        programs: The number of programs for each multiprocessor.
    """

    width: int
    chunks: int
    warps: int
    programs: int


@functools.cache
def plan_of(chunk: int, bytes_each: int, backward: bool) -> Plan:
    """Return the sizes for chunks of a length, of numbers of 2 or 4 bytes; `backward` means the adjoint."""
    bits = 14 if chunk > 1 << 13 and not backward else 13
    stages = stages_of(bits, 16 // bytes_each)
    prefetch = 1 << 10 < chunk <= 1 << 13 and bytes_each == 4 and not backward
    return Plan(bits, 1 << bits - 10, stages[::-1] if backward else stages, 2 if bits == 13 else 1, prefetch)


def stages_of(bits: int, vector: int) -> tuple[tuple[int, ...], ...]:
    """Return the bits that a thread holds, five at each stage, with accesses of `vector` numbers at the first one.

    Each bit is held at one stage or more, and three of the five that count the bits of a word of signs are held
    together where signs are applied: at the first stage and at the last one.
    """
    low = vector.bit_length() - 1
    first = (*range(low), *range(13 - (5 - low), 13))
    second = tuple(range(low, low + 5))
    rest = [bit for bit in range(bits) if bit not in first and bit not in second]
    return first, second, tuple(sorted((*rest, *(bit for bit in (12, 11, 10) if bit not in rest))[:5]))


@functools.cache
def tiles_of(dim: int, backward: bool) -> Tiles:
    """Return the sizes of a kernel of CountSketch: of few chunks at once, whose shifts each thread computes."""
    width = 1 << (dim - 1).bit_length()
    if width > 4096:
        return Tiles(4096, 1, 8, 4)
    warps = max(1, width // 512)
    programs = max(8, 32 // warps)
    if backward:
        return Tiles(width, max(1, 512 // width), warps, programs)
    return Tiles(width, max(1, 1024 // width), warps, min(programs, 16))


@functools.cache
def constants(plan: Plan, chunk: int) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel that follow from a plan."""
    todo = set(range(min(chunk.bit_length() - 1, plan.bits)))
    arguments: dict[str, Any] = {"BLOCKS": 1 << plan.bits - _BLOCK_BITS, "PARTS": plan.parts(chunk)}
    for name, held in zip("ABC", plan.stages, strict=True):
        now = todo & set(held)
        todo -= now
        arguments[name] = None if INTERPRETED else _layout(plan, held)
        arguments[f"BITS_{name}"] = sum(1 << bit for bit in now)
    assert not todo, (plan, chunk)
    return arguments


def _layout(plan: Plan, held: tuple[int, ...]) -> Any:
    """Return the layout of a tile: registers for the bits held, lanes for the five lowest others, then warps."""
    other = [bit for bit in range(plan.bits) if bit not in held]
    assert len(other) == 5 + plan.warps.bit_length() - 1, plan
    registers, lanes, warps = ([_step(bit) for bit in bits] for bits in (held, other[:5], other[5:]))
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [1 << plan.bits - _BLOCK_BITS, 32, 1 << _WORD_BITS])


def _step(bit: int) -> list[int]:
    """Return what a bit of the index adds along the axes (block, bit of a word, word)."""
    if bit < _WORD_BITS:
        return [0, 0, 1 << bit]
    return [0, 1 << bit - _WORD_BITS, 0] if bit < _BLOCK_BITS else [1 << bit - _BLOCK_BITS, 0, 0]
