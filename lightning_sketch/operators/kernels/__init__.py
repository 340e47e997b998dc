"""Ways to compute a sketch, chosen by device and by what is installed; equal up to rounding.

"torch"     the sketch's own `forward` and `adjoint`, in operations of PyTorch: every kind, device and type
"numba"     one pass over the vector on a CPU, where numba is installed (pip install lightning-sketch[fast]):
            `BlockSRHT` up to dim 2^21 and `CountSketch`, for float32, bfloat16 and float16
"triton"    one pass over the vector on a CUDA device: `BlockSRHT` up to dim 2^15 and `CountSketch`, for the same types

Under vmap and other function transforms, and while PyTorch's operations are recorded, "torch" computes as well, since a
kernel is not seen by them. The environment variable LIGHTNING_SKETCH_KERNEL forces one of the three.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sketch._private import required

if TYPE_CHECKING:
    from lightning_sketch.operators.sketch import Sketch
    from lightning_sketch.operators.streaming import StreamingSketch

__all__ = ["adjoint", "forward", "forward_pieces", "gather", "kernel_in_use"]

_FORCED = "LIGHTNING_SKETCH_KERNEL"
_KERNELS = "torch", "numba", "triton"
_TYPES = torch.float32, torch.bfloat16, torch.float16
_LARGEST = {  # sizes of sketches that the kernels are made for
    "numba": {"block_srht": 1 << 21, "count_sketch": 1 << 30},
    "triton": {"block_srht": 1 << 15, "count_sketch": 1 << 22},
}
_LOWEST_NUMBA, _LOWEST_TRITON, _LOWEST_CAPABILITY = (0, 60), (3, 6), (8, 0)


def kernel_in_use(sketch: "Sketch", device: torch.device | str) -> str:
    """Return the name of the kernel that computes a sketch on a device.

    Args:
        sketch: The sketch.
        device: The device of the vectors. Vectors in float64 are computed by "torch" on every device.

    Returns:
        "numba" on a CPU where numba is installed, for `CountSketch` and for `BlockSRHT` with dim up to 2^21; "triton"
        on a CUDA device with Triton 3.6 or newer and compute capability 8.0 or higher, for `CountSketch` and for
        `BlockSRHT` with dim up to 2^15; otherwise "torch".

    Raises:
        ValueError: If the environment variable LIGHTNING_SKETCH_KERNEL names another one.

    >>> from lightning_sketch.operators import AFFD
    >>> kernel_in_use(AFFD(n=1000, dim=64), "cpu")
    'torch'
    """
    forced = os.environ.get(_FORCED, "")
    if forced and forced not in _KERNELS:
        raise ValueError(f"{_FORCED} takes {', '.join(_KERNELS)}, got {forced!r}; unset it to let the device decide.")
    device = torch.device(device)
    if forced == "torch" or not type(sketch).__module__.startswith("lightning_sketch."):
        return "torch"
    for name in [forced] if forced else _KERNELS[1:]:
        if sketch.dim <= _LARGEST[name].get(sketch.kind, 0) and _can_run(name, device, bool(forced)):
            return name
    return "torch"


def forward(sketch: "Sketch", x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
    """Return S[:, start : start + size] x for each row, by the kernel in use."""
    return _by_kernel("forward", sketch, [x], x, start, otherwise=sketch.forward)


def forward_pieces(sketch: "Sketch", pieces: Sequence[tuple[int, Tensor]]) -> Float[Tensor, " dim"]:
    """Return S x by the kernel in use, for a vector x given by pieces and where they begin; the rest of it is zero.

    Args:
        sketch: The sketch S.
        pieces: The pieces in ascending order, without overlaps, on one device and without a graph.
    """
    tensors = [tensor for _, tensor in pieces]
    return _by_kernel("forward_pieces", sketch, tensors, pieces, otherwise=sketch.forward_pieces)[0]


def gather(
    sketch: "StreamingSketch",
    chunks: Float[Tensor, "rows group chunk"],
    which: Int[Tensor, "#rows group"],
    spare: list[Tensor],
) -> Float[Tensor, "rows dim"]:
    """Return, for each row, the sum of the sketches of some chunks of a vector, by the kernel in use.

    Args:
        sketch: The sketch.
        chunks: The chunks, contiguous; they and `spare` may be overwritten.
        which: The number of each chunk, which occurs once in a row.
        spare: Two buffers of the size of `chunks` and `FLIP_SLACK` more.
    """

    def by_torch(chunks: Tensor, which: Tensor) -> Tensor:
        total = chunks.new_zeros(len(chunks), sketch.dim)
        sketch.gather(chunks, which, spare, total)
        return total.mul_(sketch.scale)

    return _by_kernel("gather", sketch, [chunks], chunks, which, otherwise=by_torch)


def adjoint(sketch: "Sketch", y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
    """Return S[:, start : stop]ᵀ y for each row, by the kernel in use."""
    return _by_kernel("adjoint", sketch, [y], y, start, stop, otherwise=sketch.adjoint)


def _by_kernel(
    name: str, sketch: "Sketch", tensors: Sequence[Tensor], *arguments: Any, otherwise: Callable[..., Tensor]
) -> Tensor:
    """Return the result of a function of the kernel in use, or else of another one with the same arguments."""
    if not _is_recorded() and all(map(_is_readable, tensors)):
        kernel = kernel_in_use(sketch, tensors[0].device)
        if kernel != "torch":
            try:
                launches = importlib.import_module(f"lightning_sketch.operators.kernels.{kernel}.launches")
                if hasattr(launches, name):
                    return cast(Tensor, getattr(launches, name)(sketch, *arguments))
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError | MemoryError) or os.environ.get(_FORCED) == kernel:
                    raise
                found = otherwise(*arguments)  # which may raise the same: then the kernel is not to blame
                _give_up(kernel, error)
                return found
    return otherwise(*arguments)


def _is_recorded() -> bool:
    """Return whether PyTorch's operations are recorded or mapped, as by `torch.func.linearize`: it misses a kernel."""
    return bool(
        required(torch._C, "_len_torch_dispatch_stack")() or required(torch._C, "_are_functorch_transforms_active")()
    )


