"""The structure of a batch: the number of its examples, the axis that they lie along, its parts and its labels."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray


def _tensors_of(batch: Any) -> Iterator[Tensor]:
    """Return the tensors in a batch, in its order, however deep."""
    return (value for _, _, value in leaves_of(batch) if isinstance(value, Tensor))


def leaves_of(value: Any, name: str = "", depth: int = 0) -> list[tuple[str, int, Any]]:
    """Return the tensors, arrays and lists of strings in a batch, each with its name and its depth."""
    if isinstance(value, Array) or _is_text(value):
        return [(name, depth, value)]
    return [leaf for path, item in _named_items(value, name) for leaf in leaves_of(item, path, depth + 1)]


def _lists_in(value: Any, name: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the lists and plain tuples in a batch, however deep, each with its name."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        yield name, value
    for path, item in _named_items(value, name):
        yield from _lists_in(item, path)


def items_of(value: Any) -> list[Any]:
    """Return the items of a list, the values of a mapping or the fields of a dataclass, and of all else nothing."""
    return [item for _, item in _named_items(value, "")]


def _path_of(value: Any, name: str, key: Any) -> str:
    """Return the name of an item of the collection `value` of this name."""
    return f"{name}.{key}".lstrip(".") if dataclasses.is_dataclass(value) else f"{name}[{key!r}]"


def _like_images(value: Sequence[Any]) -> bool:
    """Return whether the items of a list are rather images, (channels, height, width), than collated tensors."""
    if len(value) < 2 or not all(isinstance(item, Array) and item.ndim == 3 for item in value):
        return False
    return len(value) > 3 or len({item.shape[1] for item in value}) > 1


def _kind_of(item: Any) -> str:
    """Return a description of an item, which is equal for all examples of a data set."""
    if isinstance(item, Array):
        return f"a tensor with {item.ndim} axes"
    if isinstance(item, list | tuple) and not hasattr(item, "_fields"):
        return f"a {type(item).__name__} of {', '.join(dict.fromkeys(type(part).__name__ for part in item))}"
    return f"a {type(item).__name__}"


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with its tensors changed, in the same collections."""
    return (
        change(value) if isinstance(value, Tensor) else _with_items(value, lambda item, _: _with_tensors(item, change))
    )


def _with_items(value: Any, function: Callable[[Any, Any], Any]) -> Any:
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
    return [(_path_of(value, name, key), item) for key, item in items]


def _is_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


HALF = (torch.float16, torch.bfloat16)


