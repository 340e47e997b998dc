"""Equal contents have equal hashes, unequal ones unequal, and what cannot be read is refused."""

import collections
import datetime
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sketch.attribution import batch_ids
from lightning_sketch.autodiff.content_hash import content_hash


@dataclass
class Graphs:
    name: str
    nodes: Tensor


class Own:
    def __init__(self, *tensors):
        self.tensors = tensors


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


X = torch.zeros(8, 3)
DIFFERENT = [
    ["the cat sat", torch.tensor([1])],
    ["a dog ran", torch.tensor([1])],
    [["the cat", "sat"], torch.tensor([1])],
    {"text": "the cat sat", "label": torch.tensor([2])},
    ("the cat sat", 1),
    ("the cat sat", 1.0),
    ("the cat sat", "1"),
    [1, 23],
    [12, 3],
    [[1, 2], 3],
    [[1], 2, 3],
    [1, 2, 3],
    ["ab", "c"],
    ["a", "bc"],
    np.arange(3),
    np.arange(3.0),
    torch.arange(3),
    torch.arange(3).float(),
    torch.zeros(1, 2),
    torch.zeros(2, 1),
    Graphs("g", X),
    Graphs("h", X),
    Own(X),
    Own(X + 1),
    Slots(1),
    Slots(2),
    datetime.date(2020, 1, 1),
    datetime.date(2021, 1, 1),
    Path("a"),
    Path("b"),
    {1, 2},
    {1, 3},
    range(3),
    range(4),
    bytearray(b"a"),
    bytearray(b"b"),
    collections.deque([1, 2]),
    collections.deque([2, 1]),
    None,
    True,
    "",
    [],
]


def test_unequal_contents_have_unequal_hashes():
    found = [content_hash(value) for value in DIFFERENT]
    assert len(set(found)) == len(found)
    assert all(0 <= value < 1 << 63 for value in found)


def test_equal_contents_have_equal_hashes_whatever_they_are_kept_in():
    """Views, sparse tensors and other collections of the same tensors."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert content_hash([x]) == content_hash((x.T.T.clone(),)) == content_hash({"x": x.to_sparse()})
    assert content_hash([x[:, 1]]) == content_hash([torch.tensor([0.0, 2.0])])
    assert content_hash(Own(X)) == content_hash(Own(X.clone()))


def test_hashes_of_tensors_are_those_in_stores():
    """Ids of examples by index_key='hash' are written to stores; these are the first version's."""
    assert content_hash((torch.arange(6.0).view(2, 3), torch.tensor([1]))) == 7799134863832516803


@pytest.mark.slow
def test_sets_of_strings_hash_alike_in_every_process():
    code = "from lightning_sketch.autodiff.content_hash import content_hash; print(content_hash({'a', 'b', 'c'}))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert {int(run.stdout) for run in runs} == {content_hash({"c", "b", "a"})}


def test_what_cannot_be_read_is_refused():
    with pytest.raises(TypeError, match=r"lock.* in a batch cannot be read.*pass an index_key"):
        content_hash([threading.Lock()])


def test_ids_of_a_batch_with_lists_of_numbers_are_of_each_example():
    """Whole numbers of an example, of unequal length, beside its tensor."""
    batch = {"x": torch.zeros(6, 3), "tokens": [[1, 23], [12, 3], [1, 2, 3], [1], [2], [1, 23]]}
    ids = batch_ids(batch, "hash").tolist()
    assert len(set(ids)) == 5
    assert ids[0] == ids[5]
