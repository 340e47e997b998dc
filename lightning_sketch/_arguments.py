"""Checks of arguments that several rooms take, so that a wrong one is refused where it is passed."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import index
from typing import Any

from torch import Tensor, nn

_OF_TORCH = ("torch.nn.modules.loss", "torch.nn.functional")


def kind_of(value: Any) -> str:
    """Return what a value is, for a message: `a list`, `the class Model`, `None`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """Return the repr of a value, or what it is if that is longer than half a line."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else kind_of(value)


def whole_number(value: Any, name: str, least: int = 1, usual: int | None = None) -> int:
    """Return a whole number of at least `least` as an int.

    Args:
        value: The number, or what came in its place.
        name: The name of the argument.
        least: The smallest number that is possible.
        usual: A number that the message suggests.

    Raises:
        ValueError: If it is none; a boolean or a float is none.
    """
    try:
        if not isinstance(value, bool) and index(value) >= least:
            return index(value)
    except TypeError:
        pass
    suggestion = "" if usual is None else f"; {usual} is usual"
    raise ValueError(f"need {name} >= {least}, got {shown(value)}; pass a whole number{suggestion}.")


def check_patterns(patterns: Any) -> None:
    """Refuse what is no pattern of parameters' names and no list of them.

    Raises:
        TypeError: If it is neither.
    """
    listed = isinstance(patterns, Collection) and all(isinstance(item, str) for item in patterns)
    if not isinstance(patterns, str) and not listed:
        raise TypeError(
            f"parameters is a pattern of names, or a list of patterns, got {shown(patterns)}; pass "
            "parameters='net.*', with names as in module.named_parameters()."
        )


def check_loss_fn(loss_fn: Any, name: str = "loss_fn", arguments: tuple[str, str] = ("module", "batch")) -> None:
    """Refuse what cannot be called as `loss_fn(module, batch)`.

    Args:
        loss_fn: The function, or what came in its place.
        name: The name of the argument.
        arguments: What the function is called with.

    Raises:
        TypeError: If it is a loss of PyTorch, takes other arguments, or is no function.
    """
    first, second = arguments
    call = f"{name}({first}, {second})"
    of_module = isinstance(loss_fn, nn.Module)
    known = type(loss_fn) if of_module else loss_fn
    if getattr(known, "__module__", None) in _OF_TORCH:
        own, output = known.__name__, "module(batch[0])" if first == "module" else first
        made = f"nn.{own}()" if isinstance(known, type) else f"F.{own}"
        raise TypeError(
            f"{name} is called as {call}, got {own}, which takes an output and labels; pass lambda {first}, {second}: "
            f"{made}({output}, batch[1])."
        )
    example = f"pass lambda {first}, {second}: loss"
    if not callable(loss_fn):
        raise TypeError(f"{name} is a function that is called as {call}, got {kind_of(loss_fn)}; {example}.")
    if not _takes_two(loss_fn.forward if of_module else loss_fn):
        raise TypeError(f"{name} is called as {call}, got {_named(loss_fn)}, which takes other arguments; {example}.")


def not_scalar(name: str, returned: Any) -> str:
    """Return the message for a function that returned something else than one loss for its batch."""
    if isinstance(returned, Tensor):
        got, way_out = f"a tensor of shape {tuple(returned.shape)}", "use .mean()"
    elif isinstance(returned, int | float):
        got, way_out = kind_of(returned), "leave out .item(), through which there is no derivative"
    else:
        got, way_out = kind_of(returned), "return the loss alone"
    return f"{name} returns the mean loss of a batch, a scalar tensor; got {got}; {way_out}."


def _takes_two(function: Callable[..., Any]) -> bool:
    """Return whether a function can be called with two positional arguments, as far as its signature is known."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # a function of C without a signature
        return True
    return True


def _named(function: Any) -> str:
    own = getattr(function, "__name__", type(function).__name__)
    try:
        return f"{own}{inspect.signature(function)}"
    except (TypeError, ValueError):
        return str(own)


def check_batches(batches: Any) -> None:
    """Refuse one batch in place of a list of batches, and what cannot be read batch by batch.

    Raises:
        TypeError: If it is a tensor, a mapping, some tensors that cannot be batches of one data set, or no iterable.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches is a list of batches, got one tensor; pass [batch].")
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is a list of batches, got {kind_of(batches)}, which is one batch; pass [batch].")
    if isinstance(batches, list | tuple) and all(isinstance(item, Tensor) for item in batches):
        if len({(item.dtype, item.ndim) for item in batches}) > 1:
            raise TypeError(
                f"batches is a list of batches, got {kind_of(batches)} of tensors of different types or numbers of "
                "axes, which is one batch of inputs and labels; pass [batch]."
            )
    if not isinstance(batches, Iterable) and not hasattr(type(batches), "__getitem__"):
        raise TypeError(
            f"batches is a list of batches or a data loader, got {kind_of(batches)}; pass [batch], or "
            "datamodule.train_dataloader()."
        )


def check_data(module: Any, batches: Any, what: str) -> None:
    """Refuse another thing in place of the module, and what `check_batches` refuses.

    Raises:
        TypeError: If the module is none, or the batches are none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{what} takes a module, got {kind_of(module)}; its arguments come in the order {what}(module, batches)."
        )
    check_batches(batches)
