"""How many examples a batch has: the first axis of the first tensor in it."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_sketch.autodiff.batches import num_examples

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Graphs:
    name: str
    nodes: Tensor


@dataclass(slots=True)
class Slots:
    nodes: Tensor


class Encoding(UserDict):
    """As tokenizers return: a mapping, though no dict."""


X = torch.zeros(8, 3)
BATCHES = {
    "tensor": X,
    "pair": (X, torch.zeros(5)),
    "list": [X, X],
    "named tuple": Pair("label", X),
    "dict": {"x": X, "y": torch.zeros(5)},
    "nested": {"text": ["a", "b"], "inputs": ({"ids": X},)},
    "scalar first": (torch.tensor(1.0), X),
    "number first": (3, None, X),
    "dataclass": Graphs("g", X),
    "dataclass with slots": Slots(X),
    "text before": {"text": ["a", "b"], "x": X},
    "encoding": Encoding(input_ids=X, labels=torch.zeros(5)),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_first_axis_of_the_first_tensor_counts(batch):
    assert num_examples(batch) == 8


def test_strings_are_counted_where_there_is_no_tensor():
    assert num_examples({"text": ["a", "b", "c"], "name": "train"}) == 3


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (torch.tensor(1.0), "Tensor"),
        ({"loss": torch.tensor(1.0)}, "dict"),
        ((), "tuple"),
        (3, "int"),
        ("text", "str"),
    ],
)
def test_a_batch_without_examples_is_refused(batch, kind):
    with pytest.raises(ValueError, match=f"no tensor with a first axis in a batch of type {kind}, .* unknown; use"):
        num_examples(batch)
