"""Batches that are no rows of one tensor: weighted and cut by their examples, by an argument, or refused."""

import pytest
import torch
from marks import pairs, slow
from torch import nn

from lightning_sketch import GGN, EmpiricalFisher, Hessian


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(inputs=3, outputs=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


class Graphs:
    """A class of one's own, whose first tensor has an axis of nodes."""

    def __init__(self, x, owner, y):
        self.x, self.owner, self.y = x, owner, y


def graphs(*nodes):
    owner = torch.repeat_interleave(torch.arange(len(nodes)), torch.tensor(nodes))
    return Graphs(normal(sum(nodes), 3, seed=sum(nodes)), owner, normal(len(nodes), 2, seed=7))


def of_graphs(module, batch):
    pooled = torch.zeros(len(batch.y), 2, dtype=torch.float64).index_add(0, batch.owner, module(batch.x))
    return (pooled - batch.y).square().mean()


def of_list(module, batch):
    return torch.stack([module(x).tanh().square().mean() for x in batch]).mean()


def of_detection(module, batch):
    images, targets = batch
    each = [(module(x.mean((1, 2))) - t["boxes"].mean()).square().mean() for x, t in zip(images, targets, strict=True)]
    return torch.stack(each).mean()


def detection(*boxes):
    images = tuple(normal(3, 5 + n, 4, seed=n) for n in boxes)
    return images, tuple({"boxes": normal(n, 4, seed=n)} for n in boxes)


def of_time_first(module, batch):
    x, y = batch
    return (module(x).mean(0) - y).square().mean()


def time_first(examples, steps=6):
    return normal(steps, examples, 3, seed=examples), normal(examples, 2, seed=1)


CASES = {
    "ragged": (of_list, [[normal(70, 3)], [normal(t, 3, seed=t) for t in (2, 3, 2, 4, 2)]], [1, 5], len),
    "images": (of_list, [[normal(8, 3)], [normal(8, 3, seed=t) for t in range(5)]], [1, 5], len),
    "detection": (of_detection, [detection(2), detection(1, 3, 2, 4)], [1, 4], lambda b: len(b[0])),
    "graphs": (of_graphs, [graphs(3, 2), graphs(4, 4, 1, 2, 2)], [2, 5], lambda b: len(b.y)),
}
cases = pytest.mark.parametrize(("loss", "batches", "counts", "count"), CASES.values(), ids=CASES)


def truth(loss, batches, counts):
    matrices = [Hessian(loss, net(), [batch]).as_matrix() for batch in batches]
    return sum(n * matrix for n, matrix in zip(counts, matrices, strict=True)) / sum(counts)


@cases
def test_a_guess_is_refused(loss, batches, counts, count):
    with pytest.raises(ValueError, match="num_examples="):
        Hessian(loss, net(), batches).as_matrix()


@cases
@pytest.mark.parametrize("argument", ["num_examples", slow("weight_fn")])
def test_an_argument_weighs_them(loss, batches, counts, count, argument):
    found = Hessian(loss, net(), batches, **{argument: count}).as_matrix()
    torch.testing.assert_close(found, truth(loss, batches, counts))


@cases
def test_a_batch_alone_needs_no_weight(loss, batches, counts, count):
    assert Hessian(loss, net(), batches[1:]).as_matrix().isfinite().all()


@pytest.mark.parametrize(("name", "size"), pairs(["ragged", "images", "detection"], [1, 2, 3]))
def test_lists_are_cut_by_their_items(name, size):
    loss, batches, counts, count = CASES[name]
    found = Hessian(loss, net(), batches, num_examples=count, micro_batch_size=size).as_matrix()
    torch.testing.assert_close(found, truth(loss, batches, counts))


def test_a_weight_alone_does_not_say_how_to_cut():
    """Five sequences of three steps: cut along time, each part would weigh five."""
    batches = [[normal(3, 3, seed=t) for t in range(5)]] * 2
    with pytest.raises(
        ValueError, match=r"weight_fn gives 5 for a batch and 10 for its 2 parts together.*num_examples"
    ):
        Hessian(of_list, net(), batches, weight_fn=len, micro_batch_size=2).as_matrix()


def test_what_is_of_no_known_kind_is_not_cut():
    loss, batches, _, count = CASES["graphs"]
    with pytest.raises(ValueError, match="for a batch of type Graphs, in which no tensor has this length"):
        Hessian(loss, net(), batches, num_examples=count, micro_batch_size=2).as_matrix()


def test_time_may_come_first():
    """Three and five sequences of six steps: weighted, cut, and refused unless the axis is given."""
    batches = [time_first(3), time_first(5)]
    expected = truth(of_time_first, batches, [3, 5])
    for size in (None, 2):
        found = Hessian(of_time_first, net(), batches, batch_dim=1, micro_batch_size=size).as_matrix()
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"\[0\] has 6, \[1\] has 3; pass num_examples=.*batch_dim=1"):
        Hessian(of_time_first, net(), batches).as_matrix()


@pytest.mark.slow
def test_every_curvature_takes_the_arguments():
    """A table beside the rows is passed to every part."""
    table = normal(3, 2, seed=5)
    batches = [{"x": normal(n, 3, seed=n), "table": table, "labels": torch.arange(n) % 2} for n in (2, 6)]

    def call(module, batch):
        return module(batch["x"] + batch["table"].sum())

    def each(module, batch):
        return nn.functional.cross_entropy(call(module, batch), batch["labels"], reduction="none")

    options = {"num_examples": lambda batch: len(batch["x"])}
    for make in (
        lambda **more: GGN(net(), batches, call, **options, **more),
        lambda **more: EmpiricalFisher(each, net(), batches, **options, **more),
        lambda **more: Hessian(lambda m, b: each(m, b).mean(), net(), batches, **options, **more),
    ):
        torch.testing.assert_close(make(micro_batch_size=2).as_matrix(), make().as_matrix())
    with pytest.raises(ValueError, match=r"\['x'\] has 2, \['table'\] has 3"):
        GGN(net(), batches, call).as_matrix()


def test_out_of_memory_a_batch_of_unknown_size_is_not_halved():
    batch = graphs(3, 2)

    def loss(module, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Hessian(loss, net(), [batch, batch], weight_fn=lambda b: len(b.y)).matvec(torch.ones(26, dtype=torch.float64))
