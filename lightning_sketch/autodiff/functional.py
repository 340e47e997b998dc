"""Context managers that run a module as a function: on other parameters, and with stopped gradients held fixed."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sketch.autodiff.batches import HALF

# Functions that return numbers in place of a tensor.
_NUMBERS = ("item", "tolist", "__float__", "__int__", "__index__")

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


def following(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the weights of a subspace follow its w; for other modules it does nothing."""
    follows = getattr(type(module), "following", None)
    return nullcontext() if follows is None else follows(module)


def every_parameter(module: nn.Module) -> list[Tensor]:
    """Return all parameters of a module and its parts, each once, also those that a subspace leaves out."""
    found: dict[int, Tensor] = {id(p): p for m in module.modules() for p in m._parameters.values() if p is not None}
    return list(found.values())


def _check_present(module: nn.Module, tensors: Sequence[Tensor], present: set[int]) -> None:
    missing = sum(id(tensor) not in present for tensor in tensors)
    if missing:
        raise RuntimeError(
            f"{missing} of {len(tensors)} tensors are not in the {type(module).__name__}: others replace them already. "
            "Leave that context first, or use one operator at a time."
        )


@contextmanager
def in_precision(module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Run a module on copies of its narrower floating-point tensors; yield the copies of these parameters.

    Inside another such context, as of two operators in a sum, the copies of the outer one are used.

    Args:
        module: The module.
        parameters: The parameters whose replacements are yielded; those that are wide enough are yielded themselves.
        dtype: The type of the copies.

    Raises:
        RuntimeError: if one of the parameters is nowhere in the module.
    """
    everything = {id(tensor): tensor for tensor in (*every_parameter(module), *module.buffers())}.values()
    standing = {id(getattr(tensor, _ORIGINAL)): tensor for tensor in everything if hasattr(tensor, _ORIGINAL)}
    _check_present(module, parameters, {*map(id, everything), *standing})
    narrow = [t for t in everything if t.dtype in (*HALF, torch.float32) and t.dtype.itemsize < dtype.itemsize]
    wide = [tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in narrow]
    for old, new in zip(narrow, wide, strict=True):
        setattr(new, _ORIGINAL, old)
        standing[id(old)] = new
    with swap_tensors(module, narrow, wide):
        yield [standing.get(id(p), p) for p in parameters]


class HeldTargets(TorchFunctionMode):
    """Record, in the first evaluation of a loss, what it computes without gradients, and return it in all others.

    A loss may compute targets by itself and stop gradients there: `detach`, `no_grad`, `item`. Autograd differentiates
    it as if they were constants. Differences of gradients do so only if these tensors keep their values while the
    parameters move. Enter it around each evaluation. Memory is that of the recorded tensors.

    >>> x, targets = torch.tensor(1.0, requires_grad=True), HeldTargets()
    >>> for moved in (x, x + 1):
    ...     with targets:
    ...         difference = moved - moved.detach()
    ...     print(float(difference.detach()))
    0.0
    1.0
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[Any] | None = None
        self._next, self._stopped = 0, False

    def __enter__(self) -> "HeldTargets":
        self._next, self._stopped = 0, False
        self._replays, self._recorded = self._recorded is not None, self._recorded or []
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and replace its result if no gradient flows through it.

        In the forward pass of a custom autograd function gradients are off as well, but it belongs to the loss.
        """
        out = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:  # by no_grad; a custom autograd function sets it in another way
            self._stopped = not args[0]
        elif getattr(func, "__name__", "") == "requires_grad_":  # returns a parameter that was moved
            return out
        elif self._stopped or torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            in_place = (bool(args) and out is args[0]) or (kwargs is not None and out is kwargs.get("out", args))
            return self._held(out, in_place, isinstance(out, Tensor) or getattr(func, "__name__", "") in _NUMBERS)
        return out

    def _held(self, out: Any, in_place: bool, held: bool = True) -> Any:
        """Record a result without a gradient, or return the recorded one."""
        if isinstance(out, list | tuple) and not hasattr(out, "_fields"):
            return type(out)(self._held(item, in_place=False, held=isinstance(item, Tensor)) for item in out)
        if not held or not isinstance(out, Tensor | int | float) or isinstance(out, bool):
            return out
        if isinstance(out, Tensor) and (out.requires_grad or not (self._stopped or out.is_floating_point())):
            return out
        assert self._recorded is not None
        if not self._replays:
            self._recorded.append(out.detach().clone() if isinstance(out, Tensor) else out)
            return out
        if self._next == len(self._recorded):
            raise RuntimeError("the loss takes another path where its parameters are moved.")
        before = self._recorded[self._next]
        self._next += 1
        if not isinstance(out, Tensor):
            return before
        if out.shape != before.shape:
            raise RuntimeError("the loss takes another path where its parameters are moved.")
        base = out._base
        if (in_place or base is not None) and not (base is not None and base.requires_grad):
            if not torch._debug_has_internal_overlap(out):  # others may refer to the tensor
                out.data.copy_(before)
            return out
        return before.clone()
