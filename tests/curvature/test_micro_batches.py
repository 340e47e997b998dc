"""A batch cut into parts gives the same product; out of memory it is cut by itself, with a warning."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian

X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 2
V = torch.linspace(-1, 1, 8, dtype=torch.float64)
TOO_MANY_BYTES = 1 << 60


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2).double()


def cross_entropy(module, batch):
    return functional.cross_entropy(module(batch[0]), batch[1])


def fits(limit, seen=None):
    """A loss that asks the allocator for far too much where a graph is made of more examples than that."""

    def loss_fn(module, batch):
        if seen is not None:
            seen.append(len(batch[0]))
        if len(batch[0]) > limit and torch.is_grad_enabled():
            torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
        return cross_entropy(module, batch)

    return loss_fn


KINDS = {
    "Hessian": lambda **options: Hessian(cross_entropy, network(), [(X[:9], Y[:9]), (X[9:], Y[9:])], **options),
    "GGN": lambda **options: GGN(network(), [(X[:9], Y[:9]), (X[9:], Y[9:])], **options),
    "Fisher": lambda **options: EmpiricalFisher(cross_entropy, network(), [(X, Y)], **options),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("size", [1, 2, 5, 12, 100])
def test_parts_make_up_the_whole(make, size):
    whole, cut = make(), make(micro_batch_size=size)
    torch.testing.assert_close(cut.matvec(V), whole.matvec(V))
    torch.testing.assert_close(cut.gradient(), whole.gradient())
    assert cut.loss() == pytest.approx(whole.loss(), rel=1e-12)


def test_no_part_is_larger_than_asked_for():
    seen = []
    h = Hessian(fits(12, seen), network(), [(X[:7], Y[:7]), (X[7:], Y[7:])], micro_batch_size=3)
    h.matvec(V)  # checks that the batch may be cut
    seen.clear()
    h.matvec(V)
    assert seen == [3, 3, 1, 3, 2]


@pytest.mark.parametrize(("limit", "sizes"), [(12, []), (6, [6]), (5, [6, 3]), (1, [6, 3, 1])])
def test_out_of_memory_parts_are_halved_until_they_fit(limit, sizes):
    """There is a warning each time; the sum starts again, so that nothing is counted twice."""
    whole, seen = Hessian(cross_entropy, network(), [(X, Y)]), []
    h = Hessian(fits(limit, seen), network(), [(X, Y)])
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        got = h.matvec(V)
    torch.testing.assert_close(got, whole.matvec(V))
    assert [re.search(r"going on with micro_batch_size=(\d+)", str(w.message))[1] for w in met] == [
        str(s) for s in sizes
    ]
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close([h.matvec(V), h.gradient()], [whole.matvec(V), whole.gradient()])
    assert max(seen) <= limit  # what has been learnt stays


def test_the_largest_of_several_batches_tells_the_size():
    h = Hessian(fits(6), network(), [(X[:4], Y[:4]), (X[4:], Y[4:])])
    with pytest.warns(UserWarning, match=r"out of memory with 8 examples at once; going on with micro_batch_size=4\."):
        got = h.matvec(V)
    torch.testing.assert_close(got, Hessian(cross_entropy, network(), [(X, Y)]).matvec(V))


@pytest.mark.parametrize("call", [lambda h: h.loss(), lambda h: h.gradient()], ids=["loss", "gradient"])
def test_so_are_those_of_a_loss_or_gradient(call):
    h, whole = (Hessian(loss_fn, network(), [(X, Y)]) for loss_fn in (fits(6), cross_entropy))
    with pytest.warns(UserWarning, match="out of memory with 12 examples"):
        got = call(h)
    torch.testing.assert_close(got, call(whole))


def test_memory_may_run_out_at_a_later_product():
    limit = 12

    def loss_fn(module, batch):
        return fits(limit)(module, batch)

    h = Hessian(loss_fn, network(), [(X[:6], Y[:6]), (X[6:], Y[6:])])
    with h.hold():
        first, limit = h.matvec(V), 3
        with pytest.warns(UserWarning, match="micro_batch_size=3"):
            torch.testing.assert_close(h.matvec(V), first)


def test_one_example_that_is_too_large_is_the_end():
    h = Hessian(fits(0), network(), [(X[:2], Y[:2])])
    with pytest.warns(UserWarning, match="micro_batch_size=1"), pytest.raises(RuntimeError, match=r"allocate|memory"):
        h.matvec(V)


def test_other_errors_do_not_cut():
    def loss_fn(module, batch):
        raise RuntimeError("a shape does not fit")

    h = Hessian(loss_fn, network(), [(X, Y)])
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        h.matvec(V)
    assert h.batches.micro_batch_size is None


def test_weighted_by_its_labels_a_mean_over_tokens_may_be_cut():
    """Weighted by examples, parts with few labels would count too much, which is refused."""
    x, y = X.view(4, 3, 3), torch.tensor([[0, 1, -100], [1, -100, -100], [0, 0, 1], [1, 1, 0]])

    def by_token(module, batch):
        return functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    for make in (lambda **o: Hessian(by_token, network(), [(x, y)], **o), lambda **o: GGN(network(), [(x, y)], **o)):
        whole, cut, wrong = make(), make(micro_batch_size=1, weight_fn=num_labels), make(micro_batch_size=1)
        torch.testing.assert_close(cut.matvec(V), whole.matvec(V))
        with pytest.raises(ValueError, match=r"is not the weighted mean .* cannot be cut; pass weight_fn \(num_labels"):
            wrong.matvec(V)


def test_batches_made_in_inference_mode_are_used():
    with torch.inference_mode():
        batch = X.clone(), Y.clone()
    got = Hessian(cross_entropy, network(), [batch], micro_batch_size=5).matvec(V)
    torch.testing.assert_close(got, Hessian(cross_entropy, network(), [(X, Y)]).matvec(V))


def test_strings_are_cut_with_the_tensors():
    """Each text is in the same part as its row."""
    batch, seen = {"x": X, "text": [str(float(row[0])) for row in X]}, []

    def loss(module, batch):
        seen.append([str(float(row[0])) for row in batch["x"]] == list(batch["text"]))
        return module(batch["x"]).square().mean()

    cut, whole = (Hessian(loss, network(), [batch], micro_batch_size=size) for size in (5, None))
    torch.testing.assert_close(cut.matvec(V), whole.matvec(V))
    assert all(seen)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"need micro_batch_size >= 1, got {size}"):
        KINDS["Hessian"](micro_batch_size=size)
