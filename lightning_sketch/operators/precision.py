"""Matrix products in full float32, whatever the surrounding program has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the TF32 / bfloat16 shortcuts of float32 products; put them back after.

    Lightning itself advises `set_float32_matmul_precision("medium")`, and a training step may run
    under autocast: a sketch taken there and one taken at query time would silently differ.
    """
    with torch.autocast(device.type, enabled=False):
        flags = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
        flags = [flag for flag in flags if hasattr(flag, "fp32_precision")]
        before = [flag.fp32_precision for flag in flags]
        legacy = None if flags else torch.get_float32_matmul_precision()  # torch < 2.9
        try:
            for flag in flags:
                flag.fp32_precision = "ieee"
            if legacy:
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            for flag, value in zip(flags, before, strict=True):
                flag.fp32_precision = "none"  # what it inherits
                if flag.fp32_precision != value:
                    flag.fp32_precision = value
            if legacy:
                torch.set_float32_matmul_precision(legacy)
