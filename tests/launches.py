"""Counts what would be launches on a GPU, and what would wait for it."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operations that write numbers: neither views nor allocations, nor what has no numbers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        if isinstance(out, torch.Tensor) and out.numel() and not view and "empty" not in str(function):
            self.names.append(str(function))
        return out


_READ = set("item tolist numpy cpu equal allclose unique nonzero masked_select is_nonzero".split())
_READ |= {f"__{name}__" for name in ("bool", "float", "int", "index", "array", "contains")}


class Waits(TorchFunctionMode):
    """Counts the calls by which Python learns numbers of a tensor, or how many they are."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _READ:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))
