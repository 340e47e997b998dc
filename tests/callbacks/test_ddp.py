"""Two processes measure what one measures on the same data, and a failure of one rank is no deadlock."""

import json
from pathlib import Path

import pytest
from forks import Started

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("ddp.py")


def found(folder, *arguments):
    """Return what each rank printed, and the errors."""
    process = Started(PROGRAM, folder, *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines], errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    ((one,), _) = found(tmp_path_factory.mktemp("one"), 1)
    return one


def test_two_processes_measure_what_one_does(alone, tmp_path):
    (first, second), _ = found(tmp_path, 2)
    assert first == second  # to the last bit; otherwise the ranks would stop at different products
    for name, numbers in alone.items():
        # float32 products are summed in another order
        for key in ("values", "rest", "layers"):
            assert first[name][key] == pytest.approx(numbers[key], rel=2e-3 if key == "rest" else 1e-4), name
        assert first[name]["steps"] == numbers["steps"]
        # rounding may change which eigenvalues it treats as known
        assert abs(first[name]["trace"][0] - numbers["trace"][0]) < 0.3 * numbers["trace"][1]


def test_a_rank_that_fails_does_not_leave_the_other_waiting(tmp_path):
    ranks, errors = found(tmp_path, 2, 1)
    assert len(ranks) == 2
    assert all(rank["hessian"]["steps"] == [0] for rank in ranks)  # the measurement at the end of the epoch failed
    assert "no measurement at step 4" in errors
    assert "another rank could not take its part" in errors
