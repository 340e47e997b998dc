"""Scores of gradients of any norm, against float64; a row without numbers is never best; bad input is refused."""

import pytest
import torch
from rows import DIM, random_rows

from lightning_sketch.attribution import row_curvature, scores, self_influence, top_k
from lightning_sketch.store.sketched_gradients import SketchedGradients

BASE, ASKED = random_rows(24, seed=1), random_rows(3, seed=2)
R, Q = BASE.sketches.double(), ASKED.sketches.double()


def scaled(rows, exponents, dtype=torch.float64, **columns):
    """The rows times powers of ten."""
    powers = 10.0 ** torch.as_tensor(exponents, dtype=torch.float64)
    return SketchedGradients((rows.sketches.double() * powers.reshape(-1, 1)).to(dtype), rows.sketch, columns)


FLOAT32, FLOAT64 = torch.linspace(-37, 37, 24).round(), torch.linspace(-300, 290, 24).round()


@pytest.mark.parametrize("asked", [0, -30, 30])
@pytest.mark.parametrize(
    ("exponents", "dtype"), [(FLOAT32, torch.bfloat16), (FLOAT32, torch.float32), (FLOAT64, torch.float64)]
)
def test_cosine_does_not_depend_on_norms(exponents, dtype, asked):
    """The norms of one table go from 1e-37 to 1e37, or 1e-300 to 1e290; the cosine is that of what was stored."""
    rows = scaled(BASE, exponents, dtype)
    true = torch.nn.functional.cosine_similarity(
        Q[:, None], (rows.sketches.double() * 10.0 ** -exponents.double()[:, None])[None], dim=2
    )
    found = scores(scaled(ASKED, asked), rows, method="cosine", batch_rows=7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores(scaled(ASKED, asked), rows, method="dot", normalize=True), found)


@pytest.mark.parametrize(("asked", "exponent"), [(0, 0), (-20, -22), (-150, -145), (25, 30), (140, 150), (-100, 100)])
def test_products_are_in_float32_where_it_holds_them(asked, exponent):
    found = scores(scaled(ASKED, asked), scaled(BASE, exponent))
    assert (found.dtype == torch.float32) == (abs(asked + exponent) < 37)
    torch.testing.assert_close(found.double() / 10.0 ** (asked + exponent), Q @ R.T, rtol=1e-5, atol=1e-5)
    ids = top_k(scaled(ASKED, asked), scaled(BASE, exponent), 5, batch_rows=7).example_ids
    assert torch.equal(ids, (Q @ R.T).topk(5)[1])


@pytest.mark.parametrize("exponent", [-70, -30, 0, 30, 70])
def test_influence_is_inverse_to_the_square_of_the_norm_of_all_gradients(exponent):
    """Rows times s and queries times s have the same influence: (s q)ᵀ (s² A)⁻¹ (s g)."""
    options = {"method": "influence", "curvature": "fisher"}
    damping = 0.3
    true = scores(ASKED, BASE, damping=damping, **options)
    rows, queries = scaled(BASE, exponent), scaled(ASKED, exponent)
    unit = 10.0**exponent
    torch.testing.assert_close(scores(queries, rows, damping=damping * unit**2, **options), true, rtol=1e-5, atol=1e-5)
    relative = scores(queries, rows, damping=damping * unit**2, normalize=True, **options)
    torch.testing.assert_close(relative, scores(ASKED, BASE, damping=damping, normalize=True, **options))
    own = self_influence(rows, damping=damping * unit**2, **options).scores
    torch.testing.assert_close(own, self_influence(BASE, damping=damping, **options).scores, rtol=1e-5, atol=1e-5)
    dot = self_influence(rows, method="dot").scores.double() / unit**2
    torch.testing.assert_close(dot, R.square().sum(1), rtol=1e-5, atol=1e-5)


def test_gradients_whose_squares_no_number_holds_are_refused_where_squares_are_needed():
    for exponent in (-100, 100):
        with pytest.raises(ValueError, match=r"squares of .* gradients .* beyond the range|is (zero|not finite)"):
            row_curvature(scaled(BASE, exponent), "fisher")


