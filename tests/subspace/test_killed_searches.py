"""A search whose process is killed at any time loses the current run only."""

import json
import signal

import pytest
from searches import DIMS, ended, found, searched, start, trained

from lightning_sketch.subspace._runner import FILE

pytestmark = pytest.mark.slow

RUNS = [[0, 0], *([dim, seed] for dim in DIMS for seed in range(2))]


def recorded(folder):
    """Return [dim, seed] of the recorded runs, full training as a dim of 0; the file is valid JSON at any time."""
    path = folder / FILE
    entries = json.loads(path.read_text()) if path.exists() else []
    return [[0 if "full" in entry["settings"] else entry["run"]["dim"], entry["run"]["seed"]] for entry in entries]


def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    """It is killed during training, while it writes a file, and before a rename; the result has the same bits.

    Only runs that were not recorded are repeated.
    """
    expected = searched(tmp_path / "alone", seeds=2, shuffle=True)
    folder, done = tmp_path / "killed", []
    three_and_a_half = (tmp_path / "alone" / FILE).stat().st_size // 2  # of seven
    for kill, begun, kept in [
        ({"dies": [32, 20]}, 4, 3),
        ({"largest": three_and_a_half}, 1, 3),
        ({"dies": "replace"}, 1, 3),
        ({}, 4, 7),
    ]:
        code, lines, errors = ended(start(folder, seeds=2, shuffle=True, **kill))
        assert code == (0 if not kill else -signal.SIGXFSZ if "largest" in kill else -signal.SIGKILL), errors[-2000:]
        assert [run[:2] for run in trained(lines)] == RUNS[len(done) :][:begun]
        done = recorded(folder)
        assert done == RUNS[:kept]
    assert found(lines) == [expected]


def test_nothing_is_trained_if_all_runs_are_recorded(tmp_path):
    first = searched(tmp_path)
    code, lines, errors = ended(start(tmp_path))
    assert code == 0, errors[-2000:]
    assert trained(lines) == []
    assert found(lines) == [first]
