"""Matrix products in full float32, whatever the surrounding program has switched on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0  # contexts that are open, in all threads together
_put_back: Callable[[], None]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the TF32 / bfloat16 shortcuts of float32 products; put them back after.

    Lightning itself advises `set_float32_matmul_precision("medium")`, and a training step may run
    under autocast: a sketch taken there and one taken at query time would silently differ.

    The shortcuts are the whole process's: the first of several threads switches them off, the last one back on.
    """
    global _inside, _put_back
    with torch.autocast(device.type, enabled=False):
        with _lock:
            if not _inside:
                _put_back = _switch_off()
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if not _inside:
                    _put_back()


def _switch_off() -> Callable[[], None]:
    """Take the shortcuts away; what is returned puts them back."""
    flags = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    flags = [flag for flag in flags if hasattr(flag, "fp32_precision")]
    before = [flag.fp32_precision for flag in flags]
    legacy = None if flags else torch.get_float32_matmul_precision()  # torch < 2.9
    for flag in flags:
        flag.fp32_precision = "ieee"
    if legacy:
        torch.set_float32_matmul_precision("highest")

    def put_back() -> None:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = "none"  # what it inherits
            if flag.fp32_precision != value:
                flag.fp32_precision = value
        if legacy:
            torch.set_float32_matmul_precision(legacy)

    return put_back
