"""Several processes that share one search: each run is trained once, and one that is left by a dead process goes on."""

import signal

import pytest
from searches import DIMS, ended, found, start, trained

from lightning_sketch.subspace._ledger import FOLDER

pytestmark = pytest.mark.slow


def test_two_processes_train_each_run_once_and_find_the_same(tmp_path):
    """They begin at the same time; whoever finds a run claimed waits for its result."""
    both = [start(tmp_path, seeds=2) for _ in range(2)]
    ends = [ended(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    begun = [run[:2] for _, lines, _ in ends for run in trained(lines)]
    assert sorted(begun) == [[0, 0], *([dim, seed] for dim in DIMS for seed in range(2))]
    assert found(ends[0][1]) == found(ends[1][1])
    assert len(list((tmp_path / FOLDER).glob("*/run.json"))) == 7


def test_the_run_of_a_process_that_dies_is_taken_over(tmp_path):
    """The other process waits meanwhile, and goes on from the last validation, at step 16."""
    options = {"checkpoints": True, "shuffle": True}
    first = start(tmp_path, dies=[32, 20], slow=32, **options)
    for line in first.stdout:
        if line.startswith("TRAINS 32"):
            break
    second = start(tmp_path, **options)
    code, lines, errors = ended(second)
    assert first.communicate()[0] is not None
    assert first.returncode == -signal.SIGKILL
    assert code == 0, errors[-2000:]
    assert "another process trains" in errors
    assert [[run[0], run[3]] for run in trained(lines)] == [[32, 16], [128, 0]]