@dataclass
class BatchStructure:
    """The number of examples in a batch and their place in it: one rule for weights, rows and micro-batches.

    Without arguments the examples lie along the first axis of every tensor and array that has an axis, or, in a batch
    without any, in every list of strings. If the first axis of a direct entry of the batch has size one, that entry
    belongs to every example. A batch is refused if its tensors disagree, if its lists are longer or shorter than those
    of the batch before, or if a list looks like one of images, since the items of a list may be the examples.

    The axis of a tensor, or whether a list consists of examples, may be ambiguous; then an earlier batch that was not
    decides. So use one object for the batches of one loader.

    Args:
        num_examples: The number of examples, or a function (batch) -> number of examples. Tensors and lists of this
            length are then split into examples; anything else belongs to every example. `len` itself means that a
            batch is a list of examples.
        batch_dim: The axis of the examples, 1 for (time, batch, ...). A tensor with fewer axes than others may have the
            examples along its first axis, such as a label for each sequence.
        split_fn: (batch) -> batches of one example each, for graphs and packed sequences.

    Raises:
        ValueError: if `num_examples` is below 1 or `batch_dim` below 0.

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
    _lists: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _axes: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _of_examples: dict[str, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.num_examples, int) and self.num_examples < 1:
            raise ValueError(f"need num_examples >= 1, got {self.num_examples}.")
        if self.batch_dim < 0:
            raise ValueError(f"need batch_dim >= 0, got {self.batch_dim}; count axes from the first.")

    @property
    def along_first_axis(self) -> bool:
        """True if the examples are rows of tensors, as hooks and vmap need."""
        return self.batch_dim == 0 and self.split_fn is None

    def count(self, batch: Any) -> int:
        """Return the number of examples of a batch.

        Raises:
            ValueError: if the number is unknown or ambiguous.
        """
        if _is_graphs(batch) and self.num_examples is None and self.split_fn is None:
            return int(batch.num_graphs)
        if self.num_examples is len:
            _check_alike(batch)
        if callable(self.num_examples):
            return int(self.num_examples(batch))
        if self.split_fn is not None:
            return len(list(self.split_fn(batch)))
        leaves = leaves_of(batch)
        if self.num_examples is not None and self._has_length(batch, self.num_examples):
            return self.num_examples
        sizes = self._sizes(leaves)
        if not sizes:
            raise ValueError(
                f"found no tensor with a first axis in a batch of type {type(batch).__name__}, so its number of "
                "examples is unknown; use batches that are tensors or collections of tensors or strings, or pass "
                "num_examples=lambda batch: ... (weight_fn=lambda batch: ... where only its weight is asked for)."
            )
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name or 'the batch'} has {size}" for name, size in list(sizes.items())[:5])
            raise ValueError(
                f"the parts of a batch disagree about its number of examples along axis {self.batch_dim}: {listed}; "
                "pass num_examples=lambda batch: ..., batch_dim=1 if the first axis is time, or weight_fn=lambda "
                "batch: ... where only the weight of a batch is asked for."
            )
        examples = next(iter(sizes.values()))
        if self.num_examples is None:
            self._check_lists(batch, examples)
        return examples

    def parts(self, batch: Any, size: int, examples: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yield the batch in parts of at most `size` examples, each with its number of examples.

        Args:
            batch: The batch to split.
            size: The most examples in a part; with `split_fn` each part is one example.
            examples: The number of examples in the batch, if it is known.

        Raises:
            ValueError: if nothing in the batch has this length, or the batch can be split in two ways.
        """
        if self.split_fn is not None:
            yield from ((example, 1) for example in self.split_fn(batch))
            return
        examples = self.count(batch) if examples is None else examples
        if examples <= size:
            yield batch, examples
            return
        if _is_graphs(batch):
            graphs = batch.to_data_list()
            for start in range(0, examples, size):
                part = graphs[start : start + size]
                yield batch.from_data_list(part), len(part)
            return
        if not self._has_length(batch, examples):
            raise ValueError(
                f"num_examples gives {examples} for a batch of type {type(batch).__name__}, in which no tensor has "
                f"this length along axis {self.batch_dim} and no list has it; pass split_fn=lambda batch: [...], which "
                "makes batches of one example, or use batches as they are."
            )
        for start in range(0, examples, size):
            stop = min(start + size, examples)
            part = self._part(batch, examples, slice(start, stop))
            if start == 0 and callable(self.num_examples) and int(self.num_examples(part)) != stop:
                got = int(self.num_examples(part))
                raise ValueError(
                    f"num_examples gives {got} for a part of {stop} of the {examples} examples of a batch, so that "
                    "the batch was split along another axis than that of the examples; pass batch_dim=1 if the first "
                    "axis is time, or split_fn=lambda batch: [...], which makes batches of one example."
                )
            yield part, stop - start

    def one(self, batch: Any, place: int, examples: int) -> Any:
        """Return the example at this place, as a batch of one."""
        straight = self.split_fn is None and not callable(self.num_examples) and not _is_graphs(batch)
        if examples > 1 and straight and self._has_length(batch, examples):
            return self._part(batch, examples, slice(place, place + 1))
        return next(itertools.islice(self.parts(batch, 1, examples), place, None))[0]

    def two(self, batch: Any, first: int, second: int, examples: int) -> Any:
        """Return a batch of the examples at two places, in their order in the batch."""
        low, high = sorted((first, second))
        if _is_graphs(batch):
            graphs = batch.to_data_list()
            return batch.from_data_list([graphs[low], graphs[high]])
        return self._part(batch, examples, slice(low, high + 1, high - low))

    def each(self, batch: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        """Return the tensors that have the examples along their first axis, and a function that makes a batch of one.

        The function takes one slice of each tensor, without that axis; other tensors go to every batch.

        Raises:
            ValueError: if the examples are not along the first axis, or if arrays or lists have them too.
        """
        if not self.along_first_axis:
            raise ValueError("vmap needs the examples along the first axis of tensors; use engine='loop'.")
        examples = self.count(batch)
        for name, _, value in leaves_of(batch):
            if not isinstance(value, Tensor) and np.shape(value)[:1] == (examples,):
                raise ValueError(f"vmap needs the examples in tensors, but {name} is not one; use engine='loop'.")

        def has_axis(tensor: Tensor) -> bool:
            return tensor.ndim > 0 and len(tensor) == examples

        def batch_of_one(slices: Sequence[Tensor]) -> Any:
            following = iter(slices)
            return _with_tensors(batch, lambda t: next(following).unsqueeze(0) if has_axis(t) else t)

        return [tensor for tensor in _tensors_of(batch) if has_axis(tensor)], batch_of_one

    def _sizes(self, leaves: Sequence[tuple[str, int, Any]]) -> dict[str, int]:
        """Return the likely number of examples of each tensor and array, or, without any, of each list of strings."""
        arrays = [(name, depth, value) for name, depth, value in leaves if isinstance(value, Array) and value.ndim]
        if not arrays:
            return {name: len(value) for name, _, value in leaves if not isinstance(value, Array)}
        most = max(value.ndim for _, _, value in arrays)
        along = {name: v.shape[self.batch_dim] for name, _, v in arrays if v.ndim > self.batch_dim and v.ndim == most}
        found = {}
        for name, depth, value in arrays:
            fits = [value.shape[axis] for axis in (self.batch_dim, 0) if axis < value.ndim]
            likely = along.get(name) or next((size for size in fits if size in along.values()), value.shape[0])
            found[name] = (len(value) if self.batch_dim == 0 else likely), depth
        larger = {size for size, _ in found.values()} - {1}
        return {n: size for n, (size, depth) in found.items() if not (size == 1 and depth == 1 and larger)}

    def _check_lists(self, batch: Any, examples: int) -> None:
        """Refuse a list of tensors if its items may be the examples, though each has an axis that may be theirs."""
        leaves = leaves_of(batch)
        for path, value in _lists_in(batch):
            within = {name for name, _, _ in leaves_of(value, path)}
            inside = [v for name, _, v in leaves if isinstance(v, Array) and name in within]
            beside = [v for name, _, v in leaves if isinstance(v, Array) and v.ndim and name not in within]
            if not inside or len(value) == examples or beside:
                continue
            before = self._lists.setdefault(path, len(value))
            if before != len(value):
                raise ValueError(
                    f"a batch has a list of {len(value)} tensors, where the one before it had {before}, so that the "
                    "items may be the examples; pass num_examples=len (or weight_fn=len where only the weight of a "
                    "batch is asked for), or collate examples into one tensor."
                )
            if examples not in (1, 3, 4):
                self._of_examples[path] = False
            elif path not in self._of_examples and _like_images(value):
                shapes = f"{tuple(value[0].shape)}, {tuple(value[1].shape)}, ..."
                raise ValueError(
                    f"a list of {len(value)} tensors of shapes {shapes} may be one of images; pass num_examples=len if "
                    "each item is an example, or num_examples=lambda batch: len(batch[0]) if each holds all of them."
                )

    def _has_length(self, batch: Any, examples: int) -> bool:
        """Return whether a tensor, or else a list, of a batch has this length."""
        arrays = [value for _, _, value in leaves_of(batch) if isinstance(value, Array) and value.ndim]
        axes = (self.batch_dim, 0)
        if any(axis < array.ndim and array.shape[axis] == examples for array in arrays for axis in axes):
            return True
        return (callable(self.num_examples) or not arrays) and any(len(v) == examples for _, v in _lists_in(batch))

    def _part(self, batch: Any, examples: int, part: slice) -> Any:
        """Return some of the examples of a batch."""
        if self.num_examples is len and isinstance(batch, list | tuple):
            return type(batch)(batch[part])
        most = max((v.ndim for _, _, v in leaves_of(batch) if isinstance(v, Array)), default=0)
        return self._cut(batch, examples, part, "", most)

    def _cut(self, value: Any, examples: int, part: slice, path: str, most: int) -> Any:
        """Return some of the examples of the entry of a batch at this path; `most` is the most axes of an array."""
        if isinstance(value, Array):
            axis = self._axis(value, examples, path, most)
            if axis is None:
                return value
            if isinstance(value, Tensor) and value.layout != torch.strided:
                return value.index_select(
                    axis, torch.arange(part.start, part.stop, part.step or 1, device=value.device)
                )
            return value[(slice(None),) * axis + (part,)]
        if isinstance(value, list | tuple) and self._holds_examples(value, examples, path):
            return type(value)(value[part])
        return _with_items(value, lambda item, key: self._cut(item, examples, part, _path_of(value, path, key), most))

    def _axis(self, array: Array, examples: int, path: str, most: int) -> int | None:
        """Return the axis along which an array has the examples, or None."""
        axes = [axis for axis in dict.fromkeys((self.batch_dim, 0)) if array.shape[axis : axis + 1] == (examples,)]
        if len(axes) == 2 and path not in self._axes and array.ndim < most:
            raise ValueError(
                f"a tensor of shape {tuple(array.shape)} may have its {examples} examples along either axis; pass "
                "split_fn=lambda batch: [...], which makes batches of one example, or let a batch with other lengths "
                "come first."
            )
        if len(axes) == 1:
            self._axes[path] = axes[0]
        return self._axes.get(path, axes[0]) if axes else None

    def _holds_examples(self, value: Sequence[Any], examples: int, path: str) -> bool:
        """Return whether the items of a list are examples, and not collated tensors that happen to be as many.

        Where this batch is ambiguous, an earlier one decides by the list at the same place.
        """
        if hasattr(value, "_fields"):
            return False
        arrays = [item for item in value if isinstance(item, Array)]
        along = [examples in array.shape[:1] + array.shape[self.batch_dim :][:1] for array in arrays]
        if len(value) != examples:
            if any(along) or (value and all(isinstance(item, int | float) for item in value)):
                self._of_examples[path] = False
            return False
        if arrays and len(arrays) < examples:
            return not any(along)
        if arrays:
            alike = len({(array.ndim, str(array.dtype)) for array in arrays}) == 1
            if self.num_examples is None or not alike or not all(along):
                return self._of_examples.setdefault(path, not any(along) or (alike and not all(along)))
            return self._known(path, f"a list of {examples} tensors, each with an axis of {examples},")
        if all(isinstance(item, Mapping) for item in value):
            return True
        if all(isinstance(item, int | float) for item in value):
            if path not in self._of_examples and (self.num_examples is not None or examples > 4):
                self._of_examples[path] = True
            return self._known(path, f"a list of {examples} numbers, in a batch of {examples} examples,")
        inner = [(i, item) for i, item in enumerate(value) if isinstance(item, list | tuple)]
        return not any(self._holds_examples(item, examples, _path_of(value, path, i)) for i, item in inner)

    def _known(self, path: str, what: str) -> bool:
        """Return whether the items of the list at this place were examples in an earlier batch."""
        if path not in self._of_examples:
            raise ValueError(
                f"{what} is ambiguous: one item per example, or shared by all; pass num_examples=len if the batch is a "
                "list of examples, else split_fn=lambda batch: [...], which makes batches of one example."
            )
        return self._of_examples[path]


def num_examples(batch: Any) -> int:
    """Return the number of examples in a batch: the length of the first axis that all its tensors share.

    Raises:
        ValueError: if there is no tensor, or tensors disagree; `BatchStructure` takes arguments for such batches.

    >>> num_examples({"x": (torch.zeros(8, 3), torch.zeros(8))})
    8
    """
    return BatchStructure().count(batch)


def num_labels(batch: Any, *, ignore_index: int = -100, shift: bool = False) -> int:
    """Count the labels of a batch that are not ignored: its weight where a loss is a mean over tokens.

    Args:
        batch: The batch; its labels are the entry "labels", or the last item of a pair.
        ignore_index: The value of labels to ignore.
        shift: Whether to ignore the first label of each row, which a causal language model does not predict.

    Raises:
        ValueError: if the batch has no labels.

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
        ValueError: if there is no such tensor.
    """
    found = _labels(batch)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"found no labels in a batch of type {type(batch).__name__}: neither a last tensor of a tuple nor a key "
            "'labels'; pass output_loss_fn=lightning_sketch.curvature.CrossEntropy(labels_fn=lambda batch: ...), or a "
            "function (output, batch) -> loss where one is taken."
        )
    return found


