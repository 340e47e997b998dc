"""Rows that went through a preconditioner are compared with their like only, and so is their curvature."""

import pytest
import torch
from test_preconditioner import CLASSES, case, class_gradients, cross_entropy, flat

from lightning_sketch.attribution import (
    fit_ggn,
    fit_preconditioner,
    row_curvature,
    scores,
    self_influence,
    sketch_gradients,
    together,
    top_k,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import NONE, OF_STEP, SketchedGradients


@pytest.fixture(scope="module")
def made():
    """Return a module, its batches, a preconditioner, and rows without and with it."""
    module, batches = case("linear", torch.float32)
    p = fit_preconditioner(module, batches, loss_fn=cross_entropy)
    sketch = BlockSRHT(p.n, 16)
    rows = [sketch_gradients(module, batches, sketch, cross_entropy, preconditioner=own) for own in (None, p)]
    return module, batches, p, *rows


def test_plain_queries_and_whitened_rows_are_refused_and_the_other_way_round(made):
    *_, plain, whitened = made
    for queries, rows in ((plain, whitened), (whitened, plain)):
        for function in (scores, top_k):
            with pytest.raises(ValueError, match=r"the queries went through .* the rows through .* mean nothing"):
                function(queries, rows)
    torch.testing.assert_close(scores(whitened, whitened), whitened.sketches @ whitened.sketches.T)


def test_batches_that_can_be_read_once_are_refused_for_a_preconditioner_by_name(made):
    module, batches, _, plain, whitened = made
    for kind in ("ekfac", "kfac"):
        with pytest.raises(ValueError, match="can be read only once"):
            sketch_gradients(module, iter(batches), plain.sketch, cross_entropy, preconditioner=kind)
    rows = sketch_gradients(module, batches, plain.sketch, cross_entropy, preconditioner="ekfac")
    torch.testing.assert_close(rows.sketches, whitened.sketches)


def test_another_damping_is_another_preconditioner(made):
    module, batches, p, _, whitened = made
    other = sketch_gradients(module, batches, whitened.sketch, cross_entropy, preconditioner=p.damped(0.2))
    with pytest.raises(ValueError, match="mean nothing"):
        scores(other, whitened)


def test_rows_of_several_are_refused_by_name_and_can_be_selected(made):
    *_, plain, whitened = made
    both = SketchedGradients.cat([plain, whitened])
    with pytest.raises(ValueError, match=r"2 different preconditioners .*where\(preconditioner=\.\.\.\)"):
        scores(plain, both)
    with pytest.raises(ValueError, match="2 different preconditioners"):
        row_curvature(both, "fisher")
    assert torch.equal(scores(plain, both.where(preconditioner=NONE)), scores(plain, plain))


def test_a_sum_of_queries_keeps_their_preconditioner(made):
    whitened = made[-1]
    torch.testing.assert_close(scores(together(whitened), whitened)[0], scores(whitened, whitened).sum(0))


def test_a_curvature_of_plain_gradients_is_refused_for_whitened_rows(made):
    *_, plain, whitened = made
    with pytest.raises(ValueError, match=r"the curvature is of gradients that went through no preconditioner"):
        scores(whitened, whitened, method="influence", curvature=row_curvature(plain, "fisher"), damping=1.0)
    assert scores(whitened, whitened, method="influence", curvature="fisher", damping=1.0).shape == (8, 8)


def test_the_gauss_newton_matrix_of_whitened_rows_is_that_of_whitened_gradients(made):
    """A = (1/n) sum of (S L r)(S L r)ᵀ over examples and classes, by autodiff."""
    module, batches, p, _, whitened = made
    found = fit_ggn(
        module, batches, whitened.sketch, Layout.of(module), output_loss_fn="cross_entropy", preconditioner=p
    )
    names, sizes = zip(*((name, q.numel()) for name, q in module.named_parameters()), strict=True)
    rows = []
    for row in class_gradients(module, batches):
        own = {
            name: part.view_as(module.get_parameter(name)) for name, part in zip(names, row.split(sizes), strict=True)
        }
        rows.append(torch.cat([part.flatten() for part in p.whiten(own).values()]))
    sketched = whitened.sketch.matvec(torch.stack(rows)).double()
    assert len(rows) == 8 * CLASSES
    torch.testing.assert_close(found.dense(), sketched.T @ sketched / 8, rtol=1e-3, atol=1e-5)
    assert scores(whitened, whitened, method="influence", curvature=found, damping=1.0).isfinite().all()


def test_rows_of_adams_steps_are_compared_with_plain_queries(made):
    *_, plain, whitened = made
    columns = {"stage": torch.zeros(8, dtype=torch.long), "lr": torch.full((8,), 0.1), "step": torch.ones(8).long()}
    steps = SketchedGradients(
        plain.sketches, plain.sketch, {**plain.columns, **columns, "preconditioner": torch.full((8,), OF_STEP)}
    )
    torch.testing.assert_close(
        scores({0: plain}, steps, method="tracin"), 0.1 * plain.sketches @ plain.sketches.T, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="mean nothing"):
        scores({0: whitened}, steps, method="tracin")
    with pytest.raises(ValueError, match="have no self-influence"):
        self_influence(steps)
    mixed = SketchedGradients.cat(
        [steps, SketchedGradients(plain.sketches, plain.sketch, {**plain.columns, **columns})]
    )
    with pytest.raises(ValueError, match="2 different preconditioners"):
        scores({0: plain}, mixed, method="tracin")


def test_self_influence_of_whitened_rows_is_that_of_the_inverse(made):
    module, batches, p, _, whitened = made
    found = self_influence(whitened, method="dot").scores
    truth = []
    for x, y in ((x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)):
        gradient = flat(module, cross_entropy(module, (x, y)))
        sizes = [q.numel() for q in module.parameters()]
        own = {
            name: part.view_as(q)
            for (name, q), part in zip(module.named_parameters(), gradient.split(sizes), strict=True)
        }
        whole = torch.cat([part.flatten() for part in p.whiten(own).values()])
        truth.append(whitened.sketch.matvec(whole).square().sum())
    torch.testing.assert_close(found, torch.stack(truth), rtol=1e-4, atol=1e-6)
