"""Whether an error says that memory ran out."""

import torch

_WORDS = ("out of memory", "not enough memory", "allocate memory")
"""What CUDA, the CPU's allocator and cuBLAS say in a plain RuntimeError; cuDNN says that it is not supported."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is Python's, PyTorch's or a device's way to say that memory ran out.

    >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and (
        any(said in words for said in _WORDS) or "CUDNN_STATUS_NOT_SUPPORTED" in words
    )
