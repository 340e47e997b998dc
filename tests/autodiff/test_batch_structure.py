"""The number of examples in a batch is that of all its tensors, or an argument, and never guessed."""

from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sketch.autodiff.batches import BatchStructure, num_examples

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Graphs:
    name: str
    nodes: Tensor


@dataclass(slots=True)
class Slots:
    nodes: Tensor


@dataclass
class Boxes:
    box: list[Tensor]
    box_scores: Tensor


class Encoding(UserDict):
    """As tokenizers return: a mapping, though no dict."""


class Unknown:
    """A batch of a class of one's own, as of a library for graphs."""

    def __init__(self, *tensors):
        self.tensors = tensors


X = torch.zeros(8, 3)
AGREE = {
    "tensor": X,
    "pair": (X, torch.zeros(8)),
    "list": [X, X],
    "named tuple": Pair("label", X),
    "dict": {"x": X, "y": torch.zeros(8)},
    "nested": {"text": ["a"] * 8, "inputs": ({"ids": X},)},
    "scalar first": (torch.tensor(1.0), X),
    "number first": (3, None, X),
    "dataclass": Graphs("g", X),
    "dataclass with slots": Slots(X),
    "arrays": {"x": np.zeros((8, 2)), "y": X},
    "encoding": Encoding(input_ids=X, labels=torch.zeros(8)),
    "text of another length": (["a", "b"], X),
    "one for all": {"input_ids": X, "position_ids": torch.zeros(1, 3)},
    "as many labels in a list": {"x": X, "y": [torch.tensor(1.0)] * 8},
    "text alone": {"text": ["a"] * 8, "name": "train"},
}

DISAGREE = {
    "time first": ((torch.zeros(10, 8, 3), torch.zeros(8)), r"\[0\] has 10, \[1\] has 8"),
    "named": ({"x": X, "table": torch.zeros(3, 8)}, r"\['x'\] has 8, \['table'\] has 3"),
    "inside": (Graphs("g", [X, torch.zeros(5)]), r"nodes\[0\] has 8, nodes\[1\] has 5"),
    "ragged": ([torch.zeros(7, 3), torch.zeros(5, 3)], r"\[0\] has 7, \[1\] has 5"),
    "detection": (((torch.zeros(3, 9, 9),), ({"boxes": torch.zeros(2, 4)},)), r"has 3, \[1\]\[0\]\['boxes'\] has 2"),
}


@pytest.mark.parametrize("batch", AGREE.values(), ids=AGREE)
def test_the_first_axis_that_all_tensors_share_counts(batch):
    assert num_examples(batch) == 8


@pytest.mark.parametrize(("batch", "named"), DISAGREE.values(), ids=DISAGREE)
def test_tensors_that_disagree_are_refused_by_name(batch, named):
    with pytest.raises(ValueError, match=f"disagree about its number of examples along axis 0: .*{named}.*; pass num_"):
        num_examples(batch)


@pytest.mark.parametrize(("batch", "_"), DISAGREE.values(), ids=DISAGREE)
def test_an_argument_decides(batch, _):
    assert BatchStructure(num_examples=lambda batch: 4).count(batch) == 4
    assert BatchStructure(split_fn=lambda batch: ["a", "b"]).count(batch) == 2


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (torch.tensor(1.0), "Tensor"),
        ({"loss": torch.tensor(1.0)}, "dict"),
        ((), "tuple"),
        (3, "int"),
        ("text", "str"),
        (Unknown(X), "Unknown"),
    ],
)
def test_a_batch_without_examples_is_refused(batch, kind):
    with pytest.raises(ValueError, match=rf"in a batch of type {kind}, .* unknown; use .* num_examples=lambda"):
        num_examples(batch)


def test_time_may_come_first():
    """Sequences lie along the second axis, tensors with one axis along that; both are split."""
    x, y, table = torch.arange(80.0).view(10, 4, 2), torch.arange(4), torch.zeros(6, 7)
    structure = BatchStructure(batch_dim=1)
    assert structure.count({"x": x, "y": y}) == 4
    parts = list(structure.parts({"x": x, "y": y}, 3))
    assert [count for _, count in parts] == [3, 1]
    assert torch.equal(torch.cat([part["x"] for part, _ in parts], 1), x)
    assert torch.equal(torch.cat([part["y"] for part, _ in parts]), y)
    with pytest.raises(ValueError, match=r"along axis 1: \[0\] has 4, \[1\] has 6"):
        BatchStructure(batch_dim=1).count((x, table))


