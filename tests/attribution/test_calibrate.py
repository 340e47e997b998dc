"""Calibration finds the damping that predicts the training runs, and trains on halves of the examples."""

import pytest
import torch
from rows import random_rows

from lightning_sketch.attribution import calibrate, row_curvature, scores
from lightning_sketch.attribution.curvature import automatic

TRAIN = random_rows(60, seed=1, example_id=torch.arange(60) + 7)
QUERY = random_rows(40, seed=2)
FISHER = row_curvature(TRAIN, "fisher")


def follows(damping, seen=None):
    """A model whose losses are exactly linear in the scores at this damping."""
    found = scores(QUERY, TRAIN, method="influence", curvature=FISHER, damping=damping)

    def trained(ids):
        if seen is not None:
            seen.append(ids)
        return -found[:, ids - 7].sum(1)

    return trained


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_the_damping_that_trainings_follow_is_found(factor):
    found = calibrate(follows(factor * automatic(FISHER)), QUERY, TRAIN, curvature=FISHER, subsets=12, batch_rows=17)
    assert found.damping == pytest.approx(factor * automatic(FISHER))
    assert found.lds[found.tried.index(found.damping)] == pytest.approx(1, abs=1e-5) == max(found.lds)
    assert found.automatic == automatic(FISHER) in found.tried
    assert len(found.tried) == len(found.lds) == 9
    assert f"damping {found.damping:.3g}, {factor:.2g} times the automatic one" in str(found)


def test_rows_of_one_example_are_in_a_half_together():
    train = random_rows(60, seed=1, example_id=(torch.arange(60) * 7) % 20)
    found = scores(
        QUERY, train, method="influence", curvature=FISHER, damping=3 * automatic(FISHER), group="example_id"
    )
    calibration = calibrate(lambda ids: -found[:, ids].sum(1), QUERY, train, curvature=FISHER)
    assert max(calibration.lds) > 0.99


def test_it_hands_out_halves_of_the_ids_by_the_seed():
    seen, again, other = [], [], []
    for ids, seed in ((seen, 0), (again, 0), (other, 1)):
        calibrate(follows(1.0, ids), QUERY, TRAIN, curvature="fisher", seed=seed)
    assert len(seen) == 8
    assert all(len(ids.unique()) == len(ids) == 30 and ids.min() >= 7 and ids.max() < 67 for ids in seen)
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen, other, strict=True))
    assert len({tuple(ids.tolist()) for ids in seen}) == 8


def test_losses_that_are_no_losses_are_refused():
    with pytest.raises(ValueError, match=r"losses of the 40 queries, finite numbers; got shape \(39,\)"):
        calibrate(lambda ids: torch.zeros(39), QUERY, TRAIN, curvature="fisher")
    with pytest.raises(ValueError, match="with 40 that are not finite"):
        calibrate(lambda ids: torch.full((40,), float("nan")), QUERY, TRAIN, curvature="fisher")
