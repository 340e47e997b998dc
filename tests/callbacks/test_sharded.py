"""Two processes, with shards of the parameters or all of them, write the rows that one process does."""

from pathlib import Path

import pytest
import torch
from forks import Started

from lightning_sketch import GradientStore

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("sharded.py")


def ran(folder, *arguments):
    """Return the exit code and the errors."""
    process = Started(PROGRAM, folder, *arguments)
    _, errors = process.communicate()
    return process.returncode, errors


def rows_of(folder, *arguments):
    code, errors = ran(folder, *arguments)
    assert code == 0, errors[-3000:]
    return GradientStore.open(folder / "store").read()


def test_two_ranks_write_what_one_process_does(tmp_path):
    """All see the same 32 examples per step, with whole parameters or shards; float32 sums differ in their order."""
    alone = rows_of(tmp_path / "alone", 1)
    for name, *options in (("shards",), ("whole", "ddp")):
        rows = rows_of(tmp_path / name, 2, *options)
        assert rows.step.tolist() == [1, 2, 3, 4, 5]
        assert ((rows.sketches - alone.sketches).norm(dim=1) <= 1e-5 * alone.sketches.norm(dim=1)).all()
        assert rows.loss.tolist() == pytest.approx(alone.loss.tolist(), rel=1e-5)
        known = torch.zeros_like(alone.step) if name == "shards" else alone.metadata()["fingerprint"]
        assert torch.equal(rows.metadata()["fingerprint"][:1], known[:1])  # later weights differ by rounding


def test_two_ranks_give_each_example_the_row_that_one_process_does(tmp_path):
    """Four steps have 32 examples, the last has 27, or 28 of which one is a duplicate."""
    alone = rows_of(tmp_path / "alone", 1, "example")
    both = rows_of(tmp_path / "both", 2, "ddp", "example")
    assert alone.example_id.tolist() == list(range(155))
    assert both.where(padded=True).example_id.tolist() == [0]
    own = both.where(padded=False)
    order = own.example_id.argsort()
    assert own.example_id[order].tolist() == list(range(155))
    assert torch.equal(own.metadata()["step"][order], alone.step)
    assert own.metadata()["rank"][order].tolist() == [i % 2 for i in range(155)]
    assert ((own.sketches[order] - alone.sketches).norm(dim=1) <= 1e-4 * alone.sketches.norm(dim=1)).all()
    for step in range(1, 6):  # the ranks' weights are the same to the last bit
        assert len(own.where(step=step).metadata()["fingerprint"].unique()) == 1


def test_parameters_that_hooks_do_not_support_on_one_rank_are_left_out_on_all(tmp_path):
    """The first batch of rank 1 takes another path through the module than that of rank 0."""
    code, errors = ran(tmp_path, 2, "ddp", "example", "uneven")
    assert code == 0, errors[-3000:]
    assert "rows leave out 1 of 4 parameters" in errors
    store = GradientStore.open(tmp_path / "store")
    assert list(store.spec.left_out) == ["net.3.weight"]
    assert store.spec.parameters.names == ("net.1.weight", "net.1.bias", "net.3.bias")
    assert sorted(store.metadata()["rank"].unique().tolist()) == [0, 1]


def test_rows_of_examples_are_refused_under_sharding_with_the_reason(tmp_path):
    code, errors = ran(tmp_path, 2, "validate")
    assert code != 0
    assert "an example's gradient needs whole parameters" in errors
