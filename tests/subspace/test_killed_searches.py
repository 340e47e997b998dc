"""A search whose process is killed, at any moment, loses the run it was at and nothing else."""

import json
import signal

from searches import DIMS, ended, found, searched, start, trained

from lightning_sketch.subspace._runner import FILE

RUNS = [[0, 0], *([dim, seed] for dim in DIMS for seed in range(2))]


def noted(folder):
    """Whole JSON, whenever it is read; full training as a dim of 0."""
    path = folder / FILE
    entries = json.loads(path.read_text()) if path.exists() else []
    return [[0 if "full" in entry["settings"] else entry["run"]["dim"], entry["run"]["seed"]] for entry in entries]


def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_left_alone(tmp_path):
    """In the middle of training, of a file, and before a rename: three kills, four processes, the same bits.

    No run is repeated but the one that was not noted.
    """
    undisturbed = searched(tmp_path / "alone", seeds=2, shuffle=True)
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
        done = noted(folder)
        assert done == RUNS[:kept]
    assert found(lines) == [undisturbed]


def test_where_all_is_noted_nothing_is_trained(tmp_path):
    first = searched(tmp_path)
    code, lines, errors = ended(start(tmp_path))
    assert code == 0, errors[-2000:]
    assert trained(lines) == []
    assert found(lines) == [first]