def test_a_number_is_searched_for_and_a_smaller_last_batch_has_its_own():
    structure = BatchStructure(num_examples=8)
    assert structure.count((X, torch.zeros(5))) == 8
    assert structure.count((X[:5], torch.zeros(5))) == 5
    with pytest.raises(ValueError, match="disagree"):
        structure.count((X[:5], torch.zeros(6)))


LISTS = {
    "images": ([torch.full((3, 4, 4 + i), float(i)) for i in range(4)], lambda part: [int(t[0, 0, 0]) for t in part]),
    "sequences": ([torch.full((2 + i,), float(i)) for i in range(4)], lambda part: [int(t[0]) for t in part]),
    "detection": (
        (tuple(torch.full((3, 2, 2), float(i)) for i in range(4)), [{"boxes": torch.zeros(i, 4)} for i in range(4)]),
        lambda part: [(int(t[0, 0, 0]), len(d["boxes"])) for t, d in zip(*part, strict=True)],
    ),
    "two of detection": (
        (tuple(torch.full((3, 2, 2), float(i)) for i in range(2)), [{"boxes": torch.zeros(i, 4)} for i in range(2)]),
        lambda part: [(int(t[0, 0, 0]), len(d["boxes"])) for t, d in zip(*part, strict=True)],
    ),
    "dicts": ([{"x": torch.full((4,), float(i))} for i in range(4)], lambda part: [int(d["x"][0]) for d in part]),
    "text beside tensors": (
        {"text": list("abcd"), "ids": torch.arange(4), "source": ("w", "x", "y", "z")},
        lambda part: list(zip(part["text"], part["ids"].tolist(), part["source"], strict=True)),
    ),
    "arrays": ({"x": np.arange(8).reshape(4, 2)}, lambda part: part["x"][:, 0].tolist()),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("batch", "seen"), LISTS.values(), ids=LISTS)
def test_the_items_of_lists_of_that_length_are_examples(batch, seen, size):
    everything = seen(batch)
    structure = BatchStructure(num_examples=lambda batch: len(seen(batch)))
    parts = list(structure.parts(batch, size))
    assert [item for part, _ in parts for item in seen(part)] == everything
    assert sum(count for _, count in parts) == len(everything)


def test_len_says_that_the_batch_is_a_list_of_examples():
    """Also where they all happen to be as long as the list."""
    batch = [torch.full((4, 2), float(i)) for i in range(4)]
    parts = list(BatchStructure(num_examples=len).parts(batch, 3))
    assert [[float(t[0, 0]) for t in part] for part, _ in parts] == [[0, 1, 2], [3]]
    assert all(t.shape == (4, 2) for part, _ in parts for t in part)


def three(shape=(3, 8, 8)):
    return [torch.full(shape, float(i)) for i in range(3)]


def test_what_an_earlier_batch_showed_decides_where_a_batch_may_be_read_in_two_ways():
    """Three images of three channels: a list of examples, or three tensors with three examples each."""
    in_a_list = BatchStructure(num_examples=lambda batch: len(batch["x"]))
    list(in_a_list.parts({"x": [torch.zeros(3, 8, 8)] * 5}, 1))
    parts = [part["x"] for part, _ in in_a_list.parts({"x": three()}, 1)]
    assert [(len(part), float(part[0].max())) for part in parts] == [(1, 0), (1, 1), (1, 2)]
    collated = BatchStructure(num_examples=lambda batch: len(batch["x"][0]))
    list(collated.parts({"x": three((8, 4))}, 1))
    parts = [part["x"] for part, _ in collated.parts({"x": three((3, 4))}, 1)]
    assert [(len(part), tuple(part[0].shape)) for part in parts] == [(3, (1, 4))] * 3
    unknown = BatchStructure(num_examples=lambda batch: 3)
    with pytest.raises(ValueError, match=r"a list of 3 tensors, each with an axis of 3, .*; pass num_examples=len"):
        list(unknown.parts({"x": three()}, 1))


