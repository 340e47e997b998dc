"""A kernel in Triton is the reference up to rounding, for all sizes, types, ranges and batches, and under vmap and jvp.

Run by `test_triton.py` in a process of its own, in Triton's interpreter or on a CUDA device, as the environment
variable KERNELS_ON says: the interpreter is chosen when Triton is imported, and checkers of types would wrap its
functions.

Rounding: additions in float32 lose 6e-8 each, and their errors grow with the square root of how many follow each other,
a hundred or so here; 1e-6 is far below any mistake.
"""

import itertools
import os

import pytest
import torch

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import AFFD, BlockSRHT, CountSketch, kernel_in_use
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import LowRank

DEVICE = os.environ.get("KERNELS_ON", "cpu")
KINDS = [BlockSRHT, CountSketch]
DIMS = [1, 3, 200, 256, 4096, 5000, 8192, 1 << 14, 20_000, 1 << 15]


def relative(got, true):
    return float((got.double() - true).norm() / true.norm())


def assert_equal_products(sketch, start, stop, rows, dtype, draw):
    """Compare both products of a range of columns with the reference in float64."""
    x, y = draw(rows, stop - start, dtype=dtype), draw(rows + 1, sketch.dim, dtype=dtype)[1:]
    columns = sketch.columns(start, stop)
    for got, true in (
        (columns.matvec(x), sketch.forward(x.double(), start)),
        (columns.rmatvec(y), sketch.adjoint(y.double(), start, stop)),
    ):
        assert got.dtype == torch.float32
        assert relative(got, true) < 1e-6


@pytest.fixture
def vectors():
    """Return a function that draws standard normal vectors on the device, the same in every test."""

    def draw(*shape, dtype=torch.float64):
        x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return x.to(DEVICE, dtype)

    return draw


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def launches():
    from lightning_sketch.operators.kernels.triton import launches

    return launches


@pytest.fixture
def plans():
    from lightning_sketch.operators.kernels.triton import plans

    return plans


def test_triton_is_in_use(kind):
    assert kernel_in_use(kind(n=1 << 16, dim=1 << 15), DEVICE) == "triton"
    assert kernel_in_use(AFFD(n=100, dim=10), DEVICE) == "torch"
    assert kernel_in_use(BlockSRHT(n=1 << 16, dim=(1 << 15) + 1), DEVICE) == "torch"


@pytest.mark.parametrize("dim", DIMS)
def test_whole_vectors(kind, dim, vectors):
    """Of fewer numbers than a tile, and of a few chunks and a rest."""
    for n in (dim, 3 * dim + 10_001):
        assert_equal_products(kind(n=n, dim=dim, seed=3), 0, n, 1, torch.float32, vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [48, 4096, 10_000])
def test_types_and_batches(kind, dim, dtype, vectors):
    assert_equal_products(kind(n=11_000, dim=dim, seed=3), 0, 11_000, 3, dtype, vectors)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (16, 8192), (8191, 8193), (17, 19_999), (8192, 20_000), (19_984, 20_000)]
)
@pytest.mark.parametrize("dim", [100, 4096, 20_000])
def test_ranges_that_end_anywhere(kind, dim, start, stop, vectors):
    assert_equal_products(kind(n=20_000, dim=dim, seed=3), start, stop, 2, torch.float32, vectors)


@pytest.mark.parametrize("far", [1 << 31, 1 << 37, 1 << 38], ids=lambda far: f"2^{far.bit_length() - 1}")
@pytest.mark.parametrize("dim", [100, 4096])
def test_ranges_beyond_2_to_32(kind, dim, far, vectors):
    """At coordinate 2^37 the index of a word of signs passes 2^32."""
    assert_equal_products(kind(n=1 << 40, dim=dim, seed=3), far - 9000, far + 9000, 1, torch.float32, vectors)


