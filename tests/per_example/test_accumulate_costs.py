"""What a sink sketches, what it refuses, and the memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factors_of_tests import added, module, random, sink
from torch import nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.block_srht import BlockSRHT
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Dense, LowRank, SparseRows


def test_whole_chunks_are_sketched_once_and_parts_of_chunks_together(monkeypatch):
    """The cost: 1000 parameters of 3 numbers, from both ends in turn, take the 47 chunks they fill, not 1000."""
    made = module({f"p{i}": (3,) for i in range(1000)})
    target, _ = sink("block_srht", 64, made)
    sketched = []
    gather = BlockSRHT.gather
    monkeypatch.setattr(
        BlockSRHT, "gather", lambda self, chunks, *rest: (sketched.append(chunks), gather(self, chunks, *rest))[1]
    )
    in_order = [Dense(p, random(2, 3)) for p in made.parameters()]
    added(target, [part for pair in zip(in_order, reversed(in_order), strict=True) for part in pair], 2)
    assert sum(chunks.shape[1] for chunks in sketched) == 47


def test_only_the_chunks_that_rows_touch_are_sketched(monkeypatch):
    """A table of 100 chunks, of which one example looks up 2 and the other 1, several times each."""
    made = module({"table": (800, 8)})
    target, _ = sink("block_srht", 64, made)
    sketched = []
    gather = BlockSRHT.gather
    monkeypatch.setattr(
        BlockSRHT, "gather", lambda self, chunks, *rest: (sketched.append(chunks), gather(self, chunks, *rest))[1]
    )
    index = torch.tensor([[799, 3, 798, 0, 3], [9, 9, 10, 15, 8]])
    added(target, [SparseRows(made.table, index, random(2, 5, 8))], 2)
    assert [chunks.shape for chunks in sketched] == [(2, 2, 64)]


def test_a_parameter_that_is_not_known_is_refused():
    made, other = module(), nn.Parameter(torch.zeros(7, 5))
    target, _ = sink("block_srht", 24, made)
    target.start(2)
    with pytest.raises(ValueError, match=r"a parameter of shape \(7, 5\), none of this accumulator's"):
        target.add(Dense(other, random(2, 35)))


@pytest.mark.parametrize(
    "part",
    [
        lambda made: Dense(made.a, random(2, 4)),
        lambda made: Dense(made.a, random(2, 2), start=2),
        lambda made: Dense(made.a, random(3, 3)),
        lambda made: Dense(made.a, random(2, 3), start=-1),
        lambda made: LowRank(made.b, random(2, 1, 8), random(2, 1, 5)),
        lambda made: SparseRows(made.table, torch.zeros(2, 1, dtype=torch.int64), random(2, 1, 5)),
    ],
)
def test_a_piece_that_leaves_its_parameter_or_batch_is_refused(part):
    """It would land on a neighbor, unseen."""
    made = module()
    target, _ = sink("block_srht", 24, made)
    target.start(2)
    with pytest.raises(ValueError, match="give all of a batch, inside the parameter"):
        target.add(part(made))


def test_a_sink_without_a_batch_says_so():
    made = module()
    target, _ = sink("block_srht", 24, made)
    with pytest.raises(RuntimeError, match="call start"):
        target.rows()
    with pytest.raises(RuntimeError, match="call start"):
        target.add(Dense(made.a, random(2, 3)))


def test_sizes_and_names_must_agree():
    made = module()
    layout, parameters = Layout.of(made), dict(made.named_parameters())
    with pytest.raises(ValueError, match=f"use n={layout.n}"):
        SketchAccumulator(BlockSRHT(layout.n + 1, 8), layout, parameters)
    with pytest.raises(ValueError, match="x: not in the layout"):
        SketchAccumulator(BlockSRHT(layout.n, 8), layout, {"x": made.a})
    with pytest.raises(ValueError, match=r"b has shape \(3,\), the layout says \(7, 5\)"):
        SketchAccumulator(BlockSRHT(layout.n, 8), layout, {"b": made.a})


MEASURE = """
import json, sys, torch
from torch import nn
from lightning_sketch.per_example.factors import LowRank, SparseRows
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.autodiff.layout import Layout

def mb(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

torch.set_num_threads(1)
used = {}
for kind in sys.argv[1:]:
    for rows in (64, 8192):  # the first one loads code and small tables
        layer = nn.Linear(1024, rows, bias=False)
        layout = Layout.of(layer)
        sketch = KINDS[kind](layout.n, 32 if kind == "gaussian" else 512)
        left, right = torch.ones(4, 2, rows), torch.ones(4, 2, 1024)
        index = torch.arange(64).expand(4, 64)
        values = torch.ones(4, 64, 1024)
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the most ever held, falls to what is held now
        before = mb("VmHWM")
        sink = SketchAccumulator(sketch, layout, dict(layer.named_parameters()))
        sink.start(4)
        sink.add(LowRank(layer.weight, left, right))
        sink.add(SparseRows(layer.weight, index, values))
        sink.rows()
        used[kind] = mb("VmHWM") - before
print(json.dumps(used))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory from Linux")
def test_scratch_memory_does_not_depend_on_the_layer():
    """Four slabs of 4 MB and small things, for gradients of 4 times 32 MB."""
    command = [sys.executable, "-c", MEASURE, "block_srht", "count_sketch", "afjl"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    used = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert max(used.values()) < 18
    assert min(used.values()) > 8  # and the measurement sees two of the slabs