def _is_readable(x: Tensor) -> bool:
    """Return whether a tensor's numbers lie in memory as they are: neither negated nor zero by a mark alone."""
    return (
        x.dtype in _TYPES
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not x.is_neg()
        and x.data_ptr() != 0
    )


_broken: set[str] = set()  # kernels that failed in this process


def _give_up(kernel: str, error: Exception) -> None:
    """Use PyTorch's operations from now on."""
    _broken.add(kernel)
    warnings.warn(
        f"the kernels in {kernel} failed ({type(error).__name__}: {error}); sketches are computed by PyTorch's "
        f"operations from now on, which takes longer. Set {_FORCED}={kernel} to see where, or =torch to silence this.",
        stacklevel=4,
    )


def _can_run(kernel: str, device: torch.device, forced: bool) -> bool:
    if kernel in _broken or not _is_installed(kernel):
        return False
    if kernel == "numba":
        return device.type == "cpu"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton's interpreter, for tests
        return forced and device.type == "cpu" and interpreted
    return _is_capable(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _is_capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= _LOWEST_CAPABILITY


@functools.cache
def _is_installed(kernel: str) -> bool:
    """Return whether a version of numba or Triton is installed that the kernels are written for."""
    try:
        package = importlib.import_module(kernel)
        if kernel == "triton":
            importlib.import_module("triton.experimental.gluon.language")
    except Exception:  # not only ImportError: numba, for one, cannot be imported beside some versions of `coverage`
        return False
    lowest = _LOWEST_NUMBA if kernel == "numba" else _LOWEST_TRITON
    return tuple(int(part) for part in package.__version__.split(".")[:2]) >= lowest
