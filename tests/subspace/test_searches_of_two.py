"""A search on two processes: both do the same runs and make the same decisions, and one of them records the runs."""

import pytest
from searches import DIMS, TORCHRUN, ended, found, searched, start, trained

from lightning_sketch.subspace._ledger import FOLDER

pytestmark = pytest.mark.slow


def ranks_of(folder, *launcher, **options):
    """Search on two processes; return both results, and [dim, seed] of the runs, full training as a dim of 0."""
    code, lines, errors = ended(start(folder, *launcher, devices=2, **options))
    assert code == 0, errors[-3000:]
    begun = [[run[:2] for run in trained(lines) if run[2] == rank] for rank in (0, 1)]
    assert begun[0] == begun[1]
    assert {rest for word, rest in lines if word == "WRITES"} <= {"0"}
    one, two = found(lines)
    assert {**one, "own": []} == {**two, "own": []}
    return one, two, begun[0]


def test_two_processes_search_as_one_does_and_torchrun_goes_on_where_they_were(tmp_path):
    """The batches are the same, in two halves; sums in other orders may change the class of three of 360 digits."""
    alone = searched(tmp_path / "alone")
    two, _, begun = ranks_of(tmp_path / "two", dims=DIMS[:2])
    assert begun == [[0, 0], [4, 0], [32, 0]]
    more, _, begun = ranks_of(tmp_path / "two", *TORCHRUN)
    assert begun == [[128, 0]]
    assert more["numbers"] == two["numbers"] == pytest.approx(alone["numbers"], abs=3 / 360)
    assert more["results"]["value"][:2] == two["results"]["value"]
    assert more["results"]["value"] == pytest.approx(alone["results"]["value"], abs=3 / 360)
    assert more["suggestion"] == alone["suggestion"] == 128
    assert [path.name for path in (tmp_path / "two").iterdir()] == [FOLDER]
    assert len(list((tmp_path / "two" / FOLDER).glob("*/run.json"))) == 4


def test_ranks_that_see_other_metrics_double_and_stop_together(tmp_path):
    """One validates on the digits 0 to 4, the other on 5 to 9; both use the mean, and ask the same dimensions."""
    options = {"halved": True, "shuffle": True, "method": "doubling", "dims": [4, 512]}
    one, two, begun = ranks_of(tmp_path, **options)
    last, half, *more = one["results"]["dim"]
    assert begun == [[0, 0], [4, 0], [half, 0], *([dim, 0] for dim in more)]
    assert half == last // 2
    means = {}
    for (dim, own, value), (as_many, other, same) in zip(one["own"], two["own"], strict=True):
        assert (value, dim) == (same, as_many)
        means[dim, value is None] = (own + other) / 2
        assert value is None or value == pytest.approx(means[dim, False])
    assert len(means) > 5
    assert sum(a[1] != b[1] for a, b in zip(one["own"], two["own"], strict=True)) > len(one["own"]) / 2
    assert one["numbers"][0] == pytest.approx(means[0, True])
    assert one["results"]["value"] == pytest.approx([means[last, False], *(means[dim, True] for dim in (half, *more))])
    assert one["results"]["value"][0] >= one["numbers"][2]
    again, _, begun = ranks_of(tmp_path, **options)
    assert begun == []
    assert again == {**one, "own": []}


def test_what_is_recorded_on_the_first_machine_is_valid_for_the_second(tmp_path):
    first, _, _ = ranks_of(tmp_path, apart=True, dims=[4], steps=8)
    again, _, begun = ranks_of(tmp_path, apart=True, dims=[4], steps=8)
    assert begun == []
    assert again == first


def test_ranks_that_would_start_from_different_weights_do_not_start(tmp_path):
    code, lines, errors = ended(start(tmp_path, devices=2, differ=True))
    assert code != 0
    assert "the ranks start from different weights" in errors
    assert trained(lines) == []


def test_a_rank_without_memory_ends_the_search_and_the_next_leaves_that_run_out(tmp_path):
    """The other rank waits for it in a sum of gradients, so that the search has to end."""
    options = {"steps": 8, "dims": DIMS, "full": [32, 1]}
    code, _, errors = ended(start(tmp_path, devices=2, **options))
    assert code != 0
    assert "rank 1 of 2 ran out of memory at dim 32" in errors
    code, lines, errors = ended(start(tmp_path, devices=2, **options))
    assert code == 0, errors[-3000:]
    assert {run[0] for run in trained(lines)} == {128}
    for one in found(lines):
        assert one["results"]["status"] == ["done", "out of memory", "done"]


def test_two_processes_go_on_from_a_checkpoint_as_if_they_had_not_been_killed(tmp_path):
    """Both die in the twentieth step of a run, after validations at steps 8 and 16."""
    options = {"dims": [32], "devices": 2, "checkpoints": True}
    whole, _, _ = ranks_of(tmp_path / "whole", dims=[32], checkpoints=True)
    code, _, _ = ended(start(tmp_path / "killed", **options, dies=[32, 20]))
    assert code != 0
    code, lines, errors = ended(start(tmp_path / "killed", **options))
    assert code == 0, errors[-3000:]
    assert sorted(trained(lines)) == [[32, 0, 0, 16], [32, 0, 1, 16]]
    assert found(lines)[0] == whole
