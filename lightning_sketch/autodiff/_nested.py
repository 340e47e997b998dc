"""Nested batches: walks over the tensors, arrays and lists in them, and copies with other contents."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

Array = Tensor | np.ndarray


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Return the tensors in a batch, in its order, however deep."""
    return (value for _, _, value in leaves_of(batch) if isinstance(value, Tensor))


def leaves_of(value: Any, name: str = "", depth: int = 0) -> list[tuple[str, int, Any]]:
    """Return the tensors, arrays and lists of strings in a batch, each with its name and its depth."""
    if isinstance(value, Array) or _is_text(value):
        return [(name, depth, value)]
    return [leaf for path, item in _named_items(value, name) for leaf in leaves_of(item, path, depth + 1)]


def lists_in(value: Any, name: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the lists and plain tuples in a batch, however deep, each with its name."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        yield name, value
    for path, item in _named_items(value, name):
        yield from lists_in(item, path)


def items_of(value: Any) -> list[Any]:
    """Return the items of a list, the values of a mapping or the fields of a dataclass, and of all else nothing."""
    return [item for _, item in _named_items(value, "")]


def path_of(value: Any, name: str, key: Any) -> str:
    """Return the name of an item of the collection `value` of this name."""
    return f"{name}.{key}".lstrip(".") if dataclasses.is_dataclass(value) else f"{name}[{key!r}]"


def like_images(value: Sequence[Any]) -> bool:
    """Return whether the items of a list are rather images, (channels, height, width), than collated tensors."""
    if len(value) < 2 or not all(isinstance(item, Array) and item.ndim == 3 for item in value):
        return False
    return len(value) > 3 or len({item.shape[1] for item in value}) > 1


def kind_of(item: Any) -> str:
    """Return a description of an item, which is equal for all examples of a data set."""
    if isinstance(item, Array):
        return f"a tensor with {item.ndim} axes"
    if isinstance(item, list | tuple) and not hasattr(item, "_fields"):
        return f"a {type(item).__name__} of {', '.join(dict.fromkeys(type(part).__name__ for part in item))}"
    return f"a {type(item).__name__}"


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with its tensors changed, in the same collections."""
    return change(value) if isinstance(value, Tensor) else with_items(value, lambda item, _: with_tensors(item, change))


def with_items(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return a collection of the same class with the results of `function(item, key)`, and all else unchanged."""
    new: Any
    if dataclasses.is_dataclass(value):
        new = copy.copy(value)
        for f in fields(value):
            object.__setattr__(new, f.name, function(getattr(value, f.name), f.name))
        return new
    if isinstance(value, MutableMapping):
        new = copy.copy(value)  # works for a defaultdict, and for what a tokenizer returns
        for key, item in value.items():
            new[key] = function(item, key)
        return new
    kind: Any = type(value)
    if isinstance(value, Mapping):
        return kind({key: function(item, key) for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [function(item, i) for i, item in enumerate(value)]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value


def _named_items(value: Any, name: str) -> list[tuple[str, Any]]:
    """Return the items of a collection of this name, each with its own name in Python: `.field` or `[key]`."""
    items: list[tuple[Any, Any]] = []
    if dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    return [(path_of(value, name, key), item) for key, item in items]


def _is_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
