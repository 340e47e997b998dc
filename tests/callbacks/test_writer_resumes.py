"""However training is interrupted, each step of the lineage has exactly one row, the gradient of that step."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Started
from models import dataset
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader
from writing import Model

from lightning_sketch import GradientStore

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("writing.py")


def finished(*arguments):
    process = Started(PROGRAM, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    store = GradientStore.open(arguments[0] / "store")
    store.verify()
    return store


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole"), 1, 40).read()


def assert_same_rows(store, whole, rtol=1e-5):
    rows = store.where(stage="fit").read()
    assert rows.step.tolist() == whole.step.tolist()
    assert torch.equal(rows.example_ids.sort(1)[0], whole.example_ids.sort(1)[0])
    torch.testing.assert_close(rows.loss, whole.loss, rtol=rtol, atol=rtol)
    assert ((rows.sketches - whole.sketches).norm(dim=1) <= rtol * whole.sketches.norm(dim=1)).all()


def test_killed_at_random_times_and_resumed_from_the_newest_checkpoint(tmp_path, uninterrupted):
    """After SIGKILL the rows before the checkpoint are there, later ones are superseded, and the end is the same."""
    draw = random.Random(1)
    for _ in range(3):
        process = Started(PROGRAM, tmp_path, 1, 40)
        steps_left = draw.randint(9, 14)
        while steps_left and (line := process.stdout.readline()):
            steps_left -= line.startswith("STEP")
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
        newest = max(int(path.stem.split("=")[1]) for path in (tmp_path / "saved").glob("*.ckpt"))
        store = GradientStore.open(tmp_path / "store")
        store.verify()
        steps = store.metadata()["step"].tolist()
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= newest
    store = finished(tmp_path, 1, 40)
    assert_same_rows(store, uninterrupted)
    assert len(store.metadata()["attempt"].unique()) > 1


def test_resumed_from_an_older_checkpoint(tmp_path, uninterrupted):
    finished(tmp_path, 1, 24)
    for path in (tmp_path / "saved").glob("*.ckpt"):
        if int(path.stem.split("=")[1]) > 16:
            path.unlink()
    store = finished(tmp_path, 1, 40)
    assert_same_rows(store, uninterrupted)
    assert (store.metadata()["attempt"] == 1).sum() == 16
    assert len(GradientStore.open(tmp_path / "store", lineage=1)) == 24


def test_two_processes_write_what_one_does_and_their_number_may_change(tmp_path, uninterrupted):
    """Two processes take half batches of 8, the same steps up to the order of sums; then one process resumes."""
    first = finished(tmp_path, 2, 16)
    whole = uninterrupted.where(uninterrupted.step <= 16)
    assert len(first) == 16
    losses = first.metadata()["loss"]
    assert losses[0] == pytest.approx(float(whole.loss[0]), rel=0.5)
    assert first.metadata()["example_ids"].shape == (16, 16)
    assert first.metadata()["example_ids"][:8].flatten().sort()[0].tolist() == list(range(128))
    store = finished(tmp_path, 1, 24)
    assert store.metadata()["step"].tolist() == list(range(1, 25))
    assert store.metadata()["attempt"].tolist() == [1] * 16 + [2] * 8


def test_two_processes_write_every_example_and_mark_the_duplicate(tmp_path):
    """Of 125 examples on two ranks a distributed sampler repeats one."""
    store = finished(tmp_path, 2, 1, "validate")
    columns = store.metadata()
    assert len(store) == 126
    own = store.where(padded=False)
    assert own.metadata()["example_id"].sort()[0].tolist() == list(range(125))
    assert store.where(padded=True).metadata()["example_id"].tolist() == [0]
    assert sorted(columns["rank"].unique().tolist()) == [0, 1]
    assert len(columns["fingerprint"].unique()) == 1


def test_two_processes_fit_one_preconditioner_and_write_comparable_rows(tmp_path):
    """Each has its own examples; both write S L g with the L that rank 0 saved, as queries in a third process have."""
    store = finished(tmp_path, 2, 1, "validate", "ekfac")
    assert store.preconditioner.examples == 126
    seed_everything(3, verbose=False)
    queries = store.sketch_gradients(Model(), DataLoader(dataset(125), batch_size=25))
    rows = store.where(padded=False).read()
    order = rows.example_id.argsort()
    torch.testing.assert_close(rows.sketches[order], queries.sketches, rtol=1e-3, atol=1e-3)


def test_killed_before_the_first_checkpoint_and_started_again_as_it_was(tmp_path, uninterrupted):
    """As a scheduler does that puts a job back into its queue, twice."""
    for step in (3, 5):
        process = Started(PROGRAM, tmp_path, 1, 40, f"die={step}")
        process.communicate()
        assert process.returncode == 9
    store = finished(tmp_path, 1, 40)
    assert_same_rows(store, uninterrupted)
    assert store.metadata()["attempt"].unique().tolist() == [3]
    assert len(GradientStore.open(tmp_path / "store", lineage=2)) <= 5


def test_restarted_by_torchrun_before_and_after_the_first_checkpoint(tmp_path, uninterrupted):
    """One of two processes dies at step 3, where there is no checkpoint, and at step 13, after that of step 8."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command += [PROGRAM, tmp_path, "2", "16", "die=3", "die=13"]
    # else gloo looks for the dead processes of the start before, and fails or hangs
    alone = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=3600, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died-13").exists()
    store = GradientStore.open(tmp_path / "store")
    store.verify()
    columns = store.metadata()
    assert columns["step"].tolist() == list(range(1, 17))
    first, second = (columns["attempt"][part].unique().tolist() for part in (slice(8), slice(8, 16)))
    assert 1 < first[0] < second[0]
    assert len(first) == len(second) == 1
    ids = columns["example_ids"].sort(1)[0]
    assert torch.equal(ids[:8].flatten().sort()[0], torch.arange(128))
