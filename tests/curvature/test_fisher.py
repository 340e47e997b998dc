"""The empirical Fisher matrix is the mean of the outer products of the examples' gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.curvature import EmpiricalFisher, spectrum

X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 2, 0, 0])


def network(*more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), *more, nn.Tanh(), nn.Linear(4, 3)).double()


def losses(module, batch):
    x, y = batch
    return functional.cross_entropy(module(x), y, reduction="none")


def mean_loss(module, batch):
    return losses(module, batch).mean()


def summed(module, batch):
    return losses(module, batch).sum()


def gradients(module, batch):
    """Return a gradient for each example as rows, each by its own backward pass."""
    rows = (torch.autograd.grad(loss, list(module.parameters()), retain_graph=True) for loss in losses(module, batch))
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def dense(operator):
    with operator.hold():
        return operator.as_matrix(dtype=torch.float64)


@pytest.mark.parametrize("loss_fn", [losses, mean_loss], ids=["one each", "their mean"])
@pytest.mark.parametrize("sizes", [[7], [4, 3], [1, 6]], ids=str)
def test_it_is_the_mean_outer_product_of_gradients(loss_fn, sizes):
    module = network()
    g = gradients(module, (X, Y))
    f = EmpiricalFisher(loss_fn, module, list(zip(X.split(sizes), Y.split(sizes), strict=True)))
    torch.testing.assert_close(dense(f), g.T @ g / len(X))
    assert f.loss() == pytest.approx(mean_loss(module, (X, Y)).item(), rel=1e-12)
    torch.testing.assert_close(f.gradient(), g.mean(0))


@pytest.mark.parametrize("loss_fn", [losses, mean_loss], ids=["one each", "their mean"])
def test_a_batch_that_is_cut_gives_the_same(loss_fn):
    module, v = network(), torch.linspace(-1, 1, 31, dtype=torch.float64)
    whole, cut = (EmpiricalFisher(loss_fn, module, [(X, Y)], micro_batch_size=size) for size in (None, 3))
    torch.testing.assert_close(cut.matvec(v), whole.matvec(v))


def test_its_eigenvalues_are_those_of_the_small_gram_matrix():
    """The rank is at most the number of examples, and no eigenvalue is negative."""
    module = network()
    g = gradients(module, (X, Y))
    gram = torch.linalg.eigvalsh(g @ g.T / len(X)).flip(0)
    sp = spectrum(EmpiricalFisher(losses, module, [(X, Y)]), top_k=7, bottom_k=0)
    torch.testing.assert_close(sp.top(7), gram, rtol=1e-8, atol=1e-12)
    assert sp.rneg <= sp.rneg_error  # what is left over is rounding, blown up


def test_at_a_perfect_fit_it_vanishes():
    """Unlike the Hessian: squared errors of zero have gradient zero."""
    module = network()
    f = EmpiricalFisher(lambda module, batch: (module(batch) - module(batch).detach()).square().sum(-1), module, [X])
    assert not dense(f).any()


def test_parameters_may_be_chosen():
    module = network()
    g = gradients(module, (X, Y))[:, 16:]
    torch.testing.assert_close(dense(EmpiricalFisher(losses, module, [(X, Y)], parameters="2.*")), g.T @ g / len(X))


def test_examples_may_weigh_as_many_labels_as_they_have():
    """The gradient of an example is that of the mean over its own labels."""
    module, y = network(), torch.tensor([[0, 1], [2, -100], [1, 1]])
    x = X[:6].view(3, 2, 3)

    def by_example(module, batch):
        rows = zip(module(batch[0]), batch[1], strict=True)
        return torch.stack([functional.cross_entropy(z, y) for z, y in rows])

    rows = [EmpiricalFisher(by_example, module, [(x[i : i + 1], y[i : i + 1])]) for i in range(3)]
    v = torch.linspace(-1, 1, 31, dtype=torch.float64)
    expected = (2 * rows[0].matvec(v) + rows[1].matvec(v) + 2 * rows[2].matvec(v)) / 5
    f = EmpiricalFisher(by_example, module, list(zip(x.split(1), y.split(1), strict=True)), weight_fn=num_labels)
    torch.testing.assert_close(f.matvec(v), expected)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_loss_that_is_summed_is_refused(batches):
    f = EmpiricalFisher(summed, network(), [(X, Y)] * batches)
    with pytest.raises(
        ValueError, match=r"of the batch, [\d.]+, is not the mean of the losses of its examples, [\d.]+"
    ):
        f.matvec(torch.ones(31, dtype=torch.float64))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_loss_that_couples_the_examples_is_refused(batches):
    """The loss is of pairs within the batch, and a single example has no pairs."""

    def contrastive(module, batch):
        z = module(batch[0])
        return functional.cross_entropy(z @ z.T, torch.arange(len(z)))

    f = EmpiricalFisher(contrastive, network(), [(X, Y)] * batches)
    with pytest.raises(ValueError, match=r"so these have no gradients of their own; return one loss each"):
        f.matvec(torch.ones(31, dtype=torch.float64))


def test_a_loss_over_the_statistics_of_the_batch_is_refused():
    f = EmpiricalFisher(mean_loss, network(nn.BatchNorm1d(4)).train(), [(X, Y)], mode="train")
    with pytest.raises(ValueError, match=r"not the mean of the losses|Expected more than 1 value per channel"):
        f.matvec(torch.ones(39, dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda module, batch: module(batch[0]), r"a tensor of shape \(7, 3\)"),
        (lambda module, batch: losses(module, batch)[:3], r"a tensor of shape \(3,\)"),
        (lambda module, batch: mean_loss(module, batch).item(), "a float"),
    ],
    ids=["matrix", "fewer", "float"],
)
def test_what_is_neither_losses_nor_their_mean(untyped, loss_fn, got):
    f = EmpiricalFisher(loss_fn, network(), [(X, Y)])
    with pytest.raises(ValueError, match=f"returns the losses of 7 examples, or their mean; got {got}"):
        f.matvec(torch.ones(31, dtype=torch.float64))


def test_losses_cut_off_from_the_parameters():
    for cut in (torch.no_grad()(losses), lambda module, batch: losses(module, batch).detach()):
        f = EmpiricalFisher(cut, network(), [(X, Y)])
        with pytest.raises(ValueError, match=r"does not depend on the parameters 0\.weight.*no_grad"):
            f.matvec(torch.ones(31, dtype=torch.float64))
