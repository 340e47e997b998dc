"""Sign and scale of scores, on problems where the truth can be computed: a positive score helps the query."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.attribution import fit_ggn, scores, sketch_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients

DECAY = 3e-2
DATA = torch.Generator().manual_seed(0)
X = torch.randn(310, 7, generator=DATA, dtype=torch.float64)
Y = (X[:, 0] + torch.randn(310, generator=DATA, dtype=torch.float64) > 0).long()
X_TEST, Y_TEST = X[300:].flip(1), Y[300:]
X, Y = X[:300], Y[:300]


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def test_losses(module):
    return F.cross_entropy(module(X_TEST), Y_TEST, reduction="none").detach()


test_losses.__test__ = False


def trained(keep):
    """Logistic regression, trained to convergence: its loss is the mean over the examples plus decay / 2 |theta|²."""
    module = nn.Linear(7, 2).double()  # 16 numbers: the sketch of that size is orthogonal and loses nothing
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        value = loss(module, (X[keep], Y[keep])) + DECAY / 2 * sum(p.square().sum() for p in module.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return module


def rows_of(module, sketch, x=X, y=Y):
    return sketch_gradients(module, [(x, y)], sketch, loss, engine="vmap")


def test_influence_over_n_is_how_much_the_query_loss_rises_when_an_example_is_removed():
    """First order in the leverage of an example, on average 16 parameters over 300 examples: a twentieth."""
    module = trained(torch.arange(300))
    sketch, layout = BlockSRHT(16, 16), Layout.of(module)
    queries, rows = rows_of(module, sketch, X_TEST, Y_TEST), rows_of(module, sketch)
    curvature = fit_ggn(module, [(X, Y)], sketch, layout)
    predicted = scores(queries, rows, method="influence", curvature=curvature, damping=DECAY).double()[:, :40] / 300
    true = (
        torch.stack([test_losses(trained(torch.arange(300) != i)) for i in range(40)], 1) - test_losses(module)[:, None]
    )
    assert torch.corrcoef(torch.stack([predicted.flatten(), true.flatten()]))[0, 1] > 0.99
    slope = float((predicted * true).sum() / predicted.square().sum())
    assert slope == pytest.approx(1, abs=0.1)


def test_lr_times_dot_is_how_much_one_step_on_the_example_lowers_the_query_loss():
    torch.manual_seed(0)
    module, lr = nn.Linear(7, 2).double(), 1e-5
    sketch = BlockSRHT(16, 16)
    found = lr * scores(rows_of(module, sketch, X_TEST, Y_TEST), rows_of(module, sketch)).double()
    for i in range(5):
        stepped = copy.deepcopy(module)
        gradients = torch.autograd.grad(loss(stepped, (X[i : i + 1], Y[i : i + 1])), list(stepped.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(stepped.parameters(), gradients, strict=True):
                parameter -= lr * gradient
        torch.testing.assert_close(found[:, i], test_losses(module) - test_losses(stepped), rtol=1e-3, atol=1e-8)


def test_tracin_over_the_batch_size_adds_up_to_the_decrease_of_the_query_loss():
    """First order in the learning rate, with queries at every step: 40 steps of 1e-3 are a part in a thousand off."""
    torch.manual_seed(0)
    module, lr, batch = nn.Linear(7, 2).double(), 1e-3, 10
    sketch, start = BlockSRHT(16, 16), copy.deepcopy(module)
    queries, parts = {}, []
    for step in range(1, 41):
        chosen = torch.randperm(300, generator=DATA)[:batch]
        queries[step - 1] = rows_of(module, sketch, X_TEST, Y_TEST)
        own = rows_of(module, sketch, X[chosen], Y[chosen])
        known = {"stage": STAGES.index("fit"), "step": step, "lr": lr, "example_id": chosen}
        columns = {k: v if k == "example_id" else torch.full((batch,), v) for k, v in known.items()}
        parts.append(SketchedGradients(own.sketches, sketch, own.columns | columns))
        gradients = torch.autograd.grad(loss(module, (X[chosen], Y[chosen])), list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= lr * gradient
    found = scores(queries, SketchedGradients.cat(parts), method="tracin", group="example_id").double() / batch
    torch.testing.assert_close(found.sum(1), test_losses(start) - test_losses(module), rtol=0.02, atol=1e-6)