def test_relative_influence_is_its_formula():
    damping = 0.2
    inverse = torch.linalg.inv(R.T @ R / len(R) + damping * torch.eye(DIM, dtype=torch.float64))
    norms = ((R @ inverse) * R).sum(1).sqrt(), ((Q @ inverse) * Q).sum(1).sqrt()
    true = Q @ inverse @ R.T / norms[0] / norms[1][:, None]
    options = {"method": "influence", "curvature": "fisher", "normalize": True}
    torch.testing.assert_close(scores(ASKED, BASE, damping=damping, **options).double(), true, rtol=1e-5, atol=1e-5)
    sweep = scores(ASKED, BASE, damping=[damping, 7.0], **options)
    torch.testing.assert_close(sweep[0].double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sweep[1], scores(ASKED, BASE, damping=7.0, **options))
    louder = scaled(BASE, torch.arange(24.0) % 3)  # the same curvature, rows of other lengths
    found = top_k(ASKED, louder, 4, method="influence", curvature=row_curvature(BASE, "fisher"), damping=damping)
    same = top_k(ASKED, louder, 4, **options | {"curvature": row_curvature(BASE, "fisher")}, damping=damping)
    assert torch.equal(same.example_ids, true.topk(4)[1])
    assert not torch.equal(found.example_ids, same.example_ids)  # outliers win
    own = scores(BASE, BASE, damping=damping, **options).diagonal()
    torch.testing.assert_close(own, torch.ones(24))


def test_tracin_has_no_relative_influence():
    rows = random_rows(3, lr=0.1, stage="fit", step=torch.arange(3))
    with pytest.raises(ValueError, match="normalize=True takes one checkpoint"):
        scores({0: ASKED}, rows, method="tracin", normalize=True)


def test_a_document_acts_with_its_number_of_tokens():
    """Against the gradient of the mean over tokens, to which each document contributes tokens times its own mean."""
    tokens = torch.arange(1.0, 25)
    rows = random_rows(24, seed=1, weight=tokens, lr=0.5, stage="fit", step=torch.arange(24))
    for options, queries in (({"method": "dot"}, ASKED), ({"method": "tracin"}, {0: ASKED})):
        plain, found = scores(queries, rows, **options), scores(queries, rows, weighted=True, **options)
        torch.testing.assert_close(found, plain * tokens / tokens.mean())
        best = top_k(queries, rows, 3, weighted=True, group=None, **options)
        assert torch.equal(best.example_ids, found.topk(3)[1])
    total = scores(ASKED, rows, weighted=True).mean(1).double()
    torch.testing.assert_close(total, Q @ (tokens.double() @ R) / tokens.double().sum(), rtol=1e-5, atol=1e-5)
    for unknown in (random_rows(24), random_rows(24, weight=-1.0), random_rows(24, weight=0.0)):
        with pytest.raises(ValueError, match=r"weighted=True takes the column 'weight'.* 24 of 24 rows have none"):
            scores(ASKED, unknown, weighted=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_a_row_without_numbers_is_never_best(value, method):
    """Marked by itself in memory; one that says that it is finite is last, and said."""
    sketches = BASE.sketches.clone()
    sketches[3, 5] = value
    marked = SketchedGradients(sketches, BASE.sketch)
    assert marked.finite.tolist() == [i != 3 for i in range(24)]
    assert 3 not in top_k(ASKED, marked, 24, method=method).example_ids
    lying = SketchedGradients(sketches, BASE.sketch, {"finite": [True] * 24})
    for largest in (True, False):
        with pytest.warns(UserWarning, match="1 of 24 rows that were scored are not finite; their scores are NaN"):
            found = top_k(ASKED, lying, 24, method=method, largest=largest, batch_rows=5)
        assert (found.example_ids[:, -1] == 3).all()
        assert found.scores[:, -1].isnan().all()
        assert found.scores[:, :-1].isfinite().all()


def test_rows_of_zeros_are_counted():
    sketches = BASE.sketches.clone()
    sketches[[1, 4]] = 0
    rows = SketchedGradients(sketches, BASE.sketch)
    for ask in (scores, top_k):
        with pytest.warns(UserWarning, match="2 of 24 rows that were scored are zero") as said:
            ask(ASKED, rows, batch_rows=3)
        assert len(said) == 1
    with pytest.warns(UserWarning, match="2 of 24 rows that were scored are zero"):
        assert scores(ASKED, rows, method="cosine")[:, [1, 4]].eq(0).all()


def test_a_scale_that_is_not_known_is_said_where_scores_need_it():
    rows = random_rows(24, seed=1, scale_known=torch.arange(24) > 4)
    for ask in (lambda: scores(ASKED, rows), lambda: self_influence(rows, method="dot")):
        with pytest.warns(UserWarning, match=r"5 of 24 rows were not compared .* method='cosine' or normalize=True"):
            ask()
    scores(ASKED, rows, method="cosine")
    scores(ASKED, rows, normalize=True)


class Trained(SketchedGradients):
    """Rows that know what trained them, as those of a store."""

    optimizers = frozenset({"SGD"})


def test_the_scale_of_tracin_is_that_of_sgd():
    columns = random_rows(3, lr=0.1, stage="fit", step=torch.arange(3)).columns
    rows = Trained(BASE.sketches[:3], BASE.sketch, columns)
    scores({0: ASKED}, rows, method="tracin")
    Trained.optimizers = frozenset({"SGD", "AdamW"})
    for ask in (lambda: scores({0: ASKED}, rows, method="tracin"), lambda: self_influence(rows)):
        with pytest.warns(UserWarning, match="trained by AdamW: tracin ranks them"):
            ask()
    rows = SketchedGradients(BASE.sketches[:3], BASE.sketch, {**columns, "lr": [0.1, float("inf"), 0.1]})
    with pytest.raises(ValueError, match="learning rate, which is not known for 1 of 3 rows"):
        self_influence(rows)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "4", None, torch.tensor(2.5)])
