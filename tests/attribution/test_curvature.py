"""Curvature in sketch space is S G Sᵀ, with a dense G from autograd; its noise is the error of random halves."""

import pytest
import torch
import torch.nn.functional as F
from rows import random_rows
from torch import nn

from lightning_sketch.attribution import Curvature, fit_ggn, row_curvature, sketch_gradients
from lightning_sketch.attribution.curvature import CurvatureSum
from lightning_sketch.autodiff.fingerprint import short
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import OUTPUT_LOSSES, CrossEntropy
from lightning_sketch.autodiff.output_roots import Draws
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store import SketchedGradients

LOSSES = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y.long()),
    "binary_cross_entropy": lambda z, y: F.binary_cross_entropy_with_logits(z, y),
    "squared_error": lambda z, y: F.mse_loss(z, y),
}


def output_roots(z, loss, max_classes, draws, generator):
    """The Hessian of a loss by its name; of the labels it depends on their number alone."""
    roots = OUTPUT_LOSSES[loss].roots(z, z, Draws(generator, draws, max_classes))
    return torch.stack([root.vector(z) for root in roots])


def problem(outputs, dim=24, examples=10):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    layout = Layout.of(module)
    x = torch.randn(examples, 4, dtype=torch.float64)
    return module, layout, BlockSRHT(layout.n, dim), x


def dense_ggn(module, x, y, loss):
    """(1/n) sum J_iᵀ H_i J_i by autograd, over all parameters in the layout's order."""
    names, values = zip(*module.named_parameters(), strict=True)
    total = 0
    for i in range(len(x)):

        def output(*tensors, i=i):
            return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x[i : i + 1],))[0]

        parts = torch.autograd.functional.jacobian(output, tuple(values))
        jacobian = torch.cat([part.flatten(1) for part in parts], 1)
        hessian = torch.autograd.functional.hessian(
            lambda z, i=i: loss(z[None], y[i : i + 1]), output(*values).detach()
        )
        total = total + jacobian.T @ hessian @ jacobian
    return total / len(x)


@pytest.mark.parametrize("engine", ["auto", "hooks", "vmap"])
@pytest.mark.parametrize(("loss", "outputs"), [("cross_entropy", 3), ("binary_cross_entropy", 2), ("squared_error", 3)])
def test_ggn_is_the_sketched_gauss_newton_matrix(loss, outputs, engine):
    module, layout, sketch, x = problem(outputs)
    y = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 0]) if loss == "cross_entropy" else torch.rand(10, outputs).double()
    dense, s = dense_ggn(module, x, y, LOSSES[loss]), sketch.matvec(torch.eye(sketch.n, dtype=torch.float64)).T
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = fit_ggn(module, batches, sketch, layout, output_loss_fn=loss, engine=engine)
    assert (found.kind, found.examples) == ("ggn", 10)
    assert (found.matrix is None) == (30 < sketch.dim or outputs == 2)  # 20 rows are fewer than 24
    torch.testing.assert_close(found.dense(), s @ dense @ s.T, rtol=1e-9, atol=1e-12)


