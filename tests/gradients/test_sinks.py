"""The sketches of a sink are the sketches of whole per-example gradients, whatever pieces they came in.

Dense truth is formed here by `einsum` and `index_add_`. Float64 agrees to 1e-10 of the largest entry, far above
rounding and far below any mistake; float32 to 1e-6, some ten roundings.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sketch.gradients import slabs
from lightning_sketch.gradients.pieces import Full, Outer, Rows
from lightning_sketch.gradients.sinks import SketchSink
from lightning_sketch.operators.block_srht import BlockSRHT
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.params import Layout

STREAMING = [kind for kind in KINDS if KINDS[kind].streams]
SHAPES = {"a": (3,), "b": (7, 5), "table": (11, 6), "c": (1,), "d": (40, 16), "e": (2, 3), "f": (33,)}
"""Of parameters: with chunks of 33 to 128 numbers, they begin and end inside chunks, and several share one."""


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 4096 numbers, and three examples side by side: every loop turns."""
    monkeypatch.setattr(slabs, "SLAB", 4096)
    monkeypatch.setattr(slabs, "ABREAST", 3)


def module(shapes=SHAPES, dtype=torch.float64):
    made = nn.Module()
    for name, shape in shapes.items():
        made.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return made


def sink(kind, dim, made):
    layout = Layout.of(made)
    sketch = KINDS[kind](layout.n, dim, seed=3)
    return SketchSink(sketch, layout, dict(made.named_parameters())), sketch


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pieces(made, examples, tokens=4, dtype=torch.float64):
    """Of every sort, in backward order: some twice, some for a part of the parameter; indices repeat, unordered."""
    index = torch.randint(3, 11, (examples, tokens), generator=torch.Generator().manual_seed(1))
    index[:, 1] = index[:, 0]
    return [
        Full(made.f, random(examples, 33, seed=1, dtype=dtype)),
        Outer(made.d, random(examples, tokens, 40, dtype=dtype), random(examples, tokens, 16, seed=2, dtype=dtype)),
        Outer(made.d, random(examples, 1, 9, dtype=dtype), random(examples, 1, 16, seed=3, dtype=dtype), start=21),
        Full(made.d, random(examples, 100, seed=4, dtype=dtype), start=333),
        Rows(made.table, index, random(examples, tokens, 6, seed=5, dtype=dtype)),
        Outer(made.table, random(examples, tokens, 11, dtype=dtype), random(examples, tokens, 6, seed=6, dtype=dtype)),
        Full(made.c, random(examples, 1, seed=7, dtype=dtype)),
        Outer(made.b, random(examples, 2, 7, dtype=dtype), random(examples, 2, 5, seed=8, dtype=dtype)),
        Full(made.a, random(examples, 3, seed=9, dtype=dtype)),
    ]


def dense(piece, made, examples, dtype=torch.float64):
    """The flat gradient of every example."""
    sizes = {id(p): p.numel() for p in made.parameters()}
    start = 0
    for p in made.parameters():
        if p is piece.parameter:
            break
        start += p.numel()
    out = torch.zeros(examples, sum(sizes.values()), dtype=dtype)
    if isinstance(piece, Rows):
        for row, index, values in zip(out, piece.index, piece.values.to(dtype), strict=True):
            row[start : start + piece.parameter.numel()].view(piece.parameter.shape).index_add_(0, index, values)
        return out
    if isinstance(piece, Outer):
        values = torch.einsum("bto,bti->boi", piece.left.to(dtype), piece.right.to(dtype)).flatten(1)
    else:
        values = piece.values.to(dtype)
    out[:, start + piece.start : start + piece.start + values.shape[1]] = values
    return out


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def added(target, parts, examples):
    target.start(examples)
    for part in parts:
        target.add(part)
    return target.rows()


