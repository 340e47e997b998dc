"""A search whose process is killed at any time loses what it has done since the last validation of the current run."""

import json
import signal

import pytest
from searches import DIMS, ended, found, searched, start, trained

from lightning_sketch.subspace._ledger import FOLDER

pytestmark = pytest.mark.slow

RUNS = [[0, 0], *([dim, seed] for dim in DIMS for seed in range(2))]


def recorded(folder):
    """Return the number of recorded runs; their files are valid JSON at any time."""
    return len([json.loads(path.read_text()) for path in folder.glob(f"{FOLDER}/*/run.json")])


def killed(folder, *kills, **options):
    """Search again and again, killed in these ways; return the runs of each time, with their first steps, and lines."""
    times = []
    for kill in [*kills, {}]:
        code, lines, errors = ended(start(folder, **options, **kill))
        assert code == (0 if not kill else -signal.SIGXFSZ if "largest" in kill else -signal.SIGKILL), errors[-2000:]
        times.append([[dim, seed, step] for dim, seed, _, step in trained(lines)])
    return times, lines


def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    """It is killed during training, while it writes a checkpoint, and before this is named; the result is the same.

    Each number has the same bits. Validation is at the end of each epoch of eight steps.
    """
    options = {"seeds": 2, "shuffle": True, "checkpoints": True}
    expected = searched(tmp_path / "alone", **options)
    kills = [{"dies": [32, 20]}, {"largest": 4000}, {"dies": "replace"}, {"dies": [32, 39]}]
    times, lines = killed(tmp_path / "killed", *kills, **options)
    assert times[0] == [[*run, 0] for run in RUNS[:4]]
    assert times[1:4] == [[[32, 0, 16]]] * 3
    assert times[4] == [[32, 0, 32], *([*run, 0] for run in RUNS[4:])]
    assert found(lines) == [expected]


def test_without_checkpoints_a_killed_run_begins_again(tmp_path):
    expected = searched(tmp_path / "alone", shuffle=True)
    times, lines = killed(tmp_path / "killed", {"dies": [32, 20]}, shuffle=True)
    assert times == [[[dim, 0, 0] for dim in dims] for dims in ([0, 4, 32], [32, 128])]
    assert found(lines) == [expected]


def test_a_doubling_search_goes_on_after_its_last_judgment(tmp_path):
    """It judges at the end of each epoch of eight steps, and is killed between two judgments, and right after one."""
    options = {"method": "doubling", "dims": [4, 512], "steps": 64, "shuffle": True, "checkpoints": True}
    expected = searched(tmp_path / "alone", **options)
    times, lines = killed(tmp_path / "killed", {"dies": [32, 44]}, {"dies": [64, 48]}, **options)
    assert times[:2] == [[[0, 0, 0], [4, 0, 0]], [[32, 0, 40]]]
    assert times[2][0] == [64, 0, 48]
    assert found(lines) == [expected]


def test_nothing_is_trained_if_all_runs_are_recorded(tmp_path):
    first = searched(tmp_path)
    code, lines, errors = ended(start(tmp_path))
    assert code == 0, errors[-2000:]
    assert trained(lines) == []
    assert found(lines) == [first]
