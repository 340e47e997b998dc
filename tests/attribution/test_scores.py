"""Scores against their dense formulas in float64, block by block and all at once."""

import pytest
import torch
from rows import DIM, random_rows

from lightning_sketch.attribution import Influence, row_curvature, scores, self_influence, together
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients

TRAIN = random_rows(
    70, seed=1, fingerprint=5, prob_true=0.7, example_id=torch.arange(70) % 40, dataloader=torch.arange(70) // 40
)
ASKED = random_rows(3, seed=2, fingerprint=5)
R, Q = TRAIN.sketches.double(), ASKED.sketches.double()


def close(found, truth):
    """Float32 products of 16 numbers: a few times 2^-24 of their size."""
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def damped_inverse(weights, damping):
    rows = R * weights
    return torch.linalg.inv(rows.T @ rows / len(rows) + damping * torch.eye(DIM, dtype=torch.float64))


def test_rows_in_memory_are_a_source():
    assert isinstance(TRAIN, RowSource)
    assert not isinstance([TRAIN], RowSource)


@pytest.mark.parametrize("batch_rows", [1, 32, 1000])
def test_dot_and_cosine(batch_rows):
    close(scores(ASKED, TRAIN, batch_rows=batch_rows), Q @ R.T)
    cosine = torch.nn.functional.cosine_similarity(Q[:, None], R[None], dim=2)
    close(scores(ASKED, TRAIN, method="cosine", batch_rows=batch_rows), cosine)


def test_cosine_with_a_row_of_zeros_is_zero():
    train, query = (random_rows(count, sketches=torch.zeros(count, DIM)) for count in (2, 1))
    with pytest.warns(UserWarning, match="2 of 2 rows that were scored are zero"):
        assert scores(random_rows(1), train, method="cosine").tolist() == [[0.0, 0.0]]
    with pytest.warns(UserWarning, match="1 of 1 queries are zero"):
        assert scores(query, random_rows(2), method="cosine").tolist() == [[0.0, 0.0]]


def test_cosine_of_tiny_gradients_does_not_underflow():
    """Squares of 1e-30 are zero in float32."""
    query, rows = random_rows(1, seed=3), random_rows(4, seed=4)
    tiny = random_rows(1, sketches=query.sketches * 1e-30)
    torch.testing.assert_close(scores(tiny, rows, method="cosine"), scores(query, rows, method="cosine"))


@pytest.mark.parametrize(("kind", "weight"), [("margin", (0.7 / 0.3) ** 0.5), ("fisher", 1.0), ("trak", 1 / 0.3)])
def test_influence_from_the_rows(kind, weight):
    found = scores(ASKED, TRAIN, method="influence", curvature=kind, damping=0.2, batch_rows=32)
    close(found, Q @ damped_inverse(weight, 0.2) @ R.T)


def test_a_sweep_of_dampings_is_one_call():
    sweep = scores(ASKED, TRAIN, method="influence", curvature="fisher", damping=[0.2, 3.0])
    assert sweep.shape == (2, 3, 70)
    for found, damping in zip(sweep, (0.2, 3.0), strict=True):
        torch.testing.assert_close(found, scores(ASKED, TRAIN, method="influence", curvature="fisher", damping=damping))


def test_rows_of_one_example_add_up():
    found, whole = scores(ASKED, TRAIN, group="example_id"), Q @ R.T
    assert found.shape == (3, 40)
    close(found[:, :30], whole[:, :30] + whole[:, 40:])
    close(found[:, 30:], whole[:, 30:40])


def test_a_set_of_queries_adds_up():
    query = together(ASKED)
    assert query.fingerprint == 5
    close(scores(query, TRAIN), (Q @ R.T).sum(0, keepdim=True))


def test_members_are_averaged_each_at_its_own_weights():
    same = {name: TRAIN.columns[name] for name in ("example_id", "dataloader")}
    other, asked = random_rows(70, seed=6, fingerprint=8, **same), random_rows(3, 7, fingerprint=8)
    mean = (Q @ R.T + asked.sketches.double() @ other.sketches.double().T) / 2
    close(scores([ASKED, asked], [TRAIN, other]), mean)
    curvatures = [row_curvature(TRAIN, "fisher"), row_curvature(other, "fisher")]
    each = [
        scores(q, t, method="influence", curvature="fisher", damping=0.1) for q, t in ((ASKED, TRAIN), (asked, other))
    ]
    torch.testing.assert_close(
        scores([ASKED, asked], [TRAIN, other], method="influence", curvature=curvatures, damping=0.1), sum(each) / 2
    )