def test_lists_that_grow_and_shrink_are_refused():
    """One image in a batch, then five: each has a first axis of three channels, which would pass for examples."""
    structure = BatchStructure()
    structure.count([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match=r"a list of 2 tensors, where the one before it had 1.*num_examples=len"):
        structure.count([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)])


def test_pairs_of_batches_of_other_sizes_are_no_such_lists():
    structure = BatchStructure()
    assert [structure.count([X[:n], torch.zeros(n)]) for n in (8, 8, 3)] == [8, 8, 3]


def test_a_batch_that_cannot_be_split_is_refused():
    structure = BatchStructure(num_examples=lambda batch: 2)
    with pytest.raises(ValueError, match=r"gives 2 for a batch of type Unknown, .*; pass split_fn"):
        list(structure.parts(Unknown(X), 1))
    with pytest.raises(ValueError, match="need num_examples >= 1, got 0"):
        BatchStructure(num_examples=0)
    with pytest.raises(ValueError, match="need batch_dim >= 0, got -1"):
        BatchStructure(batch_dim=-1)


def test_a_function_may_split_a_batch():
    structure = BatchStructure(split_fn=lambda batch: [Unknown(row) for row in batch.tensors[0]])
    parts = list(structure.parts(Unknown(X), 3))
    assert len(parts) == 8
    assert all(count == 1 and len(part.tensors[0]) == 3 for part, count in parts)


def images(*heights, channels=3):
    return [torch.zeros(channels, h, 7) for h in heights]


@pytest.mark.parametrize("batch", [images(8, 9), images(8, 8, 8, 8, 8), {"x": images(8, 9, channels=1)}])
def test_a_likely_list_of_images_is_refused(batch):
    """Their first axis, of channels, would pass for examples."""
    with pytest.raises(ValueError, match=r"may be one of images; pass num_examples=len"):
        BatchStructure().count(batch)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(3, 5, 2), torch.zeros(3, 5, 4)),
        [torch.zeros(3, 8, 8, 3)] * 3,
        {"views": images(8, 9), "labels": torch.zeros(3)},
        [torch.zeros(3, 8), torch.zeros(3)],
    ],
    ids=["sequences", "SimCLR", "beside labels", "pair"],
)
def test_what_is_collated_is_not(batch):
    assert BatchStructure().count(batch) == 3


def test_a_loader_whose_first_batches_are_large_shows_that_its_lists_are_collated():
    structure = BatchStructure()
    assert [structure.count([torch.zeros(n, 8, 2), torch.zeros(n, 9, 2)]) for n in (32, 3)] == [32, 3]


def test_lists_beside_tensors_may_be_of_any_length():
    """Labels in a list, views of which there are more or fewer, targets as mappings."""
    structure = BatchStructure()
    for n, views in ((4, 2), (4, 6), (2, 3)):
        batch = {
            "x": torch.zeros(n, 3),
            "y": [torch.tensor(1.0)] * n,
            "views": [torch.zeros(n, 5)] * views,
            "targets": [{"id": torch.tensor(1)}] * n,
        }
        assert structure.count(batch) == n
        assert [len(part["y"]) for part, _ in structure.parts(batch, 1)] == [1] * n


def test_a_field_whose_name_begins_with_that_of_a_list_is_beside_it():
    structure = BatchStructure()
    for length in (2, 3):
        batch = Boxes([torch.zeros(8, 4)] * length, torch.zeros(8))
        assert structure.count(batch) == 8
        first, _ = next(structure.parts(batch, 5))
        assert len(first.box) == length
        assert first.box[-1].shape == (5, 4)