@pytest.mark.parametrize("dim", [1, 16, 33, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_sketches_of_whole_gradients(kind, dim, small_slabs):
    """Piece by piece, so that no mistake hides behind a larger piece, and their sum."""
    made = module()
    target, sketch = sink(kind, dim, made)
    parts = pieces(made, examples=5)
    for part in parts:
        assert_near(added(target, [part], 5), sketch.matvec(dense(part, made, 5)), 1e-10)
    assert_near(added(target, parts, 5), sketch.matvec(sum(dense(part, made, 5) for part in parts)), 1e-10)


@pytest.mark.parametrize("kind", STREAMING)
def test_the_order_and_the_size_of_slabs_change_nothing(kind, monkeypatch):
    made = module()
    parts = pieces(made, examples=5)
    target, sketch = sink(kind, 24, made)
    expected = sketch.matvec(sum(dense(part, made, 5) for part in parts))
    for slab in (1, 64, 100, 1 << 12, 1 << 19):
        monkeypatch.setattr(slabs, "SLAB", slab)
        target, _ = sink(kind, 24, made)
        assert_near(added(target, parts, 5), expected, 1e-10)
        assert_near(added(target, parts[::-1], 5), expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_keeps_six_digits(kind):
    made = module(dtype=torch.float32)
    target, sketch = sink(kind, 48, made)
    parts = pieces(made, examples=4, dtype=torch.float32)
    got = added(target, parts, 4)
    assert got.dtype == torch.float32
    assert_near(got, sketch.matvec(sum(dense(part, made, 4) for part in parts)).float(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_multiplied_in_single_precision(dtype):
    """Under autocast too, where products would be rounded to 3 digits."""
    made = module(dtype=torch.float32)
    target, sketch = sink("block_srht", 48, made)
    parts = pieces(made, examples=4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = added(target, parts, 4)
    assert_near(got, sketch.matvec(sum(dense(part, made, 4) for part in parts)).float(), 1e-6)


@pytest.mark.parametrize("dim", [256, 300, 512])
@pytest.mark.parametrize("kind", ["block_srht", "count_sketch"])
def test_large_matrices_go_through_many_slabs(kind, dim):
    """At the slab size that users have; 150 examples do not fit into a slab side by side."""
    made = module({"bias": (77,), "weight": (130, 24), "other": (20, 70)})
    target, sketch = sink(kind, dim, made)
    parts = [
        Outer(made.weight, random(150, 3, 130), random(150, 3, 24, seed=1)),
        Outer(made.other, random(150, 1, 20), random(150, 1, 70, seed=1)),
        Full(made.bias, random(150, 77)),
    ]
    assert_near(added(target, parts, 150), sketch.matvec(sum(dense(part, made, 150) for part in parts)), 1e-10)


@pytest.mark.parametrize("shape", [(3, 8000), (1, 9000), (8000, 3)])
def test_a_row_of_a_matrix_may_be_longer_than_a_slab(shape, small_slabs):
    made = module({"before": (11,), "weight": shape})
    target, sketch = sink("block_srht", 64, made)
    part = Outer(made.weight, random(4, 2, shape[0]), random(4, 2, shape[1], seed=1))
    assert_near(added(target, [part], 4), sketch.matvec(dense(part, made, 4)), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_size_follow_each_other(kind):
    """The last batch of an epoch is smaller; no trace of one batch is left in the next; and what was read stays."""
    made = module()
    target, sketch = sink(kind, 16, made)
    kept = []
    for examples in (4, 1, 7, 0, 4):
        parts = pieces(made, examples)
        expected = sketch.matvec(sum(dense(part, made, examples) for part in parts))
        kept.append((added(target, parts, examples), expected))
    for got, expected in kept:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_read_between_pieces(kind):
    made = module()
    target, sketch = sink(kind, 16, made)
    parts = pieces(made, 3)
    target.start(3)
    got = [target.rows()]
    for part in parts:
        target.add(part)
        got.append(target.rows())
    assert torch.equal(got[0], torch.zeros(3, 16, dtype=torch.float64))
    for count, rows in enumerate(got[1:], 1):
        assert_near(rows, sketch.matvec(sum(dense(part, made, 3) for part in parts[:count])), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_nobody_reads_leaves_no_trace(kind):
    """A step that was skipped."""
    made = module()
    target, sketch = sink(kind, 16, made)
    first, *rest = pieces(made, 3)
    target.start(3)
    target.add(first)
    assert_near(added(target, rest, 3), sketch.matvec(sum(dense(part, made, 3) for part in rest)), 1e-10)


@pytest.mark.parametrize("shape", [(40, 64), (40, 32), (40, 24), (12, 200)])
@pytest.mark.parametrize("before", [0, 1, 64, 96])
@pytest.mark.parametrize("kind", STREAMING)
def test_rows_of_a_table_lie_anywhere_among_the_chunks(kind, before, shape, small_slabs):
    """Narrower and wider than a chunk of 64, aligned or not; few distinct rows, so that most of them repeat."""
    made = module({"before": (before,), "table": shape} if before else {"table": shape})
    target, sketch = sink(kind, 64, made)
    index = torch.randint(0, shape[0], (4, 50), generator=torch.Generator().manual_seed(1))
    part = Rows(made.table, index.int(), random(4, 50, shape[1]))
    assert_near(
        added(target, [part], 4), sketch.matvec(dense(Rows(part.parameter, index, part.values), made, 4)), 1e-10
    )


def test_rows_of_a_table_may_be_longer_than_a_slab(monkeypatch):
    """They are cut into parts as wide as a chunk, which lie across two chunks unless their row begins with one."""
    monkeypatch.setattr(slabs, "SLAB", 64)
    made = module({"table": (12, 200)})
    target, sketch = sink("block_srht", 64, made)
    part = Rows(made.table, torch.tensor([[8, 5, 8], [0, 1, 11]]), random(2, 3, 200))
    assert_near(added(target, [part], 2), sketch.matvec(dense(part, made, 2)), 1e-10)


def test_products_are_in_full_precision_whatever_is_switched_on(monkeypatch):
    """Flags of the program and autocast, as seen from where pieces are formed; both are back afterwards."""
    made = module(dtype=torch.float32)
    target, _ = sink("block_srht", 48, made)
    seen = []
    write = slabs.Slabs.write

    def spy(self, *arguments):
        precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
        seen.append((precision in ("ieee", "highest"), torch.is_autocast_enabled("cpu")))
        write(self, *arguments)

    monkeypatch.setattr(slabs.Slabs, "write", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            added(target, [Full(made.f, random(2, 33))], 2)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(True, False)]


@pytest.mark.parametrize("rows", [3, 100])
def test_a_weight_that_is_used_twice_gets_both(rows):
    """Whether it lies inside a chunk of 64 or over many."""
    made = module({"weight": (rows, 8), "other": (70,)})
    target, sketch = sink("block_srht", 64, made)
    parts = [Outer(made.weight, random(2, 4, rows), random(2, 4, 8, seed=seed)) for seed in (1, 2)]
    assert_near(added(target, parts, 2), sketch.matvec(dense(parts[0], made, 2) + dense(parts[1], made, 2)), 1e-10)


def test_strides_do_not_matter():
    """A gradient of a sum is one number, expanded; a layer with time first gives its tokens transposed."""
    made = module()
    target, sketch = sink("block_srht", 33, made)
    part = Outer(made.d, torch.ones(1, dtype=torch.float64).expand(3, 4, 40), random(4, 3, 16).transpose(0, 1))
    assert_near(added(target, [part], 3), sketch.matvec(dense(part, made, 3)), 1e-10)


def test_no_tokens_are_no_gradient():
    made = module()
    target, _ = sink("block_srht", 33, made)
    none = torch.zeros(2, 0, dtype=torch.int64)
    parts = [Outer(made.d, random(2, 0, 40), random(2, 0, 16)), Rows(made.table, none, random(2, 0, 6))]
    assert torch.equal(added(target, parts, 2), torch.zeros(2, 33, dtype=torch.float64))


def test_nothing_old_is_read():
    """In this mode PyTorch fills fresh memory with NaN."""
    made = module()
    torch.use_deterministic_algorithms(True)
    try:
        for kind in KINDS:
            target, _ = sink(kind, 24, made)
            assert added(target, pieces(made, 3), 3).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_graph_is_kept():
    made = module()
    target, _ = sink("count_sketch", 24, made)
    left = random(3, 2, 40).requires_grad_()
    assert not added(target, [Outer(made.d, left, random(3, 2, 16))], 3).requires_grad


def test_whole_chunks_are_sketched_once_and_parts_of_chunks_together(monkeypatch):
    """The cost: 1000 parameters of 3 numbers, from both ends in turn, take the 47 chunks they fill, not 1000."""
    made = module({f"p{i}": (3,) for i in range(1000)})
    target, _ = sink("block_srht", 64, made)
    sketched = []
    gather = BlockSRHT.gather
    monkeypatch.setattr(
        BlockSRHT, "gather", lambda self, chunks, *rest: (sketched.append(chunks), gather(self, chunks, *rest))[1]
    )
    in_order = [Full(p, random(2, 3)) for p in made.parameters()]
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
    added(target, [Rows(made.table, index, random(2, 5, 8))], 2)
    assert [chunks.shape for chunks in sketched] == [(2, 2, 64)]


def test_a_parameter_that_is_not_known_is_refused():
    made, other = module(), nn.Parameter(torch.zeros(7, 5))
    target, _ = sink("block_srht", 24, made)
    target.start(2)
    with pytest.raises(ValueError, match=r"a parameter of shape \(7, 5\), none of this sink's"):
        target.add(Full(other, random(2, 35)))


@pytest.mark.parametrize(
    "part",
    [
        lambda made: Full(made.a, random(2, 4)),
        lambda made: Full(made.a, random(2, 2), start=2),
        lambda made: Full(made.a, random(3, 3)),
        lambda made: Full(made.a, random(2, 3), start=-1),
        lambda made: Outer(made.b, random(2, 1, 8), random(2, 1, 5)),
        lambda made: Rows(made.table, torch.zeros(2, 1, dtype=torch.int64), random(2, 1, 5)),
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
        target.add(Full(made.a, random(2, 3)))


def test_sizes_and_names_must_agree():
    made = module()
    layout, parameters = Layout.of(made), dict(made.named_parameters())
    with pytest.raises(ValueError, match=f"use n={layout.n}"):
        SketchSink(BlockSRHT(layout.n + 1, 8), layout, parameters)
    with pytest.raises(ValueError, match="x: not in the layout"):
        SketchSink(BlockSRHT(layout.n, 8), layout, {"x": made.a})
    with pytest.raises(ValueError, match=r"b has shape \(3,\), the layout says \(7, 5\)"):
        SketchSink(BlockSRHT(layout.n, 8), layout, {"b": made.a})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_changes_nothing(kind):
    made, there = module(), module().cuda()
    target, _ = sink(kind, 24, made)
    other, _ = sink(kind, 24, there)
    torch.testing.assert_close(added(other, pieces(there, 3), 3).cpu(), added(target, pieces(made, 3), 3))


MEASURE = """
import json, sys, torch
from torch import nn
from lightning_sketch.gradients.pieces import Outer, Rows
from lightning_sketch.gradients.sinks import SketchSink
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.params import Layout

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
        sink = SketchSink(sketch, layout, dict(layer.named_parameters()))
        sink.start(4)
        sink.add(Outer(layer.weight, left, right))
        sink.add(Rows(layer.weight, index, values))
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