def test_members_in_another_order_are_averaged_by_example():
    turned = TRAIN.where(TRAIN.example_id < 40)
    turned = SketchedGradients(R.flip(0).float(), TRAIN.sketch, {k: v.flip(0) for k, v in TRAIN.columns.items()})
    with pytest.raises(ValueError, match="another order"):
        scores([ASKED, ASKED], [TRAIN, turned])
    close(scores([ASKED] * 2, [TRAIN, turned], group="example_id"), scores(ASKED, TRAIN, group="example_id").double())


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"2 sources .* 1 queries"):
        scores([ASKED], [TRAIN, TRAIN])
    with pytest.raises(ValueError, match=r"2 sources .* 0 queries"):
        scores(ASKED, [TRAIN, TRAIN])


def test_half_precision_rows_are_multiplied_in_float32():
    """A bfloat16 product would have 8 bits; the rows are converted before."""
    train = random_rows(5, sketches=torch.randn(5, DIM, generator=torch.Generator().manual_seed(0)).bfloat16())
    query = random_rows(2, seed=9)
    close(scores(query, train), query.sketches.double() @ train.sketches.double().T)


def test_tf32_is_not_used():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        close(scores(ASKED, TRAIN), Q @ R.T)
    finally:
        torch.set_float32_matmul_precision(before)


def test_self_influence():
    found = self_influence(TRAIN, method="dot")
    close(found.scores, R.square().sum(1))
    assert torch.equal(found.example_ids, TRAIN.example_id)
    found = self_influence(TRAIN, method="influence", curvature="margin", damping=0.2, batch_rows=32)
    close(found.scores, ((R @ damped_inverse((0.7 / 0.3) ** 0.5, 0.2)) * R).sum(1))


def test_self_influence_of_tracin_sums_over_the_rows_of_an_example():
    lr = torch.linspace(0.1, 1, 70)
    train = random_rows(
        70, seed=1, lr=lr, example_id=TRAIN.example_id, step=torch.arange(70), fingerprint=torch.arange(70)
    )
    found, each = self_influence(train), lr.double() * R.square().sum(1)
    assert found.example_ids.tolist() == list(range(40))
    close(found.scores, torch.cat([each[:30] + each[40:], each[30:40]]))


def test_an_unknown_method_or_group_is_refused(untyped):
    with pytest.raises(ValueError, match="method='nearest' is not known; use one of dot, cosine"):
        scores(ASKED, TRAIN, method="nearest")
    with pytest.raises(ValueError, match="group='epoch' is not known"):
        scores(ASKED, TRAIN, group="epoch")
    with pytest.raises(ValueError, match="method='cosine' has no self-influence"):
        self_influence(TRAIN, method="cosine")


def test_the_curvature_must_fit_the_rows():
    with pytest.raises(ValueError, match=r"taken at weights 5, rows and queries at 6"):
        scores(
            *(random_rows(9, fingerprint=6),) * 2,
            method="influence",
            curvature=row_curvature(TRAIN, "fisher"),
            damping=0.1,
        )
    with pytest.raises(ValueError, match="the curvature has dim=8, rows have 16"):
        scores(ASKED, TRAIN, method="influence", curvature=row_curvature(random_rows(20, dim=8), "fisher"), damping=0.1)
    with pytest.raises(ValueError, match="damping is passed twice"):
        scores(ASKED, TRAIN, method="influence", curvature=Influence(row_curvature(TRAIN, "fisher"), 0.1), damping=0.2)
    with pytest.raises(ValueError, match="pass curvature=fit_ggn"):
        scores(ASKED, TRAIN, method="influence")


def test_an_influence_has_its_damping():
    inverse = Influence(row_curvature(TRAIN, "fisher"), 0.1)
    by_hand = scores(ASKED, TRAIN, method="influence", curvature="fisher", damping=0.1)
    assert torch.equal(scores(ASKED, TRAIN, method="influence", curvature=inverse), by_hand)


@pytest.mark.parametrize("method", ["dot", "cosine", "tracin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_are_converted_in_parts_score_as_their_dense_products(method, dtype):
    """Rows of 2^18 numbers are converted four at a time; of 11 rows three are left."""
    sketch = BlockSRHT(1 << 19, 1 << 18)
    step, lr = torch.arange(11) % 3, torch.rand(11)
    rows = SketchedGradients(torch.randn(11, sketch.dim).to(dtype), sketch, {"step": step, "lr": lr})
    asked = [SketchedGradients(torch.randn(4, sketch.dim), sketch) for _ in range(3)]
    dense = torch.stack([query.sketches.double() for query in asked])[step if method == "tracin" else step * 0]
    truth = torch.einsum("iqd,id->qi", dense, rows.sketches.double())
    truth *= {"dot": 1, "tracin": lr, "cosine": 1 / (dense.norm(dim=2).T * rows.sketches.double().norm(dim=1))}[method]
    found = scores(dict(enumerate(asked)) if method == "tracin" else asked[0], rows, method=method)
    # A few roundings, 2^-24, of the sum of the absolute products, 2^18 times 2 / pi.
    tolerance = 1e-6 if method == "cosine" else 0.03
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=tolerance)
