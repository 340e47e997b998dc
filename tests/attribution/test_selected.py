"""Queries are compared with rows of their own weights only; which rows, depends on the stage of the rows."""

import pytest
import torch
from rows import random_rows

from lightning_sketch.attribution import scores, self_influence
from lightning_sketch.attribution._selected import select
from lightning_sketch.store.sketched_gradients import SketchedGradients


def cat(*parts):
    return SketchedGradients.cat(list(parts))


def dots(query, rows):
    return query.sketches @ rows.sketches.T


def test_of_rows_at_checkpoints_those_at_the_weights_of_the_queries_are_scored():
    train = cat(*(random_rows(4, seed=f, fingerprint=f, stage="validate") for f in (3, 4)))
    query = random_rows(2, seed=9, fingerprint=4)
    torch.testing.assert_close(scores(query, train), dots(query, random_rows(4, seed=4)))
    assert select(query, train).positions.tolist() == [4, 5, 6, 7]


def test_weights_of_no_row_are_refused_with_both_named():
    train = random_rows(4, fingerprint=3, stage="test")
    with pytest.raises(ValueError, match=r"queries were taken at weights 4, the rows at 3; .*trainer.validate"):
        scores(random_rows(2, fingerprint=4), train)


def test_rows_of_training_steps_are_refused_with_two_ways_out():
    train = random_rows(3, fingerprint=torch.tensor([4, 5, 6]), stage="fit")
    with pytest.raises(ValueError, match=r"each at their own .*method='tracin'.*trainer.validate"):
        scores(random_rows(2, fingerprint=4), train)


def test_beside_rows_at_the_checkpoint_those_of_training_steps_are_not_scored():
    steps = random_rows(3, seed=1, fingerprint=torch.tensor([4, 5, 6]), stage="fit")
    query, at = random_rows(2, fingerprint=4), random_rows(5, seed=2, fingerprint=4, stage="validate")
    torch.testing.assert_close(scores(query, cat(steps, at)), dots(query, at))


def test_unknown_weights_are_compared_only_with_unknown_weights():
    query = random_rows(2)
    assert scores(query, random_rows(3)).shape == (2, 3)
    with pytest.raises(ValueError, match="fingerprint 0"):
        scores(query, random_rows(3, fingerprint=torch.tensor([0, 0, 7])))
    with pytest.raises(ValueError, match="queries were taken at weights 7, the rows at 0"):
        scores(random_rows(2, fingerprint=7), random_rows(3))


def test_copies_and_rows_that_are_not_finite_and_stored_queries_take_no_part():
    """Seen by their absence from scores, from the curvature, and from self-influence."""
    out = [{"finite": False}, {"padded": True}, {"stage": "queries"}]
    poor = [
        random_rows(2, seed=i, fingerprint=4, lr=1.0, **{"stage": "predict", **columns})
        for i, columns in enumerate(out)
    ]
    good, query = random_rows(40, seed=5, fingerprint=4, lr=1.0, stage="predict"), random_rows(2, fingerprint=4)
    train = cat(poor[0], good, *poor[1:])
    assert select(query, train).positions.tolist() == list(range(2, 42))
    for options in ({"method": "dot"}, {"method": "influence", "curvature": "fisher", "damping": 0.1}):
        torch.testing.assert_close(scores(query, train, **options), scores(query, good, **options))
    for options in ({"method": "tracin"}, {"method": "influence", "curvature": "fisher", "damping": 0.1}):
        alone = self_influence(good, **options)
        found = self_influence(train, **options)
        torch.testing.assert_close(found.scores, alone.scores)
        assert torch.equal(found.example_ids, alone.example_ids + 2)  # places in the source that was asked
    with pytest.raises(ValueError, match="none of the 6 rows can be scored"):
        scores(query, cat(*poor))


def test_another_sketch_is_refused():
    with pytest.raises(
        ValueError, match=r"queries were made by BlockSRHT\(n=200, dim=8.*rows by BlockSRHT\(n=200, dim=16"
    ):
        scores(random_rows(2, dim=8), random_rows(3))


def test_queries_that_are_not_finite_or_none_are_refused():
    with pytest.raises(ValueError, match="1 of 2 queries are not finite"):
        scores(random_rows(2, finite=torch.tensor([True, False])), random_rows(3))
    with pytest.raises(ValueError, match="there are no queries"):
        scores(random_rows(0), random_rows(3))


def test_self_influence_at_several_weights_is_refused_but_for_tracin():
    train = random_rows(4, fingerprint=torch.tensor([1, 1, 2, 2]))
    with pytest.raises(ValueError, match="taken at 2 different weights"):
        self_influence(train, method="dot")


# Queries at three checkpoints: each row is compared with those of its own weights, times its learning rate.
QUERIES = {step: random_rows(2, seed=step, fingerprint=step + 1) for step in (0, 10, 20)}


def at_checkpoints(steps):
    parts = [
        random_rows(3, seed=50 + s, stage="validate", step=s, lr=0.1 + s, fingerprint=s + 1, example_id=torch.arange(3))
        for s in steps
    ]
    return cat(*parts)


def test_tracin_compares_rows_at_checkpoints_with_the_queries_of_their_step():
    train = at_checkpoints([20, 0, 10])
    parts = [(0.1 + s) * dots(QUERIES[s], random_rows(3, seed=50 + s)) for s in (20, 0, 10)]
    for batch_rows in (2, 100):  # blocks with one partner and with several
        torch.testing.assert_close(scores(QUERIES, train, method="tracin", batch_rows=batch_rows), torch.cat(parts, 1))
    summed = scores(QUERIES, train, method="tracin", group="example_id")
    torch.testing.assert_close(summed, sum(parts))


