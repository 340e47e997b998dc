"""What is in a batch: how many examples, along which axis, its labels, its tensors, and a hash of its contents."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

_Array = Tensor | np.ndarray


@dataclass
class BatchStructure:
    """How many examples a batch has and where they are: one rule for weights, rows and micro-batches.

    Without arguments the examples lie along the first axis of every tensor and array with an axis, and in every list
    of strings. Where these disagree the batch is refused by name, and so is a batch whose lists have other lengths
    than those of the batch before it, since such lists may hold examples themselves.

    Args:
        num_examples: how many there are, or a function batch -> how many. What then has this length along its axis is
            cut into examples, lists of this length too; anything else belongs to every example. `len` itself says that
            a batch is a list of examples.
        batch_dim: the axis of the examples, 1 for (time, batch, ...); a tensor that does not have them there, such as
            one label for each sequence, has them along its first axis.
        split_fn: batch -> batches of one example each, for graphs and packed sequences.

    What an earlier batch showed, of the axis of a tensor or whether a list holds examples, decides where a later one
    may be read in two ways; so one object serves the batches of one loader.

    >>> time_first = torch.zeros(10, 8, 3), torch.zeros(8)
    >>> BatchStructure(batch_dim=1).count(time_first)
    8
    >>> images = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)]
    >>> [part[0].shape[1:] for part, _ in BatchStructure(num_examples=len).parts(images, 1)]
    [torch.Size([8, 8]), torch.Size([9, 7])]
    """

    num_examples: int | Callable[[Any], int] | None = None
    batch_dim: int = 0
    split_fn: Callable[[Any], Iterable[Any]] | None = None
    _lists: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    _axes: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _hold: dict[str, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if isinstance(self.num_examples, int) and self.num_examples < 1:
            raise ValueError(f"need num_examples >= 1, got {self.num_examples}.")
        if self.batch_dim < 0:
            raise ValueError(f"need batch_dim >= 0, got {self.batch_dim}; count axes from the first.")

    @property
    def along_first_axis(self) -> bool:
        """Whether examples are rows of tensors, as hooks and vmap need."""
        return self.batch_dim == 0 and self.split_fn is None

    def count(self, batch: Any) -> int:
        """Return the number of examples of a batch.

        Raises:
            ValueError: if it is not known or not clear.
        """
        if callable(self.num_examples):
            return int(self.num_examples(batch))
        if self.split_fn is not None:
            return len(list(self.split_fn(batch)))
        if self.num_examples is None:
            self._check_lists(batch)
        elif self._has_length(batch, self.num_examples):
            return self.num_examples
        sizes = {name: found for name, value in _named_leaves(batch) if (found := self._sizes(value))}
        if not sizes:
            raise ValueError(
                f"found no tensor with a first axis in a batch of type {type(batch).__name__}, so its number of "
                "examples is unknown; use batches that are tensors or collections of tensors or strings, or pass "
                "num_examples=lambda batch: ... (weight_fn=lambda batch: ... where only its weight is asked for)."
            )
        shared = [size for size in next(iter(sizes.values())) if all(size in found for found in sizes.values())]
        if not shared:
            listed = ", ".join(f"{name or 'the batch'} has {found[0]}" for name, found in list(sizes.items())[:5])
            raise ValueError(
                f"the parts of a batch disagree about its number of examples along axis {self.batch_dim}: {listed}; "
                "pass num_examples=lambda batch: ..., batch_dim=1 if the first axis is time, or weight_fn=lambda "
                "batch: ... where only the weight of a batch is asked for."
            )
        return shared[0]

    def parts(self, batch: Any, size: int, examples: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yield the batch in parts of at most `size` examples, each with its number of them.

        Args:
            batch: to be cut.
            size: most examples in a part; with `split_fn` each part is one example.
            examples: how many the batch has, where that is known.

        Raises:
            ValueError: if nothing in it has the length that it is said to have.
        """
        if self.split_fn is not None:
            yield from ((example, 1) for example in self.split_fn(batch))
            return
        examples = self.count(batch) if examples is None else examples
        if examples <= size:
            yield batch, examples
            return
        if not self._has_length(batch, examples):
            raise ValueError(
                f"num_examples gives {examples} for a batch of type {type(batch).__name__}, in which no tensor has "
                f"this length along axis {self.batch_dim} and no list has it; pass split_fn=lambda batch: [...], which "
                "makes batches of one example, or use batches as they are."
            )
        for start in range(0, examples, size):
            stop = min(start + size, examples)
            is_list = self.num_examples is len and isinstance(batch, list | tuple)
            part = type(batch)(batch[start:stop]) if is_list else self._cut(batch, examples, slice(start, stop), "")
            yield part, stop - start

    def each(self, batch: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        """Return the tensors of a batch with its examples along their first axis, and what makes a batch of one.

        The second takes one slice for each tensor, without that axis; other tensors go to every batch.

        Raises:
            ValueError: if examples are not along the first axis.
        """
        if not self.along_first_axis:
            raise ValueError("vmap needs the examples along the first axis; use engine='loop'.")
        examples = self.count(batch)

        def has_axis(tensor: Tensor) -> bool:
            return tensor.ndim > 0 and len(tensor) == examples

        def batch_of_one(slices: Sequence[Tensor]) -> Any:
            following = iter(slices)
            return _changed(batch, lambda t: next(following).unsqueeze(0) if has_axis(t) else t)

        return [tensor for tensor in tensors_of(batch) if has_axis(tensor)], batch_of_one

    def _check_lists(self, batch: Any) -> None:
        """Refuse a batch whose lists of tensors are longer or shorter than those of the first: they may be examples."""
        lists = tuple(_list_lengths(batch))
        self._lists = lists if self._lists is None else self._lists
        if lists != self._lists:
            raise ValueError(
                f"a batch holds lists of {list(lists)} tensors, the one before it of {list(self._lists)}, so that a "
                "list may hold one example an item; pass num_examples=len (or weight_fn=len where only the weight of "
                "a batch is asked for), or collate examples into one tensor."
            )

    def _has_length(self, batch: Any, examples: int) -> bool:
        """Whether a tensor, or a list, of a batch has this length."""
        return any(examples in self._sizes(value) for _, value in _named_leaves(batch)) or any(
            len(value) == examples for value in _lists_in(batch)
        )

    def _sizes(self, value: Any) -> list[int]:
        """How many examples a tensor, an array, or a list of strings may have; the likeliest first."""
        if not isinstance(value, _Array):
            return [len(value)]
        return [value.shape[axis] for axis in dict.fromkeys((self.batch_dim, 0)) if value.ndim > axis]

    def _cut(self, value: Any, examples: int, part: slice, path: str) -> Any:
        if isinstance(value, _Array):
            axes = [axis for axis in dict.fromkeys((self.batch_dim, 0)) if value.shape[axis : axis + 1] == (examples,)]
            if len(axes) == 1:
                self._axes[path] = axes[0]
            return value[(slice(None),) * self._axes.get(path, axes[0]) + (part,)] if axes else value
        if isinstance(value, list | tuple) and self._holds_examples(value, examples, path):
            return type(value)(value[part])
        return _mapped(value, lambda item, key: self._cut(item, examples, part, f"{path}/{key}"))

    def _holds_examples(self, value: Sequence[Any], examples: int, path: str) -> bool:
        """Whether a list has one example an item, and is not a tuple of collated tensors that happens to be as long.

        What an earlier batch showed of the list at this place decides where this one does not.
        """
        if hasattr(value, "_fields"):
            return False
        arrays = [item for item in value if isinstance(item, _Array)]
        if arrays:
            along = [examples in self._sizes(array) for array in arrays]
            alike = len({(array.ndim, str(array.dtype)) for array in arrays}) == 1
            if len(value) != examples:
                if any(along):
                    self._hold[path] = False
                return False
            if self.num_examples is None or not alike or not all(along):
                return self._hold.setdefault(path, not any(along) or (alike and not all(along)))
            if path not in self._hold:
                raise ValueError(
                    f"a list of {examples} tensors, each with an axis of {examples}, may hold an example an item "
                    "or all of them in each; pass num_examples=len if the batch is a list of examples, else "
                    "split_fn=lambda batch: [...], which makes batches of one example."
                )
            return self._hold[path]
        if len(value) != examples:
            return False
        if all(isinstance(item, Mapping) for item in value):
            return True
        if all(isinstance(item, int | float) for item in value):
            return self.num_examples is not None  # else it may be a size, such as that of an image
        inner = [(i, item) for i, item in enumerate(value) if isinstance(item, list | tuple)]
        return not any(self._holds_examples(item, examples, f"{path}/{i}") for i, item in inner)


def num_examples(batch: Any) -> int:
    """Return how many examples a batch has: the length of the first axis that all its tensors share.

    Raises:
        ValueError: if there is no tensor, or tensors disagree; `BatchStructure` says what overrides that.

    >>> num_examples({"x": (torch.zeros(8, 3), torch.zeros(8))})
    8
    """
    return BatchStructure().count(batch)


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


def has_labels(batch: Any) -> bool:
    """Return whether a batch has a tensor under "labels", or as the last item of a pair."""
    return isinstance(_labels(batch), Tensor)


def labels_of(batch: Any) -> Tensor:
    """Return the tensor under "labels", or the last item of a pair.

    Raises:
        ValueError: if there is none.
    """
    found = _labels(batch)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"found no labels in a batch of type {type(batch).__name__}: neither a last tensor of a tuple nor a key "
            "'labels'; pass output_loss_fn=lambda output, batch: ..."
        )
    return found


