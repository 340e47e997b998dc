"""The k best of each query are those of the whole table of scores, whatever the size of blocks."""

import itertools
import weakref

import pytest
import torch
from rows import random_rows

from lightning_sketch.attribution import scores, top_k
from lightning_sketch.store.sketched_gradients import SketchedGradients

QUERY = random_rows(3, seed=1)


@pytest.mark.parametrize(("largest", "batch_rows"), list(itertools.product([True, False], [1, 7, 1000])))
def test_rows_are_ranked_as_in_the_whole_table(largest, batch_rows):
    train = random_rows(50, seed=2, example_id=torch.arange(50) + 100)
    best, place = scores(QUERY, train).topk(5, largest=largest)
    found = top_k(QUERY, train, 5, largest=largest, group=None, batch_rows=batch_rows)
    torch.testing.assert_close(found.scores, best)
    assert torch.equal(found.example_ids, place + 100)
    assert torch.equal(top_k(QUERY, train, 5, largest=largest).example_ids, place + 100)  # each once: nothing to sum


@pytest.mark.parametrize("largest", [True, False])
def test_rows_of_one_example_are_summed_before_they_are_ranked(largest):
    train = random_rows(50, seed=2, example_id=(torch.arange(50) * 7) % 20)
    best, place = scores(QUERY, train, group="example_id").topk(5, largest=largest)
    found = top_k(QUERY, train, 5, largest=largest, batch_rows=7)
    torch.testing.assert_close(found.scores, best)
    assert torch.equal(found.example_ids, place)
    rows = top_k(QUERY, train, 5, largest=largest, group=None)
    assert not torch.equal(found.example_ids, rows.example_ids)


@pytest.mark.parametrize("group", ["example_id", None])
def test_fewer_rows_than_k_give_fewer(group):
    assert top_k(QUERY, random_rows(2), 5, group=group, batch_rows=1).scores.shape == (3, 2)


def test_the_id_of_a_row_without_id_is_its_position_in_train():
    train = random_rows(6, seed=3, finite=torch.tensor([False, True, True, True, True, True]))
    assert sorted(top_k(QUERY, train, 5).example_ids[0].tolist()) == [1, 2, 3, 4, 5]


def test_the_id_of_a_training_step_without_id_is_its_step():
    train = random_rows(3, stage="fit", step=torch.tensor([10, 20, 30]), lr=0.1)
    found = top_k({0: QUERY}, train, 3, method="tracin").example_ids
    assert sorted(found[0].tolist()) == [10, 20, 30]


def test_some_ids_missing_is_refused():
    with pytest.raises(ValueError, match="1 of 2 rows have no example_id"):
        top_k(QUERY, random_rows(2, example_id=torch.tensor([3, -1])), 1)


@pytest.mark.parametrize("group", ["example_id", None])
def test_members_are_averaged(group):
    members = [random_rows(9, seed=s, example_id=torch.arange(9) + 5) for s in (1, 2)]
    best, place = scores([QUERY, QUERY], members).topk(4)
    found = top_k([QUERY, QUERY], members, 4, group=group, batch_rows=2)
    torch.testing.assert_close(found.scores, best)
    assert torch.equal(found.example_ids, place + 5)
    turned = [members[0], members[1].where(members[1].example_id > 5)]
    if group is None:
        with pytest.raises(ValueError, match="another order"):
            top_k([QUERY, QUERY], turned, 4, group=None)
    else:
        summed, place = scores([QUERY, QUERY], turned, group="example_id").topk(4)
        torch.testing.assert_close(top_k([QUERY, QUERY], turned, 4).scores, summed)


def test_a_sweep_and_a_k_of_zero_are_refused():
    with pytest.raises(ValueError, match="top_k takes one damping"):
        top_k(QUERY, random_rows(40), method="influence", curvature="fisher", damping=[0.1, 0.2])
    with pytest.raises(ValueError, match="need k >= 1, got 0"):
        top_k(QUERY, random_rows(4), 0)


def test_at_most_two_blocks_are_in_memory():
    alive = []

    class Endless:
        sketch = QUERY.sketch

        def __len__(self):
            return 10_000

        def metadata(self):
            return random_rows(10_000, sketches=torch.zeros(10_000, 16)).columns

        def where(self, mask=None, **equal):
            return self

        def blocks(self, batch_rows=4096):
            for start in range(0, 10_000, 500):
                block = random_rows(500, seed=start)
                alive.append(weakref.ref(block.sketches))
                yield block
                del block
                assert sum(block() is not None for block in alive) <= 2

    assert top_k(QUERY, Endless(), 3, group=None).scores.shape == (3, 3)
    assert len(alive) == 20


class InOtherFiles(SketchedGradients):
    """Rows whose blocks have other sizes, as those of a store with other files."""

    def blocks(self, batch_rows=4096):
        for part in (slice(0, 3), slice(3, 8), slice(8, 11)):
            yield SketchedGradients(self.sketches[part], self.sketch)


@pytest.mark.parametrize("batch_rows", [1, 2, 4, 7, 4096])
def test_members_of_a_list_may_be_read_in_blocks_of_other_sizes(batch_rows):
    one, other = random_rows(11, seed=1), random_rows(11, seed=2)
    members = [one, InOtherFiles(other.sketches, other.sketch)]
    queries = [random_rows(4, seed=3), random_rows(4, seed=4)]
    found = top_k(queries, members, k=5, batch_rows=batch_rows)
    best, place = scores(queries, members).topk(5)
    torch.testing.assert_close(found.scores, best)
    assert torch.equal(found.example_ids, place)