def test_numbers_of_the_examples_are_split_with_them_and_sizes_are_not():
    structure = BatchStructure()
    batch = {"x": torch.arange(8.0), "w": list(range(8)), "size": [32, 32]}
    assert [(part["w"], part["size"]) for part, _ in structure.parts(batch, 4)] == [
        ([0, 1, 2, 3], [32, 32]),
        ([4, 5, 6, 7], [32, 32]),
    ]
    small = {"x": torch.arange(2.0), "w": [0, 1], "size": [32, 32]}
    assert [(part["w"], part["size"]) for part, _ in structure.parts(small, 1)] == [([0], [32, 32]), ([1], [32, 32])]
    with pytest.raises(ValueError, match=r"a list of 2 numbers, in a batch of 2 examples, is ambiguous: one item"):
        list(BatchStructure().parts(small, 1))


def test_an_axis_of_time_is_not_one_of_examples():
    """Time stamps beside sequences disagree; a square mask may be read in two ways."""
    x, stamps = torch.zeros(9, 4, 3), torch.arange(9.0)
    with pytest.raises(ValueError, match=r"along axis 1: \[0\] has 4, \[1\] has 9"):
        BatchStructure(batch_dim=1).count((x, stamps))
    told = BatchStructure(num_examples=lambda batch: batch[0].shape[1], batch_dim=1)
    assert [(part[0].shape[1], len(part[1])) for part, _ in told.parts((x, stamps), 2)] == [(2, 9), (2, 9)]
    square = torch.zeros(4, 4, 3), torch.ones(4, 4)
    with pytest.raises(ValueError, match="may have its 4 examples along either axis"):
        list(BatchStructure(batch_dim=1).parts(square, 1))
    known = BatchStructure(batch_dim=1)
    list(known.parts((torch.zeros(5, 4, 3), torch.ones(4, 5)), 1))
    assert [part[1].shape for part, _ in known.parts(square, 1)] == [(1, 4)] * 4


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(5, 4, 3), torch.arange(4)), lambda batch: batch[0].shape[1]),
        (Graphs("g", torch.zeros(4, 2)), lambda batch: 4),
    ],
    ids=["time first", "constant"],
)
def test_a_number_that_differs_after_the_split_is_refused(batch, count):
    """Only the labels of a time-first batch would be split, and every example would have all sequences."""
    with pytest.raises(ValueError, match=r"num_examples gives 4 for a part of 1 of the 4 examples.*batch_dim=1"):
        list(BatchStructure(num_examples=count).parts(batch, 1))


def test_len_of_a_pair_of_lists_is_no_number_of_examples():
    batch = tuple(images(8, 9, 7)), tuple({"boxes": torch.zeros(i, 4)} for i in range(3))
    with pytest.raises(ValueError, match=r"len counts the 2 items of a batch, but these are .*len\(batch\[0"):
        BatchStructure(num_examples=len).count(batch)


def test_len_of_a_mapping_is_no_number_of_examples():
    with pytest.raises(
        ValueError, match=r"len counts the 2 keys of a mapping \(Encoding\), not examples; pass num_examples=lambda"
    ):
        BatchStructure(num_examples=len).count(Encoding(x=X, y=X))


def test_vmap_takes_tensors_alone():
    said = r"needs the examples in tensors, but \['t'\] is not one; use engine='loop'"
    for other in (np.zeros(4), list("abcd")):
        with pytest.raises(ValueError, match=said):
            BatchStructure().each({"x": torch.zeros(4, 2), "t": other})


def test_parts_are_of_the_kind_of_the_batch():
    """Also of default dictionaries, fields without init and sparse tensors, which items alone cannot rebuild."""

    @dataclass
    class Derived:
        x: Tensor
        total: Tensor = field(init=False)

        def __post_init__(self):
            self.total = self.x.sum(1)

    sparse = torch.eye(4).to_sparse()
    made = defaultdict(list, {"x": torch.arange(8.0).view(4, 2), "d": Derived(torch.eye(4)), "s": sparse})
    for i, (part, _) in enumerate(BatchStructure().parts(made, 1)):
        assert isinstance(part, defaultdict)
        assert part.default_factory is list
        assert torch.equal(part["x"], made["x"][i : i + 1])
        assert (len(part["d"].x), len(part["d"].total)) == (1, 1)
        assert torch.equal(part["s"].to_dense(), torch.eye(4)[i : i + 1])
    assert len(made["d"].x) == 4
