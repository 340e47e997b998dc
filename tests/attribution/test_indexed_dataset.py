"""Rows have the ids of their examples, whatever the order of the loader."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from lightning_sketch.attribution import Indexed, IndexedDataset, batch_ids, indexed
from lightning_sketch.attribution.indexed_dataset import without_index

DATA = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_are_right_under_shuffling_and_workers(workers):
    for batch in indexed(DataLoader(IndexedDataset(DATA), batch_size=6, shuffle=True, num_workers=workers)):
        assert isinstance(batch, Indexed)
        x, y = without_index(batch)
        assert torch.equal(x[:, 0].long(), batch_ids(batch, None))
        assert torch.equal(y, batch_ids(batch, None) % 3)


def test_elsewhere_it_is_the_data_set_itself():
    """Items, and batches of a loader of one's own, with persistent workers too, are those of the original data set."""
    data = IndexedDataset(DATA)
    assert data[3][0].item() == 3.0
    loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)
    for batches in (loader, loader):
        assert [type(batch) for batch in batches] == [list] * 3
    assert [batch.index.tolist() for batch in indexed(loader)][2] == [16, 17, 18, 19]
    assert [type(batch) for batch in loader] == [list] * 3


def test_any_collate_function_gets_the_plain_items():
    def collate(items):
        return {"sum": torch.stack([x for x, _ in items]).sum(), "count": len(items)}

    batches = list(indexed(DataLoader(IndexedDataset(DATA), batch_size=8, collate_fn=collate)))
    assert [batch.item["count"] for batch in batches] == [8, 8, 4]
    assert batches[1].index.tolist() == list(range(8, 16))


def test_a_loader_that_does_not_batch_is_said_to_lose_the_indices():
    loader = DataLoader(IndexedDataset(DATA), batch_size=None)
    with pytest.warns(UserWarning, match="batch_size=None"):
        assert indexed(loader) is loader


def test_a_part_of_it_keeps_the_indices_of_the_whole():
    part = Subset(Subset(IndexedDataset(DATA), range(4, 20, 2)), [5, 1])
    (batch,) = indexed(DataLoader(part, batch_size=4))
    assert batch.index.tolist() == [14, 6] == batch.item[0][:, 0].tolist()


def test_a_data_set_that_streams_and_parts_with_equal_indices_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(3)

    with pytest.raises(TypeError, match=r"got a Stream, which has none.*index_key"):
        IndexedDataset(Stream())
    parts = ConcatDataset([IndexedDataset(DATA), IndexedDataset(DATA)])
    with pytest.raises(ValueError, match=r"use IndexedDataset\(ConcatDataset"):
        indexed(DataLoader(parts, batch_size=4))
    (batch,) = indexed(DataLoader(IndexedDataset(ConcatDataset([DATA, DATA])), batch_size=40))
    assert batch.index.tolist() == list(range(40))


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


@pytest.mark.parametrize("left", [False, True])
def test_a_hash_of_a_text_does_not_depend_on_its_padding(left):
    ids, mask = torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.long)
    pad = (2, 0) if left else (0, 2)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1])}
    padded = {key: torch.nn.functional.pad(batch[key], pad) for key in ("input_ids", "attention_mask")}
    assert torch.equal(batch_ids(batch, "hash"), batch_ids({**padded, "labels": torch.tensor([1])}, "hash"))
    assert not torch.equal(batch_ids(batch, "hash"), batch_ids({**padded, "labels": torch.tensor([2])}, "hash"))


def test_without_any_way_ids_are_unknown():
    assert batch_ids((torch.zeros(3, 2),), None).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("batch", "key", "words"),
    [
        ({"x": torch.zeros(2, 3)}, "idx", "'idx' is not in the batch, which has x"),
        ((torch.zeros(2, 3),), 4, "4 is not in the batch, which is a tuple of 1 items"),
        ({"x": torch.zeros(2, 3), "idx": torch.zeros(2)}, "idx", "float32 and shape"),
        ({"x": torch.zeros(2, 3), "idx": torch.tensor([1])}, "idx", "2 examples, each needs one whole number"),
        ({"x": torch.zeros(1, 3), "idx": torch.tensor([2**63], dtype=torch.uint64)}, "idx", "int64 cannot hold"),
    ],
)
def test_a_key_without_ids_is_refused(batch, key, words):
    with pytest.raises(ValueError, match=words):
        batch_ids(batch, key)
