"""The test for errors that mean that memory ran out."""

import torch

# Words of CUDA, of the CPU's allocator, of cuBLAS and of cuDNN in a plain RuntimeError.
_WORDS = ("out of memory", "not enough memory", "allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, PyTorch or a device means that memory ran out.

    >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(words in message for words in _WORDS)
