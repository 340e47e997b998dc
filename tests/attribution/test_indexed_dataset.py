"""Rows have the ids of their examples, whatever the order of the loader."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch.attribution import IndexedDataset, batch_ids
from lightning_sketch.attribution.indexed_dataset import Indexed, without_index

DATA = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_indexes_are_right_under_shuffling_and_workers(workers):
    for batch in DataLoader(IndexedDataset(DATA), batch_size=6, shuffle=True, num_workers=workers):
        assert isinstance(batch, Indexed)
        x, y = without_index(batch)
        assert torch.equal(x[:, 0].long(), batch_ids(batch, None))
        assert torch.equal(y, batch_ids(batch, None) % 3)


def test_a_key_of_the_batch_or_a_place():
    ids = torch.tensor([5, 3])
    assert batch_ids({"x": torch.zeros(2, 3), "idx": ids}, "idx").tolist() == [5, 3]
    assert batch_ids((torch.zeros(2, 3), ids), 1).tolist() == [5, 3]
    assert batch_ids({"x": torch.zeros(2, 3), "idx": [7, 8]}, "idx").tolist() == [7, 8]


def test_a_hash_is_that_of_the_contents():
    """Equal examples have equal ids, in any batch and order; a changed bit or label gives another; 63 bits."""
    x, y = DATA[:8]
    ids = batch_ids((x, y), "hash")
    order = torch.tensor([3, 0, 7])
    assert torch.equal(batch_ids((x[order], y[order]), "hash"), ids[order])
    assert len(ids.unique()) == 8
    assert ids.min() >= 0
    assert not (batch_ids((x, y + 1), "hash") == ids).any()


def test_without_any_way_ids_are_unknown():
    assert batch_ids((torch.zeros(3, 2),), None).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("batch", "key", "words"),
    [
        ({"x": torch.zeros(2, 3)}, "idx", "'idx' is not in the batch, which has x"),
        ((torch.zeros(2, 3),), 4, "4 is not in the batch, which has a tuple"),
        ({"x": torch.zeros(2, 3), "idx": torch.zeros(2)}, "idx", "float32 and shape"),
        ({"x": torch.zeros(2, 3), "idx": torch.tensor([1])}, "idx", "2 examples, each needs one whole number"),
    ],
)
def test_a_key_without_ids_is_refused(batch, key, words):
    with pytest.raises(ValueError, match=words):
        batch_ids(batch, key)