def test_tracin_compares_rows_of_training_steps_with_the_latest_queries_not_after_their_weights():
    """The row of step s is the gradient at the weights after s - 1 steps."""
    steps = torch.tensor([1, 10, 11, 20, 21, 99])
    train = random_rows(6, seed=3, stage="fit", step=steps, lr=0.5, fingerprint=steps)
    assert select(QUERIES, train).partners.tolist() == [0, 0, 10, 10, 20, 20]
    found = scores(QUERIES, train, method="tracin")
    for column, partner in enumerate([0, 0, 10, 10, 20, 20]):
        truth = 0.5 * QUERIES[partner].sketches @ train.sketches[column]
        torch.testing.assert_close(found[:, column], truth)


def test_tracin_compares_steps_before_the_first_queries_with_the_first():
    late = {10: QUERIES[10], 20: QUERIES[20]}
    train = random_rows(2, stage="fit", step=torch.tensor([3, 15]), lr=0.5)
    assert select(late, train).partners.tolist() == [10, 10]


def test_tracin_rows_at_checkpoints_without_queries_are_left_out_and_queries_without_rows_refused():
    assert select({10: QUERIES[10]}, at_checkpoints([0, 10])).positions.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"no rows at step 20, .* rows are at step 0, 10"):
        scores(QUERIES, at_checkpoints([0, 10]), method="tracin")


def test_tracin_queries_under_another_step_than_that_of_their_weights_are_refused():
    """Rows of training have the weights that their step began with; weights that are equal later are no mistake."""
    steps = torch.tensor([1, 11, 21])
    train = random_rows(3, stage="fit", step=steps, lr=0.5, fingerprint=steps)
    with pytest.raises(ValueError, match=r"queries of step 0 were taken at the weights of step 10.*pass {10: queries}"):
        scores({0: QUERIES[10], 20: QUERIES[20]}, train, method="tracin")
    elsewhere = random_rows(2, seed=5, fingerprint=99)
    assert scores({15: elsewhere}, train, method="tracin").isfinite().all()
    frozen = random_rows(3, stage="fit", step=steps, lr=0.5, fingerprint=torch.full((3,), 11))
    equal = {10: QUERIES[10], 20: random_rows(2, seed=20, fingerprint=11)}
    assert scores(equal, frozen, method="tracin").isfinite().all()


@pytest.mark.parametrize(
    ("step", "rows", "weights"),
    [
        (0, [2, 4], [11, 13]),  # a rate of zero in the first step, whose row was not written
        (2, [1, 2], [9, 11]),  # and in the last
        (0, [1, 2], [0, 11]),  # sharded at first, so that the weights were not known
    ],
)
def test_weights_that_a_step_did_not_change_are_those_of_both_sides(step, rows, weights):
    train = random_rows(2, stage="fit", step=torch.tensor(rows), lr=0.5, fingerprint=torch.tensor(weights))
    assert scores({step: QUERIES[10]}, train, method="tracin").isfinite().all()


def test_tracin_takes_queries_of_one_step_whose_buffers_differ():
    """As two validations at a step make them, between which a batch norm has seen a batch."""
    train = random_rows(2, stage="fit", step=torch.tensor([1, 11]), lr=0.5, fingerprint=torch.tensor([1, 11]))
    both = random_rows(2, fingerprint=torch.tensor([11, 12]))
    assert scores({10: both}, train, method="tracin").isfinite().all()
    with pytest.raises(ValueError, match="queries of step 0 were taken at the weights of step 10"):
        scores({0: both}, train, method="tracin")


def test_tracin_weights_of_another_run_at_the_same_step_are_refused():
    with pytest.raises(ValueError, match="at step 10 the queries were taken at weights 7, rows at 11"):
        scores({10: random_rows(2, fingerprint=7)}, at_checkpoints([10]), method="tracin")


def test_tracin_both_kinds_of_rows_at_once_are_refused():
    steps = random_rows(2, stage="fit", step=torch.tensor([3, 15]), lr=0.5)
    for ask in (lambda t: scores(QUERIES, t, method="tracin"), self_influence):
        with pytest.raises(ValueError, match="rows of training steps and of checkpoints"):
            ask(cat(steps, at_checkpoints([0, 10, 20])))


def test_tracin_unknown_learning_rates_are_refused():
    train = random_rows(2, stage="fit", step=torch.tensor([3, 15]), lr=torch.tensor([0.1, float("nan")]))
    for ask in (lambda t: scores(QUERIES, t, method="tracin"), self_influence):
        with pytest.raises(ValueError, match="learning rate, which is not known for 1 of 2 rows"):
            ask(train)


def test_tracin_queries_by_step_belong_to_tracin_and_plain_ones_to_the_others():
    with pytest.raises(ValueError, match=r"method='dot' takes queries taken at the rows' weights, .*got a dict"):
        scores(QUERIES, at_checkpoints([0]), method="dot")
    with pytest.raises(ValueError, match=r"method='tracin' takes {step of the checkpoint"):
        scores(QUERIES[0], at_checkpoints([0]), method="tracin")


def test_tracin_checkpoints_with_other_numbers_of_queries_are_refused():
    with pytest.raises(ValueError, match="the same queries in the same order"):
        scores({0: random_rows(2), 10: random_rows(3)}, at_checkpoints([0, 10]), method="tracin")
    with pytest.raises(ValueError, match="there are no queries; tracin takes"):
        scores({}, at_checkpoints([0]), method="tracin")
