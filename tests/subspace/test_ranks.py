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
        assert kept.keys() == {"w", "_extra_state"}


def test_ranks_that_start_from_different_weights_are_refused(tmp_path):
    code, _, errors = ran(tmp_path, 2, "ddp", "differ")
    assert code != 0
    assert "the ranks start from different weights" in errors