def _labels(batch: Any) -> Any:
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[-1]
    return batch.get("labels") if isinstance(batch, Mapping) else None


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Return the tensors in a batch, in its order, however deep."""
    return (value for _, value in _named_leaves(batch) if isinstance(value, Tensor))


def on_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on this device."""
    return _changed(batch, lambda tensor: tensor.to(device))


def copied(batch: Any) -> Any:
    """Return a copy of the batch, for a step that changes its batch in place; vmap allows it."""
    return _changed(batch, Tensor.clone)


def differentiable(batch: Any, widen: bool = False) -> Any:
    """Return the batch as autograd can use it: without tensors of inference mode, nor half precision if `widen`."""

    def needs(tensor: Tensor) -> bool:
        return tensor.is_inference() or (widen and tensor.dtype in HALF)

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone() if tensor.is_inference() else tensor
        return tensor.float() if widen and tensor.dtype in HALF else tensor

    return _changed(batch, change) if any(map(needs, tensors_of(batch))) else batch


def content_hash(value: Any) -> int:
    """Return 63 bits of a hash of all that a batch, or an example, holds: tensors, arrays, strings, numbers, objects.

    Equal contents in equal order have equal hashes on every machine; keys of mappings and names of attributes do not
    count.

    >>> content_hash(["the cat sat", torch.tensor(1)]) != content_hash(["a dog ran", torch.tensor(1)])
    True
    """
    return int.from_bytes(content_digest(value), "little") >> 1


