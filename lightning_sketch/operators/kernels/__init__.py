"""Ways to compute a sketch, chosen by device and by what is installed; equal up to rounding.

"torch"     the sketch's own `forward` and `adjoint`, in operations of PyTorch: every kind, device and type
"triton"    one pass over the vector on a CUDA device: `BlockSRHT` up to dim 2^15 and `CountSketch`, for float32,
            bfloat16 and float16

The environment variable LIGHTNING_SKETCH_KERNEL forces one of them.
"""

import functools
import os
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from lightning_sketch.operators.sketch import Sketch

__all__ = ["adjoint", "forward", "kernel_in_use"]

_FORCED = "LIGHTNING_SKETCH_KERNEL"
_TYPES = torch.float32, torch.bfloat16, torch.float16
_LARGEST = {"block_srht": 1 << 15, "count_sketch": 1 << 22}  # sizes of sketches that the kernels are made for
_LOWEST_TRITON, _LOWEST_CAPABILITY = (3, 6), (8, 0)


def kernel_in_use(sketch: "Sketch", device: torch.device | str) -> str:
    """Return the name of the kernel that computes a sketch on a device.

    Args:
        sketch: The sketch.
        device: The device of the vectors. Vectors in float64 are computed by "torch" on every device.

    Returns:
        "triton" on a CUDA device with Triton 3.6 or newer and compute capability 8.0 or higher, for `CountSketch` and
        for `BlockSRHT` with dim up to 2^15; otherwise "torch".

    Raises:
        ValueError: If the environment variable LIGHTNING_SKETCH_KERNEL names another one.

    >>> from lightning_sketch.operators import AFFD
    >>> kernel_in_use(AFFD(n=1000, dim=64), "cpu")
    'torch'
    """
    forced = os.environ.get(_FORCED, "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"{_FORCED} takes torch or triton, got {forced!r}; unset it to let the device decide.")
    device = torch.device(device)
    kind = type(sketch)
    made_for = "kind" in vars(kind) and kind.__module__.startswith("lightning_sketch.")
    if forced == "torch" or not made_for or sketch.dim > _LARGEST.get(sketch.kind, 0):
        return "torch"
    return "triton" if _has_triton(device, forced == "triton") else "torch"


def forward(sketch: "Sketch", x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
    """Return S[:, start : start + size] x for each row, by the kernel in use."""
    if x.dtype in _TYPES and x.numel() and kernel_in_use(sketch, x.device) == "triton":
        try:
            from lightning_sketch.operators.kernels.triton import launches

            return launches.forward(sketch, x, start)
        except Exception as error:
            _give_up(error)
    return sketch.forward(x, start)


def adjoint(sketch: "Sketch", y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
    """Return S[:, start : stop]ᵀ y for each row, by the kernel in use."""
    if y.dtype in _TYPES and y.numel() and kernel_in_use(sketch, y.device) == "triton":
        try:
            from lightning_sketch.operators.kernels.triton import launches

            return launches.adjoint(sketch, y, start, stop)
        except Exception as error:
            _give_up(error)
    return sketch.adjoint(y, start, stop)


_broken = False


def _give_up(error: Exception) -> None:
    """Use PyTorch's operations from now on, unless the error is one that they would raise as well."""
    global _broken
    if isinstance(error, torch.OutOfMemoryError) or os.environ.get(_FORCED) == "triton":
        raise error
    _broken = True
    warnings.warn(
        f"the kernels in Triton failed ({type(error).__name__}: {error}); sketches are computed by PyTorch's "
        f"operations from now on, which takes longer. Set {_FORCED}=triton to see where, or =torch to be spared this.",
        stacklevel=3,
    )


def _has_triton(device: torch.device, forced: bool) -> bool:
    if _broken or not _version():
        return False
    if device.type != "cuda":
        return forced and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter, for tests
    return _is_capable(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _is_capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= _LOWEST_CAPABILITY


@functools.cache
def _version() -> bool:
    """Return whether a Triton is installed that the kernels are written for."""
    try:
        import triton
        from triton.experimental.gluon import language  # noqa: F401
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _LOWEST_TRITON
