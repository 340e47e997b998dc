"""Calls of the kernels in numba: BlockSRHT and CountSketch on a CPU, by as many threads as PyTorch uses.

The units of a vector are shared out in parts, each with a sum of its own. Which units are in a part does not depend on
the number of threads, and so neither does the result. A thread takes the next part when it is done with one, so that
none waits for another that a busy neighbor holds up.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.operators.kernels.numba import block_srht, count_sketch

if TYPE_CHECKING:
    from lightning_sketch.operators.sketch import Sketch

# Numbers in a part: enough to hide what Python does for it, and few enough that none is waited for long.
_PART = 1 << 18
_MOST_PARTS = 64
_SHARED = 1 << 22  # numbers that are worth a second thread, which may find PyTorch's own still spinning on its core
_MOST_NUMBERS = 1 << 21  # in the sums of all parts of a row, and of rows that are handled at once

_TYPES = torch.float32, torch.bfloat16  # others are converted first


def forward(sketch: "Sketch", x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
    """Return S[:, start : start + size] x for each row, in float32."""
    x = _readable(x)
    pieces = np.empty((len(x), 1, 4), np.int64)
    pieces[:, 0, 0] = x.data_ptr() + np.arange(len(x)) * (x.stride(0) * x.element_size())
    pieces[:, 0, 1:] = start, start + x.shape[1], x.element_size()
    return _sums(sketch, pieces, _parts(sketch, start, start + x.shape[1]), x)


def forward_pieces(sketch: "Sketch", pieces: Sequence[tuple[int, Tensor]]) -> Float[Tensor, "1 dim"]:
    """Return S x, x given by pieces of it and where they begin, in ascending order, in float32."""
    kept = [(start, _readable(x)) for start, x in pieces]
    table = np.array([(x.data_ptr(), start, start + len(x), x.element_size()) for start, x in kept], np.int64)
    return _sums(sketch, table[None], _parts(sketch, int(table[0, 1]), int(table[-1, 2])), kept)


def gather(
    sketch: "Sketch", chunks: Float[Tensor, "rows group chunk"], which: Int[Tensor, "#rows group"]
) -> Float[Tensor, "rows dim"]:
    """Return, for each row, the sum of the sketches of chunks anywhere, given by their numbers, in float32."""
    chunks = _readable(chunks.contiguous())
    rows, group, size = chunks.shape
    number = np.broadcast_to(which.numpy(), (rows, group))
    order = number.argsort(axis=1)
    first = np.take_along_axis(number, order, axis=1) * size
    places = np.arange(rows)[:, None] * group + order
    table = np.empty((rows, group, 4), np.int64)
    table[..., 0] = chunks.data_ptr() + places * (size * chunks.element_size())
    table[..., 1], table[..., 2], table[..., 3] = first, first + size, chunks.element_size()
    return _sums(sketch, table, np.array([(0, -(-table[..., 2].max() // _unit(sketch)))]), chunks)


def adjoint(sketch: "Sketch", y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
    """Return S[:, start : stop]ᵀ y for each row, in float32."""
    rows, unit, size = len(y), _unit(sketch), stop - start
    out, parts = _new(rows, size), _parts(sketch, start, stop)
    table = np.empty((rows, 1, 4), np.int64)
    table[:, 0, 0] = out.data_ptr() + np.arange(rows) * (4 * size)
    table[:, 0, 1:] = start, stop, 4
    most = max(1, _MOST_NUMBERS // unit)
    for first in range(0, rows, most):
        some = slice(first, first + most)
        vectors = y[some].detach().float()
        if sketch.kind == "block_srht":
            vectors = vectors * sketch.width**-0.5
            vectors = torch.cat((vectors, vectors[:, : sketch.width - sketch.dim]), dim=1)
            vectors = vectors.repeat(1, unit // sketch.width)
        given = vectors.contiguous().numpy()[:, None]
        run = functools.partial(_compiled(sketch, True), table[some], parts, given)
        _share(run, _keys(sketch, True), len(given) * len(parts), size // len(parts), out)
    return out


def _sums(sketch: "Sketch", pieces: np.ndarray, parts: np.ndarray, memory: Any) -> Float[Tensor, "rows dim"]:
    """Return the sketches of vectors that are given by pieces, (rows, pieces, 4), of some memory."""
    numbers = int((pieces[0, :, 2] - pieces[0, :, 1]).sum()) // len(parts)
    most = max(1, _MOST_NUMBERS // (len(parts) * _unit(sketch)))
    found = []
    for first in range(0, len(pieces), most):
        some = pieces[first : first + most]
        sums = _new(len(some), len(parts), _unit(sketch))
        run = functools.partial(_compiled(sketch, False), some, parts, sums.numpy())
        _share(run, _keys(sketch, False), len(some) * len(parts), numbers, memory)
        found.append(_folded(sketch, sums.sum(1) if len(parts) > 1 else sums[:, 0]))
    return torch.cat(found) if len(found) > 1 else found[0]


def _folded(sketch: "Sketch", sums: Float[Tensor, "rows unit"]) -> Float[Tensor, "rows dim"]:
    """Return the sketches that sums over units make."""
    if sketch.kind == "count_sketch":
        return sums
    width, dim = sketch.width, sketch.dim
    if sums.shape[1] > width:
        sums = sums.view(len(sums), -1, width).sum(1)
    sums *= width**-0.5
    if dim < width:
        sums, rest = sums[:, :dim].contiguous(), sums[:, dim:]
        sums[:, : width - dim] += rest
    return sums


def _parts(sketch: "Sketch", start: int, stop: int) -> np.ndarray:
    """Return the parts that a range of numbers is shared out in, each with its first unit and the end of its units."""
    unit = _unit(sketch)
    first, last = start // unit, -(-stop // unit)
    most = max(1, min(_MOST_PARTS, _MOST_NUMBERS // unit))
    size = max(-(-_PART // unit), -(-(last - first) // most))
    return np.array([(number, min(number + size, last)) for number in range(first, last, size)])


def _unit(sketch: "Sketch") -> int:
    """Return how many numbers a kernel maps at once."""
    return sketch.dim if sketch.kind == "count_sketch" else max(block_srht.ROW, sketch.width)


def _compiled(sketch: "Sketch", adjoint: bool) -> Callable[..., None]:
    if sketch.kind == "count_sketch":
        return count_sketch.compiled(adjoint)
    return block_srht.compiled(sketch.width, adjoint)


@functools.lru_cache(maxsize=64)
def _keys(sketch: "Sketch", adjoint: bool) -> tuple[np.uint32, ...]:
    streams = ("signs", "shifts") if sketch.kind == "count_sketch" else ("out", "in") if adjoint else ("in", "out")
    return tuple(np.uint32(number) for stream in streams for number in sketch.key(stream))


def _new(*shape: int) -> Tensor:
    """Return new memory, whatever the program has set as a default."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _readable(x: Tensor) -> Tensor:
    """Return a tensor of a type that the kernels read, whose last axis is contiguous."""
    x = x if x.dtype in _TYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _share(work: Callable[..., None], keys: Sequence[Any], count: int, numbers: int, memory: Any) -> None:
    """Call work(begin, end, *keys) for ranges of [0, count), in this thread; if it is much, by as many as PyTorch uses.

    Args:
        work: What to call.
        keys: The last arguments of the call.
        count: The end of all ranges.
        numbers: How many numbers there are in one of them.
        memory: The tensors whose addresses `work` uses. All threads hold them, since when Ctrl-C is pressed this
            function may end before they do.
    """
    step = max(1, _PART // max(1, numbers))
    starts = iter(range(0, count, step))

    def go_on(memory: Any = memory) -> None:
        for start in starts:
            work(start, min(start + step, count), *keys)

    others: list[Future[None]] = []
    try:
        for _ in range(min(-(-count // step), torch.get_num_threads()) - 1 if count * numbers >= _SHARED else 0):
            others.append(_pool().submit(go_on))
    except RuntimeError:  # at the end of the program: this thread works alone
        pass
    try:
        go_on()
    finally:
        for _ in starts:  # after an error no further ones begin
            pass
        begun = [other for other in others if not other.cancel()]  # the rest would have nothing left to do
        wait(begun)
    for other in begun:
        other.result()


_lock = threading.Lock()
_threads: ThreadPoolExecutor | None = None


def _pool() -> ThreadPoolExecutor:
    global _threads
    with _lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lightning_sketch")
        return _threads


def _forget_threads() -> None:
    """Start anew in a process that was forked: it has none of the threads."""
    global _threads, _lock
    _threads, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