def test_all_strides_give_the_same(kind, vectors):
    sketch, x = kind(n=10_000, dim=300, seed=3), vectors(2, 3, 10_000, dtype=torch.float32)
    expected = sketch.matvec(x)
    assert torch.equal(sketch.matvec(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert torch.equal(sketch.matvec(x.mT.contiguous().mT), expected)
    wide = torch.full((2, 3, 10_016), torch.nan)
    wide[..., 16:] = x
    assert torch.equal(sketch.matvec(wide[..., 16:]), expected)
    assert relative(sketch.matvec(x[1, 2]), expected[1, 2].double()) < 1e-6  # other programs share the work


def test_all_memory_is_written(kind, vectors):
    """In this mode PyTorch fills fresh memory with NaN, in which kernels place their sums and products."""
    sketch, x, y = kind(n=10_000, dim=300, seed=3), vectors(2, 10_000).float(), vectors(2, 300).float()
    plain = sketch.matvec(x), sketch.rmatvec(y)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(sketch.matvec(x), plain[0])
        assert torch.equal(sketch.rmatvec(y), plain[1])
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_input_is_left_as_it_was(kind, vectors):
    sketch, x, y = kind(n=10_000, dim=300, seed=3), vectors(2, 10_000).float(), vectors(2, 300).float()
    sketch.matvec(x), sketch.rmatvec(y)
    assert torch.equal(x, vectors(2, 10_000).float())
    assert torch.equal(y, vectors(2, 300).float())


def test_double_and_empty_inputs_go_to_the_reference(kind, vectors):
    sketch, x = kind(n=1000, dim=48, seed=3), vectors(2, 1000)
    assert torch.equal(sketch.matvec(x), sketch.forward(x, 0))
    assert sketch.matvec(x[:0].float()).shape == (0, 48)


def test_derivatives_and_vmap(kind, vectors):
    sketch, x, y = kind(n=9000, dim=100, seed=3), vectors(9000).float().requires_grad_(), vectors(100).float()
    (gradient,) = torch.autograd.grad(sketch.matvec(x) @ y, x)
    assert torch.equal(gradient, sketch.rmatvec(y))
    batch = vectors(9000, 3).float()
    assert torch.equal(torch.func.vmap(sketch.matvec, in_dims=1)(batch), sketch.matvec(batch.T))
    _, tangent = torch.func.jvp(sketch.matvec, (x.detach(),), (batch[:, 0],))
    assert torch.equal(tangent, sketch.matvec(batch[:, 0]))


def test_gradients_of_examples(kind, vectors):
    """Whole chunks are sketched by the kernels, and what fills a chunk only in part by PyTorch's operations."""
    layer = torch.nn.Linear(70, 300, bias=False, device=DEVICE)
    sketch = kind(n=21_000, dim=100, seed=3)
    accumulator = SketchAccumulator(sketch, Layout.of(layer), parameters={"weight": layer.weight})
    left, right = vectors(3, 2, 300).float(), vectors(3, 2, 70).float()
    accumulator.start(examples=3)
    accumulator.add(LowRank(layer.weight, left, right))
    gradients = torch.einsum("etr,etc->erc", left.double(), right.double()).flatten(1)
    assert relative(accumulator.rows(), sketch.matvec(gradients)) < 1e-6


def test_the_compiled_operation_keeps_the_rules_of_pytorch(kind, vectors):
    """Its shapes, strides, aliasing and gradient registration, as PyTorch itself checks them."""
    for start, stop, adjoint, size in [(0, 9000, False, 9000), (20, 70, False, 50), (20, 70, True, 33)]:
        x = vectors(2, size).float().requires_grad_()
        torch.library.opcheck(torch.ops.lightning_sketch.apply, (x, kind.kind, 9000, 33, 3, start, stop, adjoint))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("log_chunk", range(16))
def test_a_plan_transforms_each_bit_of_a_chunk_once(plans, log_chunk, bytes_each, backward):
    plan = plans.plan_of(1 << log_chunk, bytes_each, backward)
    constants = plans.constants(plan, 1 << log_chunk)
    masks = [constants[f"BITS_{stage}"] for stage in "ABC"]
    assert sum(masks) == (1 << min(log_chunk, plan.bits)) - 1
    assert not any(a & b for a, b in itertools.combinations(masks, 2))
    for held in plan.stages:
        assert len(set(held)) + 5 + plan.warps.bit_length() - 1 == plan.bits


@pytest.mark.parametrize("dim", [256, 1 << 15])
def test_other_plans_give_the_same(launches, plans, dim, vectors):
    """Larger and smaller tiles, with a tile loaded ahead; a chunk may be a part of a tile or several of them."""
    sketch, x, y = BlockSRHT(n=70_000, dim=dim, seed=3), vectors(2, 70_000).float(), vectors(2, dim).float()
    for bits, prefetch in itertools.product((13, 14), (False, True)):
        plan = plans.Plan(bits, 1 << bits - 10, plans.stages_of(bits, 4), 2, prefetch)
        there = launches.block_srht_forward(sketch, x, 0, plan)
        back = launches.block_srht_adjoint(sketch, y, 0, 70_000, plan)
        assert relative(there, sketch.forward(x.double(), 0)) < 1e-6
        assert relative(back, sketch.adjoint(y.double(), 0, 70_000)) < 1e-6