def _labels(batch: Any) -> Any:
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[-1]
    return batch.get("labels") if isinstance(batch, Mapping) else None


def with_labels(batch: Any, labels: Tensor) -> Any:
    """Return a batch with other labels, where `labels_of` finds them."""
    if isinstance(batch, Mapping):
        return _with_items(batch, lambda item, key: labels if key == "labels" else item)
    last = len(batch) - 1
    return _with_items(batch, lambda item, key: labels if key == last else item)


def repeated(example: Any, count: int) -> Any:
    """Return a batch of `count` copies of a batch of one example; what has no axis of one example stays as it is."""

    def repeat(value: Any, key: Any = None) -> Any:
        if isinstance(value, Array):
            alone = value.ndim and len(value) == 1
            return (
                (value.repeat_interleave(count, 0) if isinstance(value, Tensor) else value.repeat(count, 0))
                if alone
                else value
            )
        if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], Array | Mapping):
            return value * count
        return _with_items(value, repeat)

    return repeat(example)


def _is_graphs(batch: Any) -> bool:
    """Return whether a batch is one of graphs of PyTorch Geometric, which says itself how it splits."""
    return hasattr(batch, "num_graphs") and callable(getattr(batch, "to_data_list", None))


def on_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on this device."""
    if _is_graphs(batch):
        return batch.to(device)
    return _with_tensors(batch, lambda tensor: tensor.to(device))


def copied(batch: Any) -> Any:
    """Return a copy of the batch, for a step that changes its batch in place; vmap allows it."""
    if _is_graphs(batch):
        return batch.clone()
    return _with_tensors(batch, Tensor.clone)


def differentiable(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the batch without tensors of inference mode, which autograd refuses, and none narrower than a type.

    Args:
        batch: The batch.
        dtype: The type to which narrower floating-point tensors are converted; None leaves them.
    """
    needed = any(tensor.is_inference() or _is_narrow(tensor, dtype) for tensor in _tensors_of(batch))
    return _with_tensors(batch, partial(_differentiable, dtype=dtype)) if needed else batch


