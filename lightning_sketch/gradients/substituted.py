"""Run a module on other tensors in place of its parameters and buffers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_sketch.gradients.examples import HALF


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


@contextmanager
def in_float32(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The module on float32 copies of what it holds in half precision; yields what stands for these parameters."""
    everything = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    half = [tensor for tensor in everything if tensor.dtype in HALF]
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in half]
    table = {id(old): new for old, new in zip(half, wide, strict=True)}
    with substituted(module, half, wide):
        yield [table.get(id(p), p) for p in parameters]
