"""The rows of an accumulator are the sketches of whole per-example gradients, whatever factors they came in.

Float64 agrees to 1e-10 of the largest entry, far above rounding and far below any mistake; float32 to 1e-6, some ten
roundings.
"""

import pytest
import torch
from factors_of_tests import accumulator_of, added, all_factors, assert_near, assert_sketched, dense, module_of, random
from launches import Launches
from marks import pairs, some
from torch.overrides import TorchFunctionMode

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Dense, LowRank, SparseRows

STREAMING = [kind for kind in KINDS if KINDS[kind].streams]
ONE_OF_EACH_SORT = some(KINDS, default=("block_srht", "affd"))  # one that streams, one that does not


@pytest.mark.parametrize(("kind", "dim"), pairs(KINDS, [1, 16, 33, 100]))
def test_rows_are_sketches_of_whole_gradients(kind, dim):
    """Factor by factor, so that no mistake hides behind a larger factor, and their sum in either order."""
    module = module_of()
    accumulator, sketch = accumulator_of(kind, dim, module)
    factors = all_factors(module, examples=5)
    for factor in factors:
        assert_near(added(accumulator, [factor], 5), sketch.matvec(dense(factor, module, 5)), 1e-10)
    assert_sketched(kind, dim, module, factors, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_keeps_six_digits(kind):
    module = module_of(dtype=torch.float32)
    accumulator, sketch = accumulator_of(kind, 48, module)
    factors = all_factors(module, examples=4, dtype=torch.float32)
    got = added(accumulator, factors, 4)
    assert got.dtype == torch.float32
    assert_near(got, sketch.matvec(sum(dense(factor, module, 4) for factor in factors)).float(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_multiplied_in_single_precision(dtype):
    """Under autocast too, where products would be rounded to 3 digits."""
    module = module_of(dtype=torch.float32)
    accumulator, sketch = accumulator_of("block_srht", 48, module)
    factors = all_factors(module, examples=4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = added(accumulator, factors, 4)
    assert_near(got, sketch.matvec(sum(dense(factor, module, 4) for factor in factors)).float(), 1e-6)


@pytest.mark.parametrize("kind", STREAMING)
def test_large_matrices_are_cut_into_many_parts(kind):
    """A matrix of 102,400 numbers for 18 examples: both exceed what is formed at once, 16 times 65,536 numbers."""
    module = module_of({"bias": (77,), "weight": (400, 256), "other": (20, 70)})
    factors = [
        LowRank(module.weight, random(18, 2, 400), random(18, 2, 256, seed=1)),
        LowRank(module.other, random(18, 1, 20), random(18, 1, 70, seed=1)),
        Dense(module.bias, random(18, 77)),
    ]
    assert_sketched(kind, 48, module, factors, 18)


@pytest.mark.parametrize(("dim", "kind"), pairs([256, 300, 512], ["block_srht", "count_sketch"]))
def test_batches_of_150_examples(dim, kind):
    module = module_of({"bias": (77,), "weight": (130, 24), "other": (20, 70)})
    factors = [
        LowRank(module.weight, random(150, 3, 130), random(150, 3, 24, seed=1)),
        LowRank(module.other, random(150, 1, 20), random(150, 1, 70, seed=1)),
        Dense(module.bias, random(150, 77)),
    ]
    assert_sketched(kind, dim, module, factors, 150)


def test_more_chunks_filled_in_part_than_are_kept():
    """300 parameters of 70 numbers begin inside chunks; for 16 examples, 256 chunks filled in part are kept."""
    module = module_of({f"p{i}": (70,) for i in range(300)})
    accumulator, sketch = accumulator_of("block_srht", 64, module)
    whole = random(16, 300 * 70)
    factors = [Dense(p, values) for p, values in zip(module.parameters(), whole.split(70, dim=1), strict=True)]
    assert_near(added(accumulator, factors, 16), sketch.matvec(whole), 1e-10)


@pytest.mark.parametrize("shape", [(2, 400_000), (400_000, 2)])
def test_a_row_of_a_matrix_may_be_longer_than_what_is_formed_at_once(shape):
    module = module_of({"before": (11,), "weight": shape})
    factor = LowRank(module.weight, random(4, 2, shape[0]), random(4, 2, shape[1], seed=1))
    assert_sketched("block_srht", 64, module, [factor], 4)


def test_a_chunk_may_be_longer_than_what_is_formed_at_once():
    module = module_of({"before": (11,), "weight": (1500, 1500), "table": (7, 30)})
    factors = [
        LowRank(module.weight, random(2, 1, 1500), random(2, 1, 1500, seed=1)),
        SparseRows(module.table, torch.tensor([[3, 1], [0, 0]]), random(2, 2, 30)),
    ]
    for factor in factors:
        assert_sketched("block_srht", 600_000, module, [factor], 2)


@pytest.mark.parametrize("kind", ONE_OF_EACH_SORT)
def test_batches_of_any_size_follow_each_other(kind):
    """The last batch of an epoch is smaller; a batch leaves no trace in the next, and rows that were read stay."""
    module = module_of()
    accumulator, sketch = accumulator_of(kind, 16, module)
    read = []
    for examples in (4, 1, 7, 0, 4):
        factors = all_factors(module, examples)
        expected = sketch.matvec(sum(dense(factor, module, examples) for factor in factors))
        read.append((added(accumulator, factors, examples), expected))
    for got, expected in read:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ONE_OF_EACH_SORT)
def test_rows_may_be_read_between_factors(kind):
    module = module_of()
    accumulator, sketch = accumulator_of(kind, 16, module)
    factors = all_factors(module, 3)
    accumulator.start(3)
    got = [accumulator.rows()]
    for factor in factors:
        accumulator.add(factor)
        got.append(accumulator.rows())
    assert torch.equal(got[0], torch.zeros(3, 16, dtype=torch.float64))
    for count, rows in enumerate(got[1:], 1):
        assert_near(rows, sketch.matvec(sum(dense(factor, module, 3) for factor in factors[:count])), 1e-10)


@pytest.mark.parametrize("kind", ONE_OF_EACH_SORT)
def test_a_batch_whose_rows_are_not_read_leaves_no_trace(kind):
    """As after a step that was skipped."""
    module = module_of()
    accumulator, sketch = accumulator_of(kind, 16, module)
    first, *rest = all_factors(module, 3)
    accumulator.start(3)
    accumulator.add(first)
    assert_near(added(accumulator, rest, 3), sketch.matvec(sum(dense(factor, module, 3) for factor in rest)), 1e-10)


PLACES = [(before, shape) for before in (0, 1, 64, 96) for shape in ((40, 64), (40, 32), (40, 24), (12, 200))]


@pytest.mark.parametrize(("place", "kind"), pairs(PLACES, STREAMING))
def test_rows_of_a_table_lie_anywhere_among_the_chunks(place, kind):
    """Narrower and wider than a chunk of 64, aligned or not, repeated, and more than are sketched at once."""
    before, shape = place
    module = module_of({"before": (before,), "table": shape} if before else {"table": shape})
    index = torch.randint(0, shape[0], (18, 1100), generator=torch.Generator().manual_seed(1))
    values = random(18, 1100, shape[1])
    accumulator, sketch = accumulator_of(kind, 64, module)
    expected = sketch.matvec(dense(SparseRows(module.table, index, values), module, 18))
    assert_near(added(accumulator, [SparseRows(module.table, index.int(), values)], 18), expected, 1e-10)


@pytest.mark.slow
def test_rows_of_a_table_may_be_longer_than_what_is_formed_at_once():
    """They are cut into parts, which lie across two chunks unless their row begins with one."""
    module = module_of({"before": (7,), "table": (3, 1_100_000)})
    factor = SparseRows(module.table, torch.tensor([[2, 1], [0, 0]]), random(2, 2, 1_100_000))
    assert_sketched("block_srht", 64, module, [factor], 2)


class Products(TorchFunctionMode):
    """Records, at each product of matrices, whether it has full precision and whether autocast is on."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.bmm:
            flag = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
            self.seen.append((flag in ("ieee", "highest"), torch.is_autocast_enabled("cpu")))
        return function(*args, **(kwargs or {}))


def test_products_are_in_full_precision_whatever_is_switched_on():
    """Flags of the program and autocast are off inside, and restored afterwards."""
    module = module_of(dtype=torch.float32)
    accumulator, _ = accumulator_of("block_srht", 48, module)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
            added(accumulator, [LowRank(module.d, random(2, 1, 40), random(2, 1, 16))], 2)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(products.seen) == {(True, False)}


@pytest.mark.parametrize("rows", [3, 100])
def test_a_weight_that_is_used_twice_gets_both(rows):
    """Whether it lies inside a chunk of 64 or over many."""
    module = module_of({"weight": (rows, 8), "other": (70,)})
    factors = [LowRank(module.weight, random(2, 4, rows), random(2, 4, 8, seed=seed)) for seed in (1, 2)]
    assert_sketched("block_srht", 64, module, factors, 2)


def test_strides_do_not_matter():
    """A gradient of a sum is one number, expanded; a layer with time first gives its tokens transposed."""
    module = module_of()
    factor = LowRank(module.d, torch.ones(1, dtype=torch.float64).expand(3, 4, 40), random(4, 3, 16).transpose(0, 1))
    assert_sketched("block_srht", 33, module, [factor], 3)


def test_no_tokens_are_no_gradient():
    module = module_of()
    accumulator, _ = accumulator_of("block_srht", 33, module)
    none = torch.zeros(2, 0, dtype=torch.int64)
    factors = [LowRank(module.d, random(2, 0, 40), random(2, 0, 16)), SparseRows(module.table, none, random(2, 0, 6))]
    assert torch.equal(added(accumulator, factors, 2), torch.zeros(2, 33, dtype=torch.float64))


def test_fresh_memory_is_written_before_it_is_read():
    """In this mode PyTorch fills fresh memory with NaN."""
    module = module_of()
    torch.use_deterministic_algorithms(True)
    try:
        for kind in KINDS:
            accumulator, _ = accumulator_of(kind, 24, module)
            assert added(accumulator, all_factors(module, 3), 3).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["block_srht", "count_sketch", "afjl"])
def test_on_a_gpu_buffers_are_larger_and_launches_are_fewer(kind, monkeypatch):
    """A matrix of 2^20 numbers for 8 examples: 8 buffers of 2^20 numbers, of which each costs a few operations."""
    module = module_of({"weight": (1024, 1024)}, dtype=torch.float32)
    factor = LowRank(module.weight, random(8, 2, 1024).float(), random(8, 2, 1024, seed=1).float())
    monkeypatch.setenv("LIGHTNING_SKETCH_KERNEL", "torch")
    rows, launches = [], []
    for numbers in (1 << 18, 1 << 24):
        monkeypatch.setattr("lightning_sketch.operators._hadamard.CACHED", numbers)
        accumulator, _ = accumulator_of(kind, 48, module)
        with Launches() as counted:
            rows.append(added(accumulator, [factor], 8))
        launches.append(len(counted.names))
    assert_near(rows[1], rows[0].double(), 1e-6)
    assert 3 * launches[1] < launches[0]


class Negated(BlockSRHT, register=False):
    """A kind of one's own that changes what it inherits."""

    def forward(self, x, start):
        return -super().forward(x, start)

    def adjoint(self, y, start, stop):
        return -super().adjoint(y, start, stop)


def test_a_kind_that_changes_what_it_inherits_is_one_map():
    """For long factors and short ones, and for tensors."""
    module = module_of()
    layout = Layout.of(module)
    named = dict(zip(layout.names, layout.parameters(module), strict=True))
    rows = {}
    for kind in (BlockSRHT, Negated):
        accumulator = SketchAccumulator(kind(layout.n, 24, seed=3), layout, parameters=named)
        rows[kind] = added(accumulator, all_factors(module, 3), 3)
        rows[kind] = torch.cat([rows[kind], layout.sketch(kind(layout.n, 24, seed=3), named)[None].detach()])
    torch.testing.assert_close(rows[Negated], -rows[BlockSRHT])


def test_no_graph_is_kept():
    module = module_of()
    accumulator, _ = accumulator_of("count_sketch", 24, module)
    left = random(3, 2, 40).requires_grad_()
    assert not added(accumulator, [LowRank(module.d, left, random(3, 2, 16))], 3).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_changes_nothing(kind):
    here, there = module_of(), module_of().cuda()
    one, _ = accumulator_of(kind, 24, here)
    other, _ = accumulator_of(kind, 24, there)
    rows = added(other, all_factors(there, 3), 3)
    torch.testing.assert_close(rows.cpu(), added(one, all_factors(here, 3), 3))