def test_one_output_without_an_axis_is_regression():
    module, layout, sketch, x = problem(1)
    y, s = torch.rand(10, dtype=torch.float64), sketch.matvec(torch.eye(sketch.n, dtype=torch.float64)).T
    found = fit_ggn(module, [(x, y)], sketch, layout, model_fn=lambda module, batch: module(batch[0])[:, 0])
    truth = dense_ggn(module, x, y[:, None], LOSSES["squared_error"])
    torch.testing.assert_close(found.dense(), s @ truth @ s.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_drawn_roots_have_the_hessian_as_their_mean(loss):
    """20,000 draws: five standard errors of the mean, from the spread itself, plus rounding of float32."""
    torch.manual_seed(0)
    z = torch.randn(1, 5, dtype=torch.float64) * 2
    y = torch.tensor([1]) if loss == "cross_entropy" else torch.rand(1, 5, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda z: LOSSES[loss](z, y), z)[0, :, 0]
    v = (
        output_roots(z, loss, max_classes=4, draws=20_000, generator=torch.Generator().manual_seed(1))[:, 0]
        * 20_000**0.5
    )
    outer = v[:, :, None] * v[:, None]
    assert ((outer.mean(0) - hessian).abs() <= 5 * outer.std(0) / 20_000**0.5 + 1e-6).all()


def test_rare_labels_are_drawn_by_the_root_of_their_probability():
    """Four labels of 0.0005 beside one of 0.998: by p they would come once in 500 draws."""
    p = torch.tensor([[0.998, *[0.0005] * 4]], dtype=torch.float64)
    v = output_roots(p.log(), "cross_entropy", 4, 20_000, torch.Generator().manual_seed(0))[:, 0]
    drawn = (v / v.abs().amax(1, keepdim=True)).argmax(1)  # e_c - p is positive at c alone
    expected = 4 * 0.0005**0.5 / (0.998**0.5 + 4 * 0.0005**0.5)
    assert float((drawn != 0).double().mean()) == pytest.approx(expected, abs=5 * (expected / 20_000) ** 0.5)


def test_with_many_classes_draws_labels_are_drawn():
    z = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    assert output_roots(z, "cross_entropy", 32, 4, generator).shape == (4, 7, 33)
    assert output_roots(z, "cross_entropy", 33, 4, generator).shape == (33, 7, 33)


def test_draws_leave_the_global_random_state_alone_and_repeat():
    module, layout, sketch, x = problem(3)
    y = torch.randint(0, 3, (10,))
    before = torch.get_rng_state()
    first, again, other = (fit_ggn(module, [(x, y)], sketch, layout, max_classes=2, draws=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.dense(), again.dense())
    assert not torch.equal(first.dense(), other.dense())


def test_for_two_classes_margin_is_ggn():
    """In float64 to the rounding of prob_true, a float32 column: within 1e-4 relative."""
    module, layout, sketch, x = problem(2, examples=40)
    y = (torch.rand(40) < 0.5).long()

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    def row(module, batch):
        z = module(batch[0])
        return F.cross_entropy(z, batch[1], reduction="none"), z.softmax(1).gather(1, batch[1][:, None])[:, 0]

    rows = sketch_gradients(module, [(x, y)], sketch, loss, row_fn=row)
    margin, ggn = row_curvature(rows, "margin", batch_rows=7), fit_ggn(module, [(x, y)], sketch, layout)
    assert margin.fingerprint == ggn.fingerprint == rows.fingerprint != 0
    torch.testing.assert_close(margin.dense(), ggn.dense(), rtol=1e-4, atol=1e-4 * float(ggn.dense().abs().max()))
    assert margin.half_noise == pytest.approx(ggn.half_noise, rel=1e-4)
    assert margin.effective_samples == pytest.approx(ggn.effective_samples, rel=1e-4)


def examples(count, rows, dim, seed=0):
    """A few examples weigh much more than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) ** -0.2
    return weight * torch.randn(count, rows, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 3])
def test_half_noise_is_the_squared_error_of_random_halves(rows):
    """Mean of 200 halves; its own error is a few percent, 10 % is allowed."""
    given = examples(200, rows, 12)
    total = CurvatureSum(12)
    total.add(given)
    curvature = total.curvature("ggn")
    each = torch.einsum("ird,ire->ide", given, given)
    torch.testing.assert_close(curvature.dense(), each.mean(0), rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    off = [
        (each[torch.randperm(200, generator=generator)[:100]].mean(0) - each.mean(0)).square().sum() for _ in range(200)
    ]
    assert curvature.half_noise == pytest.approx(float(torch.stack(off).mean()), rel=0.1)
    t = each.diagonal(dim1=1, dim2=2).sum(1)
    assert curvature.effective_samples == pytest.approx(float(t.sum() ** 2 / t.square().sum()))


def test_the_size_of_blocks_does_not_matter():
    given, whole, parts = examples(50, 2, 12), CurvatureSum(12), CurvatureSum(12)
    whole.add(given)
    for part in given.split(3):  # 6 rows, then 12: the matrix is formed after the second
        parts.add(part)
    a, b = whole.curvature("ggn"), parts.curvature("ggn")
    torch.testing.assert_close(a.dense(), b.dense(), rtol=1e-12, atol=1e-12)
    for name in ("trace", "trace_of_square", "mean_square", "effective_samples", "examples"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-12), name


def test_with_fewer_rows_than_dim_the_root_is_stored_and_traces_are_the_same():
    total = CurvatureSum(12)
    total.add(examples(5, 2, 12))
    few = total.curvature("ggn")
    assert few.matrix is None
    assert few.root.shape == (10, 12)
    assert few.trace == pytest.approx(float(few.dense().trace()))
    assert few.trace_of_square == pytest.approx(float(few.dense().square().sum()))


@pytest.mark.parametrize("count", [5, 40])
def test_saved_and_loaded_it_is_the_same(tmp_path, count):
    total = CurvatureSum(12)
    total.add(examples(count, 1, 12))
    curvature = total.curvature("margin", fingerprint=-(1 << 63))
    curvature.save(tmp_path / "curvature")
    loaded = Curvature.load(tmp_path / "curvature", "margin", fingerprint=-(1 << 63))
    assert torch.equal(loaded.dense(), curvature.dense())
    for name in ("kind", "fingerprint", "examples", "mean_square", "effective_samples", "trace", "trace_of_square"):
        assert getattr(loaded, name) == getattr(curvature, name), name
    for kind, fingerprint in (("margin", 3), ("ggn", -(1 << 63))):
        with pytest.raises(FileNotFoundError, match=f"no curvature '{kind}' at weights {short(fingerprint)}"):
            Curvature.load(tmp_path / "curvature", kind, fingerprint=fingerprint)


def test_probabilities_of_one_are_capped():
    """At p = 1 - 1e-6 the factor of trak is a million."""
    rows = random_rows(20, prob_true=torch.tensor([1.0] * 19 + [1 - 1e-5]))
    assert row_curvature(rows, "trak").trace == pytest.approx(
        1e12 * float((rows.sketches.double()[:19] ** 2).sum()) / 20, rel=1e-2
    )


@pytest.mark.parametrize("kind", ["margin", "trak"])
def test_rows_without_probabilities_are_refused_with_a_solution(kind):
    with pytest.raises(ValueError, match=r"4 of 4 rows lack; .*row_fn=.*curvature='fisher'"):
        row_curvature(random_rows(4), kind)
    row_curvature(random_rows(4), "fisher")
    with pytest.raises(ValueError, match=r"1 of 2 rows have it outside \[0, 1\]"):
        row_curvature(random_rows(2, prob_true=torch.tensor([0.5, 1.5])), kind)


def test_bad_kinds_and_rows_are_refused(untyped):
    with pytest.raises(ValueError, match=r"'ggn' is made by store\.fit_curvature"):
        row_curvature(random_rows(4), "ggn")
    with pytest.raises(ValueError, match="taken at 2 different weights"):
        row_curvature(random_rows(2, fingerprint=torch.tensor([1, 2])), "fisher")
    with pytest.raises(ValueError, match="the curvature of 2 examples is zero"):
        row_curvature(random_rows(2, sketches=torch.zeros(2, 16)), "fisher")
    with pytest.raises(ValueError, match="is not finite"):
        row_curvature(random_rows(2, sketches=torch.full((2, 16), float("nan")), finite=True), "fisher")


def test_outputs_that_are_no_rows_of_logits_are_refused(untyped):
    module, layout, sketch, x = problem(3)
    y = torch.zeros(10, dtype=torch.long)
    with pytest.raises(ValueError, match=r"of 10 examples, got shape \(2, 5, 3\)"):
        fit_ggn(module, [(x, y)], sketch, layout, model_fn=lambda m, b: m(b[0]).view(2, 5, 3))
    with pytest.raises(ValueError, match="the model returned a tuple; pass model_fn"):
        fit_ggn(module, [(x, y)], sketch, layout, model_fn=lambda m, b: (m(b[0]),))
    with pytest.raises(ValueError, match="has one class"):
        fit_ggn(module, [(x, y)], sketch, layout, model_fn=lambda m, b: m(b[0])[:, :1])
    with pytest.raises(ValueError, match="output_loss_fn='hinge' is not known"):
        fit_ggn(module, [(x, y)], sketch, layout, output_loss_fn="hinge")
    with pytest.raises(ValueError, match="the sketch takes n=99 numbers, the layout has 51"):
        fit_ggn(module, [(x, y)], BlockSRHT(99, 24), layout)


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    layout = Layout.of(module)
    fit_ggn(module, [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))], BlockSRHT(layout.n, 8), layout)
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.slow
def test_the_matrix_of_an_example_is_the_mean_over_its_tokens():
    """Of two examples with three and two counted tokens, 4000 draws: within five standard errors of ten parts."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    module[-1].weight.data.mul_(6)  # of equal logits, the mean of the vectors would be zero without signs too
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 6)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[0, 1, 2], [2, 1, -100]])
    s = sketch.matvec(torch.eye(sketch.n, dtype=torch.float64)).T
    truth = sum(
        dense_ggn(module, x[i, t][None], y[i, t][None], LOSSES["cross_entropy"]) / (2 * (y[i] >= 0).sum())
        for i, t in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    )
    options = {"draws": 400, "engine": "loop", "output_loss_fn": CrossEntropy(class_axis=-1)}
    parts = [fit_ggn(module, [(x, y)], sketch, layout, seed=seed, **options).dense() for seed in range(10)]
    found = torch.stack(parts)
    error = found.std(0) / 10**0.5
    assert ((found.mean(0) - s @ truth @ s.T).abs() <= 5 * error).all()
    assert float(error.max()) < 0.05 * float((s @ truth @ s.T).abs().max())


