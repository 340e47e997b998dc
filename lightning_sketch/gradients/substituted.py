"""Run a module on other tensors in place of its parameters and buffers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(module: nn.Module, tensors: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """The module with each of `tensors` replaced, wherever a submodule holds it; the very same put back after.

    The tensors themselves are left alone, and with them their gradients, their hooks, and what a
    distributed reducer or an optimizer knows of them. Lists of parameters, as an LSTM keeps, are followed.
    """
    table = {id(old): new for old, new in zip(tensors, by, strict=True)}
    places: list[tuple[dict | list, str | int, Tensor]] = []
    for part in module.modules():
        lists = [value for value in vars(part).values() if type(value) is list]
        for holder in (part._parameters, part._buffers, *lists):
            items = holder.items() if isinstance(holder, dict) else enumerate(holder)
            places += [(holder, key, value) for key, value in items if isinstance(value, Tensor) and id(value) in table]
    try:
        for holder, key, value in places:
            holder[key] = table[id(value)]
        yield
    finally:
        for holder, key, value in places:
            holder[key] = value
