"""A context in which matrix products are computed in full float32, whatever the program around it has set."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_open = 0  # number of open contexts, over all threads
_restore: Callable[[], None]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the TF32 and bfloat16 modes of float32 products, and restore them after.

    Lightning itself advises `set_float32_matmul_precision("medium")`, and a training step may run
    under autocast: a sketch computed there and one computed at query time would silently differ.

    These modes belong to the whole process: the first of several threads switches them off, the last one restores
    them.

    Args:
        device: The device whose autocast is switched off.
    """
    global _open, _restore
    with torch.autocast(device.type, enabled=False):
        with _lock:
            if not _open:
                _restore = _switch_off()
            _open += 1
        try:
            yield
        finally:
            with _lock:
                _open -= 1
                if not _open:
                    _restore()


def _switch_off() -> Callable[[], None]:
    """Switch off the faster modes of float32 products; return a function that restores them."""
    matmuls: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    flags = [flag for flag in matmuls if hasattr(flag, "fp32_precision")]
    before = [flag.fp32_precision for flag in flags]
    legacy = None if flags else torch.get_float32_matmul_precision()  # torch < 2.9
    for flag in flags:
        flag.fp32_precision = "ieee"
    if legacy:
        torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = "none"  # inherit the setting of the backend
            if flag.fp32_precision != value:
                flag.fp32_precision = value
        if legacy:
            torch.set_float32_matmul_precision(legacy)

    return restore