def _differentiable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.to(dtype) if _is_narrow(tensor, dtype) else tensor


def _is_narrow(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.dtype in (*HALF, torch.float32) and tensor.dtype.itemsize < dtype.itemsize


def shapes_of(batch: Any) -> tuple[Any, ...]:
    """Return the shapes of all tensors and arrays and the lengths of all lists; equal where two batches look alike."""
    if isinstance(batch, Array):
        return tuple(batch.shape)
    if batch is None or isinstance(batch, str | bytes | int | float):
        return (type(batch).__name__,)
    if isinstance(batch, Mapping | list | tuple) or dataclasses.is_dataclass(batch):
        return type(batch).__name__, *(shapes_of(item) for item in items_of(batch))
    return (id(batch),)  # an object of an unknown class


def _check_alike(batch: Any) -> None:
    """Refuse a mapping, and a list whose items are not examples of one data set but collated separately."""
    if isinstance(batch, Mapping):
        raise ValueError(
            f"num_examples=len counts the {len(batch)} keys of a mapping ({type(batch).__name__}), not examples; pass "
            "num_examples=lambda batch: len(batch['labels']) or the like."
        )
    if not isinstance(batch, list | tuple):
        return
    kinds = list(dict.fromkeys(map(_kind_of, batch)))
    if len(kinds) > 1:
        raise ValueError(
            f"num_examples=len counts the {len(batch)} items of a batch, but these are {' and '.join(kinds)}, not "
            "examples of one kind; pass num_examples=lambda batch: len(batch[0]), or split_fn."
        )
