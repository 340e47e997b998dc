"""The cost of an accumulator, the factors that it refuses, and the memory that it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from factors_of_tests import accumulator_of, added, module_of, random
from torch import nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.block_srht import BlockSRHT
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Dense, LowRank, SparseRows


class Counted(BlockSRHT, register=False):
    """A sketch that counts the chunks that it maps, (examples, chunks, numbers) at a time."""

    mapped: ClassVar[list[torch.Size]] = []

    def gather(self, chunks, which, spare, total):
        self.mapped.append(chunks.shape)
        super().gather(chunks, which, spare, total)


def mapped(module, factors, examples):
    """Return the shapes of the chunks that are mapped for these factors, with chunks of 64."""
    layout = Layout.of(module)
    accumulator = SketchAccumulator(Counted(layout.n, 64), layout, parameters=dict(module.named_parameters()))
    Counted.mapped.clear()
    added(accumulator, factors, examples)
    return list(Counted.mapped)


def test_whole_chunks_are_sketched_once_and_parts_of_chunks_together():
    """The cost: 200 parameters of 3 numbers, from both ends in turn, take the 10 chunks they fill, not 200."""
    module = module_of({f"p{i}": (3,) for i in range(200)})
    in_order = [Dense(p, random(2, 3)) for p in module.parameters()]
    in_turn = [factor for pair in zip(in_order, reversed(in_order), strict=True) for factor in pair]
    assert sum(shape[1] for shape in mapped(module, in_turn, 2)) == 10


def test_only_the_chunks_that_rows_touch_are_sketched():
    """A table of 100 chunks, of which one example looks up 2 and the other 1, several times each."""
    module = module_of({"table": (800, 8)})
    index = torch.tensor([[799, 3, 798, 0, 3], [9, 9, 10, 15, 8]])
    assert mapped(module, [SparseRows(module.table, index, random(2, 5, 8))], 2) == [(2, 2, 64)]


def test_a_parameter_that_is_not_known_is_refused():
    module, other = module_of(), nn.Parameter(torch.zeros(7, 5))
    accumulator, _ = accumulator_of("block_srht", 24, module)
    accumulator.start(2)
    with pytest.raises(ValueError, match=r"a parameter of shape \(7, 5\), none of this accumulator's"):
        accumulator.add(Dense(other, random(2, 35)))


@pytest.mark.parametrize(
    "factor",
    [
        lambda module: Dense(module.a, random(2, 4)),
        lambda module: Dense(module.a, random(2, 2), start=2),
        lambda module: Dense(module.a, random(3, 3)),
        lambda module: Dense(module.a, random(2, 3), start=-1),
        lambda module: LowRank(module.b, random(2, 1, 8), random(2, 1, 5)),
        lambda module: SparseRows(module.table, torch.zeros(2, 1, dtype=torch.int64), random(2, 1, 5)),
    ],
)
def test_a_factor_that_leaves_its_parameter_or_batch_is_refused(factor):
    """It would land on a neighbor, unseen."""
    module = module_of()
    accumulator, _ = accumulator_of("block_srht", 24, module)
    accumulator.start(2)
    with pytest.raises(ValueError, match="give all of a batch, inside the parameter"):
        accumulator.add(factor(module))


def test_an_accumulator_without_a_batch_says_so():
    module = module_of()
    accumulator, _ = accumulator_of("block_srht", 24, module)
    with pytest.raises(RuntimeError, match="call start"):
        accumulator.rows()
    with pytest.raises(RuntimeError, match="call start"):
        accumulator.add(Dense(module.a, random(2, 3)))


def test_sizes_and_names_must_agree():
    module = module_of()
    layout, parameters = Layout.of(module), dict(module.named_parameters())
    with pytest.raises(ValueError, match=f"use n={layout.n}"):
        SketchAccumulator(BlockSRHT(layout.n + 1, 8), layout, parameters=parameters)
    with pytest.raises(ValueError, match="x: not in the layout"):
        SketchAccumulator(BlockSRHT(layout.n, 8), layout, parameters={"x": module.a})
    with pytest.raises(ValueError, match=r"b has shape \(3,\), the layout says \(7, 5\)"):
        SketchAccumulator(BlockSRHT(layout.n, 8), layout, parameters={"b": module.a})


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
        accumulator = SketchAccumulator(sketch, layout, parameters=dict(layer.named_parameters()))
        accumulator.start(4)
        accumulator.add(LowRank(layer.weight, left, right))
        accumulator.add(SparseRows(layer.weight, index, values))
        accumulator.rows()
        used[kind] = mb("VmHWM") - before
print(json.dumps(used))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory from Linux")
def test_scratch_memory_does_not_depend_on_the_layer():
    """A few buffers of 4 MB and small things, for gradients of 4 times 32 MB."""
    command = [sys.executable, "-c", MEASURE, "block_srht", "count_sketch", "afjl"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    used = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert max(used.values()) < 18
    assert min(used.values()) > 4  # and the measurement sees the buffer that a kernel reads
