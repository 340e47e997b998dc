"""What is in a batch: its tensors, how many examples it has, and some of them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def num_examples(batch: Any) -> int:
    """How many examples a batch has: the first axis of the first tensor in it, or the length of a list of strings.

    >>> num_examples({"x": (torch.zeros(8, 3), torch.zeros(8))})
    8
    """
    tensors = (tensor.shape[0] for tensor in _leaves(batch, _is_tensor) if tensor.ndim)
    size = next(itertools.chain(tensors, map(len, _leaves(batch, _is_text))), None)
    if size is None:
        raise ValueError(
            f"found no tensor with a first axis in a batch of type {type(batch).__name__}, so its number of examples "
            "is unknown; use batches that are tensors or collections of tensors or strings."
        )
    return size


def num_labels(batch: Any, ignore_index: int = -100, shift: bool = False) -> int:
    """How many labels a batch has that are not ignored: its weight where a loss is a mean over tokens.

    Args:
        batch: labels are its "labels", or its last tensor.
        ignore_index: of the labels that do not count.
        shift: the first label of each row is predicted from nothing, as in a causal language model.

    >>> num_labels({"labels": torch.tensor([[5, 7, -100], [1, 2, 3]])}, shift=True)
    3
    """
    labels = labels_of(batch)
    return int((labels[:, 1:] if shift else labels).ne(ignore_index).sum())


def labels_of(batch: Any) -> Tensor:
    """The tensor under "labels", or the last item of a pair."""
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[-1]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"found no labels in a batch of type {type(batch).__name__}: neither a last tensor of a tuple nor a key "
            "'labels'; pass output_loss_fn=lambda output, batch: ..."
        )
    return found


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """The batch in parts of at most `size` examples; tensors without that first axis go to every part.

    Raises:
        ValueError: if there are lists of strings in it, which are not cut.
    """
    examples = num_examples(batch)
    if examples <= size:
        yield batch
        return
    if any(True for _ in _leaves(batch, _is_text)):
        raise ValueError(
            f"a batch of {examples} examples holds lists of strings and cannot be cut into parts of {size}; tokenize "
            "in the data loader, or use smaller batches."
        )
    for start in range(0, examples, size):
        part = slice(start, start + size)
        yield _changed(batch, lambda t, part=part: t[part] if t.ndim and len(t) == examples else t)


def each_example(batch: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a batch that have its examples along their first axis, and what makes a batch of one of others.

    The second takes one slice for each tensor, without that axis; other tensors go to every batch.
    """
    examples = num_examples(batch)

    def has_axis(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == examples

    def batch_of_one(slices: Sequence[Tensor]) -> Any:
        following = iter(slices)
        return _changed(batch, lambda t: next(following).unsqueeze(0) if has_axis(t) else t)

    return [tensor for tensor in _leaves(batch, _is_tensor) if has_axis(tensor)], batch_of_one


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch, in its order, however deep."""
    return _leaves(batch, _is_tensor)


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on this device."""
    return _changed(batch, lambda tensor: tensor.to(device))


def copied(batch: Any) -> Any:
    """The batch with tensors and collections of its own, for a step that changes its batch in place; vmap allows it."""
    return _changed(batch, Tensor.clone)


def differentiable(batch: Any, widen: bool = False) -> Any:
    """The batch as autograd can use it: no tensors made in inference mode, and no half precision if `widen`."""

    def needs(tensor: Tensor) -> bool:
        return tensor.is_inference() or (widen and tensor.dtype in HALF)

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone() if tensor.is_inference() else tensor
        return tensor.float() if widen and tensor.dtype in HALF else tensor

    return _changed(batch, change) if any(map(needs, _leaves(batch, _is_tensor))) else batch


def _leaves(value: Any, chosen: Callable[[Any], bool]) -> Iterator[Any]:
    """What is chosen in a batch, in its order, however deep."""
    if chosen(value):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from _leaves([getattr(value, field.name) for field in fields(value)], chosen)
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item, chosen)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with its tensors changed, in the same collections."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: _changed(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, Mapping):
        return type(value)({key: _changed(item, change) for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [_changed(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
