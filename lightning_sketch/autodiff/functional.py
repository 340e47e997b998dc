"""Run a module on other tensors in place of its parameters and buffers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF


@contextmanager
def swap_tensors(module: nn.Module, tensors: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Replace each of `tensors` by another one wherever a submodule holds it, and put the very same back after.

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
    _check_present(module, tensors, {id(value) for _, _, value in places})
    try:
        for holder, key, value in places:
            holder[key] = table[id(value)]
        yield
    finally:
        for holder, key, value in places:
            holder[key] = value


def _check_present(module: nn.Module, tensors: Sequence[Tensor], present: set[int]) -> None:
    missing = sum(id(tensor) not in present for tensor in tensors)
    if missing:
        raise RuntimeError(
            f"{missing} of {len(tensors)} tensors are nowhere in the {type(module).__name__}: others stand in for them "
            "already. Leave that first, or use one operator at a time."
        )


@contextmanager
def in_float32(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Run the module on float32 copies of what it holds in half precision; yields what stands for these parameters.

    Inside another such context, as of two operators in a sum, the copies of the outer one serve.
    """
    everything = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    standing = {id(tensor.stands_for): tensor for tensor in everything if hasattr(tensor, "stands_for")}
    _check_present(module, parameters, {*map(id, everything), *standing})
    half = [tensor for tensor in everything if tensor.dtype in HALF]
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in half]
    for old, new in zip(half, wide, strict=True):
        new.stands_for = old
        standing[id(old)] = new
    with swap_tensors(module, half, wide):
        yield [standing.get(id(p), p) for p in parameters]