def test_tokens_that_do_not_fit_the_output_are_refused():
    module = nn.Linear(4, 5)
    layout = Layout.of(module)
    batch = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [2, 1, -100]])
    with pytest.raises(ValueError, match="got shape"):
        fit_ggn(module, [batch], BlockSRHT(layout.n, 6), layout, num_examples=lambda batch: 3)
    for wrong in (CrossEntropy(labels_fn=lambda batch: batch[1][:, 1:]), CrossEntropy(class_axis=1)):
        module_fn = None if wrong.labels_fn else lambda m, batch: m(batch[0])[:, :2]
        with pytest.raises(ValueError, match="found 0 axes of classes"):
            fit_ggn(module, [batch], BlockSRHT(layout.n, 6), layout, output_loss_fn=wrong, model_fn=module_fn)


@pytest.mark.parametrize("last", [0, -100], ids=["all", "one ignored"])
def test_one_place_says_which_tokens_count(last):
    """Labels of -100, another `ignore_index` and a mask in the batch: the draws are the same, so are the numbers."""
    module = nn.Linear(4, 5)
    layout = Layout.of(module)
    x, y = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [2, 1, last]])
    ways = {
        "by -100": ((x, y), None),
        "by another label": ((x, y.where(y >= 0, 7)), CrossEntropy(7)),
        "by a mask": (
            {"input": x, "labels": y.where(y >= 0, 3), "mask": y >= 0},
            CrossEntropy(labels_fn=lambda batch: batch["labels"].masked_fill(~batch["mask"], -100)),
        ),
    }
    expected, *others = (
        fit_ggn(module, [batch], BlockSRHT(layout.n, 6), layout, output_loss_fn=loss).dense()
        for batch, loss in ways.values()
    )
    for other in others:
        assert torch.equal(other, expected)


@pytest.mark.parametrize("size", [1e-45, 1e-20, 1e40])
def test_a_curvature_in_float32_is_right_for_rows_of_any_size(size):
    """Rows in float64 are divided by their size before they are narrowed: errors of 1e-6, those of float32 sums."""
    draw = torch.Generator().manual_seed(0)
    table = SketchedGradients(torch.randn(100, 16, generator=draw, dtype=torch.float64) * size, BlockSRHT(99, 16))
    single, double = row_curvature(table, "fisher", single=True), row_curvature(table, "fisher")
    torch.testing.assert_close(single.dense() / size**2, double.dense() / size**2, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_change_a_curvature():
    draw = torch.Generator().manual_seed(0)
    table = SketchedGradients(torch.randn(100, 16, generator=draw), BlockSRHT(99, 16))
    expected = row_curvature(table, "fisher", single=True).dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_curvature(table, "fisher", single=True).dense(), expected)


def test_no_examples_add_nothing():
    total = CurvatureSum(4, single=True)
    total.add(torch.zeros(0, 1, 4))
    total.add(torch.eye(4)[:, None])
    torch.testing.assert_close(total.curvature("fisher").dense(), torch.eye(4).double() / 4)
