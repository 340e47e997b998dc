"""The sketches of a sink are the sketches of whole per-example gradients, whatever pieces they came in.

Float64 agrees to 1e-10 of the largest entry, far above rounding and far below any mistake; float32 to 1e-6, some ten
roundings.
"""

import pytest
import torch
from factors_of_tests import added, assert_near, dense, module, pieces, random, sink

from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.per_example import accumulate
from lightning_sketch.per_example.factors import Dense, LowRank, SparseRows

STREAMING = [kind for kind in KINDS if KINDS[kind].streams]


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 4096 numbers, and three examples side by side: every loop turns."""
    monkeypatch.setattr(accumulate, "SLAB", 4096)
    monkeypatch.setattr(accumulate, "ABREAST", 3)


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
        monkeypatch.setattr(accumulate, "SLAB", slab)
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
        LowRank(made.weight, random(150, 3, 130), random(150, 3, 24, seed=1)),
        LowRank(made.other, random(150, 1, 20), random(150, 1, 70, seed=1)),
        Dense(made.bias, random(150, 77)),
    ]
    assert_near(added(target, parts, 150), sketch.matvec(sum(dense(part, made, 150) for part in parts)), 1e-10)


@pytest.mark.parametrize("shape", [(3, 8000), (1, 9000), (8000, 3)])
def test_a_row_of_a_matrix_may_be_longer_than_a_slab(shape, small_slabs):
    made = module({"before": (11,), "weight": shape})
    target, sketch = sink("block_srht", 64, made)
    part = LowRank(made.weight, random(4, 2, shape[0]), random(4, 2, shape[1], seed=1))
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
    part = SparseRows(made.table, index.int(), random(4, 50, shape[1]))
    assert_near(
        added(target, [part], 4), sketch.matvec(dense(SparseRows(part.parameter, index, part.values), made, 4)), 1e-10
    )


def test_rows_of_a_table_may_be_longer_than_a_slab(monkeypatch):
    """They are cut into parts as wide as a chunk, which lie across two chunks unless their row begins with one."""
    monkeypatch.setattr(accumulate, "SLAB", 64)
    made = module({"table": (12, 200)})
    target, sketch = sink("block_srht", 64, made)
    part = SparseRows(made.table, torch.tensor([[8, 5, 8], [0, 1, 11]]), random(2, 3, 200))
    assert_near(added(target, [part], 2), sketch.matvec(dense(part, made, 2)), 1e-10)


def test_products_are_in_full_precision_whatever_is_switched_on(monkeypatch):
    """Flags of the program and autocast, as seen from where pieces are formed; both are back afterwards."""
    made = module(dtype=torch.float32)
    target, _ = sink("block_srht", 48, made)
    seen = []
    write = accumulate._Slabs.write

    def spy(self, *arguments):
        precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
        seen.append((precision in ("ieee", "highest"), torch.is_autocast_enabled("cpu")))
        write(self, *arguments)

    monkeypatch.setattr(accumulate._Slabs, "write", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            added(target, [Dense(made.f, random(2, 33))], 2)
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
    parts = [LowRank(made.weight, random(2, 4, rows), random(2, 4, 8, seed=seed)) for seed in (1, 2)]
    assert_near(added(target, parts, 2), sketch.matvec(dense(parts[0], made, 2) + dense(parts[1], made, 2)), 1e-10)


def test_strides_do_not_matter():
    """A gradient of a sum is one number, expanded; a layer with time first gives its tokens transposed."""
    made = module()
    target, sketch = sink("block_srht", 33, made)
    part = LowRank(made.d, torch.ones(1, dtype=torch.float64).expand(3, 4, 40), random(4, 3, 16).transpose(0, 1))
    assert_near(added(target, [part], 3), sketch.matvec(dense(part, made, 3)), 1e-10)


def test_no_tokens_are_no_gradient():
    made = module()
    target, _ = sink("block_srht", 33, made)
    none = torch.zeros(2, 0, dtype=torch.int64)
    parts = [LowRank(made.d, random(2, 0, 40), random(2, 0, 16)), SparseRows(made.table, none, random(2, 0, 6))]
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
    assert not added(target, [LowRank(made.d, left, random(3, 2, 16))], 3).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_changes_nothing(kind):
    made, there = module(), module().cuda()
    target, _ = sink(kind, 24, made)
    other, _ = sink(kind, 24, there)
    torch.testing.assert_close(added(other, pieces(there, 3), 3).cpu(), added(target, pieces(made, 3), 3))
