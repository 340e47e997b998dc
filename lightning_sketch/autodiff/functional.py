"""Context managers that run a module on other tensors in place of its parameters and buffers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF

_ORIGINAL = "stands_for"  # the attribute of a copy that is the tensor it replaces


@contextmanager
def swap_tensors(module: nn.Module, tensors: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Replace tensors by others wherever a submodule has them, and restore the very same ones afterwards.

    The tensors themselves are not changed, and neither are their gradients, their hooks, and the references of a
    distributed reducer or an optimizer to them. Lists of parameters, as in an LSTM, are followed.

    Args:
        module: The module.
        tensors: The parameters and buffers to replace.
        by: The tensors that replace them, in the same order.

    Raises:
        RuntimeError: if one of the tensors is nowhere in the module.
    """
    table = {id(old): new for old, new in zip(tensors, by, strict=True)}
    places: list[tuple[Any, str | int, Tensor]] = []
    for part in module.modules():
        lists: list[Any] = [value for value in vars(part).values() if type(value) is list]
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
            f"{missing} of {len(tensors)} tensors are not in the {type(module).__name__}: others replace them already. "
            "Leave that context first, or use one operator at a time."
        )


@contextmanager
def in_float32(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Run a module on float32 copies of its tensors in half precision; yield the copies of these parameters.

    Inside another such context, as of two operators in a sum, the copies of the outer one are used.

    Args:
        module: The module.
        parameters: The parameters whose replacements are yielded; those in full precision are yielded themselves.

    Raises:
        RuntimeError: if one of the parameters is nowhere in the module.
    """
    everything = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    standing = {id(getattr(tensor, _ORIGINAL)): tensor for tensor in everything if hasattr(tensor, _ORIGINAL)}
    _check_present(module, parameters, {*map(id, everything), *standing})
    half = [tensor for tensor in everything if tensor.dtype in HALF]
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in half]
    for old, new in zip(half, wide, strict=True):
        setattr(new, _ORIGINAL, old)
        standing[id(old)] = new
    with swap_tensors(module, half, wide):
        yield [standing.get(id(p), p) for p in parameters]
