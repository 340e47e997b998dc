"""Two processes train what one does, and communicate `dim` numbers a step."""

import json
from pathlib import Path

import pytest
import torch
from forks import Started

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("ranks.py")


def ran(folder, *arguments):
    folder.mkdir(exist_ok=True)
    process = Started(PROGRAM, folder, *arguments)
    output, errors = process.communicate()
    return process.returncode, output, errors


def found(folder, *arguments):
    code, output, errors = ran(folder, *arguments)
    assert code == 0, errors[-3000:]
    return [json.loads(line[6:]) for line in output.splitlines() if line.startswith("FOUND ")]


def test_two_processes_train_what_one_does(tmp_path):
    """Each rank has whole weights or shards; the tolerance is for sums in other orders over ten steps of Adam."""
    (alone,) = found(tmp_path / "alone", 1, "alone")
    for kind in ("ddp", "shards"):
        ranks = found(tmp_path / kind, 2, kind)
        assert ranks[0]["w"] == ranks[-1]["w"]
        for what in ("w", "theta"):
            one, two = torch.tensor(alone[what]), torch.tensor(ranks[0][what])
            assert (one - two).norm() <= 2e-3 * one.norm(), (kind, what)
        assert ranks[0]["sharded"] == [kind == "shards"] * 4
        if kind == "ddp":
            assert ranks[0]["moved"] == [4 * 64] * 10
        kept = torch.load(tmp_path / kind / "a.ckpt", weights_only=True)["state_dict"]
        assert kept["w"].tolist() == ranks[0]["w"]
        note = {key for key in kept if key.startswith("of a SubspaceModule: call")}  # of no number
        assert kept.keys() - note == {"w", "_extra_state"}


@pytest.mark.parametrize("flags", [("head",), ("freeze",), ("accumulate",)])
def test_without_hooks_only_w_is_reduced(flags, tmp_path):
    """And what is trained in full. Of two batches that are accumulated, the last one reduces once for both."""
    (alone,) = found(tmp_path / "alone", 1, "alone", *flags)
    first, second = found(tmp_path / "ddp", 2, "ddp", *flags)
    assert first["w"] == second["w"]
    assert first["theta"] == second["theta"]
    assert first["head"] == second["head"]
    for what in ("w", "theta"):
        one, two = torch.tensor(alone[what]), torch.tensor(first[what])
        assert (one - two).norm() <= 2e-3 * one.norm(), what
    in_full = sum(torch.tensor(part).numel() for part in first["head"])
    assert sum(first["moved"]) == 10 * 4 * (64 + in_full)
    assert in_full == (180 if "head" in flags else 0)


@pytest.mark.parametrize("flags", [("hooks",), ("hooks", "accumulate"), ("hooks", "head")])
def test_hooks_see_gradients_of_the_mean_over_ranks(flags, tmp_path):
    """All n numbers are reduced then, in place of those of w, and it is said."""
    (alone,) = found(tmp_path / "alone", 1, "alone", *flags)
    code, output, errors = ran(tmp_path / "ddp", 2, "ddp", *flags)
    assert code == 0, errors[-3000:]
    first, second = (json.loads(line[6:]) for line in output.splitlines() if line.startswith("FOUND "))
    n = 65 * 17 + 18 * 10
    assert f"so all {first['n']:,} numbers are reduced, not w alone" in errors
    assert sum(first["moved"]) == 10 * 4 * n
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-2)
    for what in ("w", "theta"):
        one, two = torch.tensor(alone[what]), torch.tensor(first[what])
        assert first[what] == second[what]
        assert (one - two).norm() <= 2e-3 * one.norm(), what


def test_ranks_that_start_from_different_weights_are_refused(tmp_path):
    code, _, errors = ran(tmp_path, 2, "ddp", "differ")
    assert code != 0
    assert "the ranks start from different weights" in errors