def test_numbers_of_rows_are_whole(untyped, wrong):
    asks = [
        lambda: scores(ASKED, BASE, batch_rows=wrong),
        lambda: top_k(ASKED, BASE, 3, batch_rows=wrong),
        lambda: top_k(ASKED, BASE, wrong),
        lambda: self_influence(BASE, method="dot", batch_rows=wrong),
        lambda: row_curvature(BASE, "fisher", batch_rows=wrong),
        lambda: list(BASE.blocks(wrong)),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"need (k|batch_rows) >= 1, got .*pass a whole number"):
            ask()


def test_tables_that_are_none_are_refused_in_words(untyped):
    cases = [
        (lambda: scores(ASKED.sketches, BASE), "takes queries .* as SketchedGradients, got a Tensor; sketch_gradients"),
        (lambda: scores(ASKED, BASE.sketches), "train takes rows, .* got a Tensor; open a store"),
        (lambda: scores(ASKED, "folder"), "train takes rows, .* got a str"),
        (lambda: scores([ASKED, ASKED], BASE), "got a list; a list needs a list of train"),
        (lambda: scores([ASKED, ASKED], [BASE, BASE.sketches.numpy()]), "train takes rows, .* got a ndarray"),
        (lambda: scores({0: ASKED.sketches}, BASE, method="tracin"), "takes {step of the checkpoint.* got a Tensor"),
        (lambda: self_influence(BASE.sketches), "train takes rows, .* got a Tensor"),
        (lambda: SketchedGradients(BASE.sketches.to(torch.complex64), BASE.sketch), "floating-point numbers, got"),
        (lambda: random_rows(2, example_id=torch.tensor([0.5, 0.7])), "example_id takes whole numbers or strings"),
        (lambda: random_rows(2, example_id=torch.tensor([True, False])), "example_id takes whole numbers or strings"),
    ]
    for ask, message in cases:
        with pytest.raises(ValueError, match=message):
            ask()


def test_steps_are_no_examples():
    rows = random_rows(3, lr=0.1, stage="fit", step=torch.tensor([5, 6, 7]))
    found = self_influence(rows)
    assert found.unit == "step"
    assert repr(found).startswith("SelfInfluence of 3 steps, largest: ")
    assert top_k({0: ASKED}, rows, 2, method="tracin").unit == "step"
    assert repr(top_k(ASKED, BASE, 2)).startswith("TopK of 3 queries, k=2: row (score)")
    named = random_rows(3, example_id=torch.arange(3))
    assert top_k(ASKED, named, 2).unit == self_influence(named, method="dot").unit == "example"
    best, ids = top_k(ASKED, named, 2)  # a pair
    assert best.shape == ids.shape
