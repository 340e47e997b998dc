"""Batches of any kind are split into parts, searched for labels, and prepared for autograd."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_sketch.autodiff.batches import BatchStructure, differentiable, labels_of, num_labels

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.arange(24.0).view(8, 3), torch.arange(8)
EIGHT = BatchStructure(num_examples=8)


@dataclass(frozen=True)
class Graphs:
    name: str
    nodes: Tensor


class Encoding(UserDict):
    """As tokenizers return: a mapping, though no dict."""


BATCHES = {
    "tensor": X,
    "pair": (X, Y),
    "list": [X, Y],
    "named tuple": Pair(X, Y),
    "dict": {"x": X, "labels": Y},
    "ordered": OrderedDict(x=X, labels=Y),
    "encoding": Encoding(x=X, labels=Y),
    "dataclass": Graphs("g", X),
    "nested": ({"x": (X, [X])}, Graphs("g", X), Y),
    "with others": {"x": X, "scale": torch.tensor(2.0), "table": torch.ones(3, 8), "n": 5, "none": None, "name": "a"},
}
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def tensors(batch):
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Graphs):
        return [batch.nodes]
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, list | tuple) else []
    return [t for value in values for t in tensors(value)]


@batches
@pytest.mark.parametrize("size", [1, 3, 8, 9])
def test_parts_make_up_the_batch(batch, size):
    """In order, in the same collections, none larger than asked for; tensors without examples are in every part."""
    parts, counts = zip(*EIGHT.parts(batch, size), strict=True)
    assert list(counts) == [min(size, 8 - start) for start in range(0, 8, size)]
    assert all(type(part) is type(batch) for part in parts)
    for i, whole in enumerate(tensors(batch)):
        if whole.ndim and len(whole) == 8:
            assert torch.equal(torch.cat([tensors(part)[i] for part in parts]), whole)
        else:
            assert all(tensors(part)[i] is whole for part in parts)


def test_what_is_no_tensor_goes_to_every_part():
    for part, _ in EIGHT.parts(BATCHES["with others"], 3):
        assert (part["n"], part["none"], part["name"]) == (5, None, "a")
    assert [part.name for part, _ in EIGHT.parts(BATCHES["dataclass"], 3)] == ["g"] * 3


def test_a_batch_that_is_small_enough_is_given_as_it_is():
    for batch in (*BATCHES.values(), {"x": X, "text": ["a"] * 8}):
        assert next(EIGHT.parts(batch, 8))[0] is batch


def test_parts_share_memory_with_the_batch():
    assert [part.data_ptr() for part, _ in EIGHT.parts(X, 4)] == [X.data_ptr(), X[4:].data_ptr()]


@pytest.mark.parametrize("name", ["pair", "list", "named tuple", "dict", "ordered", "encoding", "nested"])
def test_labels_are_named_or_last(name):
    assert labels_of(BATCHES[name]) is Y
    assert num_labels(BATCHES[name]) == 8


@pytest.mark.parametrize("batch", [X, [X], (X,), {"x": X}, (X, "text"), {"labels": [1, 2]}, Graphs("g", X), None])
def test_a_batch_without_labels_is_refused(batch):
    with pytest.raises(
        ValueError, match=rf"no labels in a batch of type {type(batch).__name__}: .* pass output_loss_fn="
    ):
        labels_of(batch)


def test_labels_that_are_ignored_do_not_count():
    y = torch.tensor([[0, 1, -100], [-100, 5, 7]])
    assert num_labels((X, y)) == 4
    assert num_labels((X, y), ignore_index=5) == 5
    assert num_labels((X, y), shift=True) == 3  # 1, 5, 7
    assert num_labels((X, torch.full((4,), -100))) == 0


@batches
def test_a_batch_that_needs_no_change_is_given_as_it_is(batch):
    assert differentiable(batch) is batch
    assert differentiable(batch, dtype=torch.float32) is batch


@batches
def test_tensors_of_inference_mode_are_copied(batch):
    with torch.inference_mode():
        made = _copied(batch)
    changed = differentiable(made)
    assert type(changed) is type(batch)
    for old, new in zip(tensors(made), tensors(changed), strict=True):
        assert old.is_inference()
        assert not new.is_inference()
        assert torch.equal(old, new)
    weight = torch.ones(3, requires_grad=True)
    (tensors(changed)[0] * weight).sum().backward()


def _copied(batch):
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, Graphs):
        return Graphs(batch.name, batch.nodes.clone())
    if hasattr(batch, "items"):
        return type(batch)({k: _copied(v) for k, v in batch.items()})
    if isinstance(batch, list | tuple):
        items = [_copied(v) for v in batch]
        return Pair(*items) if isinstance(batch, Pair) else type(batch)(items)
    return batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_if_wanted(dtype):
    batch = {"x": X.to(dtype), "y": Y, "z": X.double()}
    assert differentiable(batch) is batch
    wide = differentiable(batch, dtype=torch.float32)
    assert [t.dtype for t in wide.values()] == [torch.float32, torch.int64, torch.float64]
    assert torch.equal(wide["x"], batch["x"].float())
    assert wide["y"] is Y