def content_digest(value: Any) -> bytes:
    """Return the eight bytes that `content_hash` takes its bits from."""
    digest = hashlib.blake2b(digest_size=8)
    _digest(digest, value)
    return digest.digest()


def _digest(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        _digest(digest, list(value.values()))
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            _digest(digest, item)
    elif value is None or isinstance(value, str | bytes | int | float | complex | np.generic):
        digest.update(repr(value).encode())
    elif dataclasses.is_dataclass(value):
        _digest(digest, [getattr(value, f.name) for f in fields(value)])
    elif hasattr(value, "__dict__"):
        _digest(digest, vars(value))
    else:
        digest.update(type(value).__name__.encode())


def _named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, arrays and lists of strings in a batch, in its order, however deep, each with the way to it."""
    if isinstance(value, _Array) or _is_text(value):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for f in fields(value):
            yield from _named_leaves(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _named_leaves(item, f"{name}[{i}]")


def _lists_in(value: Any) -> Iterator[Sequence[Any]]:
    """Yield lists and plain tuples in a batch, however deep."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        yield value
    if not isinstance(value, _Array | str | bytes):
        for item in _items(value):
            yield from _lists_in(item)


def _list_lengths(value: Any) -> Iterator[int]:
    """Lengths of the lists that hold tensors or arrays, at whatever depth."""
    return (len(found) for found in _lists_in(value) if any(isinstance(v, _Array) for _, v in _named_leaves(found)))


def _items(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        return [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with its tensors changed, in the same collections."""
    return change(value) if isinstance(value, Tensor) else _mapped(value, lambda item, _: _changed(item, change))


def _mapped(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return a collection of what the function makes of each item and its key, of the same kind; all else as it is."""
    if dataclasses.is_dataclass(value):
        named = {f.name: function(getattr(value, f.name), f.name) for f in fields(value)}
        return dataclasses.replace(value, **named)
    if isinstance(value, Mapping):
        return type(value)({key: function(item, key) for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [function(item, i) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
