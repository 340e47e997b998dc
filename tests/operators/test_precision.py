"""Results are float32 at least, and the same bits under any precision that the program around them has set."""

from contextlib import nullcontext

import pytest
import torch
from sketch_kinds import each_kind_and

from lightning_sketch.operators._hadamard import hadamard
from lightning_sketch.operators._precision import full_precision

CPU = torch.device("cpu")


@pytest.fixture
def sketch(make, kernel):
    return make(n=1000, dim=48, seed=3)


@pytest.fixture
def matmul_precision():
    """Return a function that sets the precision of products; it is restored after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@each_kind_and("half", torch.bfloat16, torch.float16)
def test_half_inputs_are_sketched_in_float32(sketch, vectors, half):
    x, y = vectors(3, 1000, dtype=half), vectors(3, 48, dtype=half)
    assert torch.equal(sketch.matvec(x), sketch.matvec(x.float()))
    assert torch.equal(sketch.rmatvec(y), sketch.rmatvec(y.float()))
    assert sketch.matvec(x).dtype == sketch.rmatvec(y).dtype == torch.float32


@each_kind_and("dtype", torch.float32, torch.float64)
def test_wider_inputs_keep_their_type(sketch, vectors, dtype):
    assert sketch.matvec(vectors(1000, dtype=dtype)).dtype == dtype
    assert sketch.rmatvec(vectors(48, dtype=dtype)).dtype == dtype


@each_kind_and("half", torch.bfloat16, torch.float16)
def test_the_gradient_of_a_half_leaf_is_half(sketch, vectors, half):
    x = vectors(3, 1000, dtype=half).requires_grad_()
    sketch.matvec(x).sum().backward()
    assert x.grad.dtype == half
    torch.testing.assert_close(x.grad, sketch.rmatvec(torch.ones(3, 48)).to(half))


def test_float32_is_float64_to_rounding(sketch, vectors):
    """Relative error in norm: a few dozen roundings of 6e-8 each."""
    x, y = vectors(1000), vectors(48)
    for product, v in [(sketch.matvec, x), (sketch.rmatvec, y)]:
        exact = product(v)
        assert (product(v.float()) - product(v.float().double())).norm() < 3e-6 * exact.norm()


@each_kind_and("dtype", torch.float32, torch.bfloat16)
def test_autocast_changes_no_bit(sketch, vectors, dtype):
    x, y = vectors(3, 1000, dtype=dtype).requires_grad_(), vectors(3, 48, dtype=dtype)
    outside = sketch.matvec(x), sketch.rmatvec(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sketch.matvec(x), sketch.rmatvec(y)
        (gradient,) = torch.autograd.grad(inside[0].sum(), x)
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, inside, outside))
    assert torch.equal(gradient, torch.autograd.grad(outside[0].sum(), x)[0])


@each_kind_and("precision", "medium", "high")
def test_float32_matmul_precision_changes_no_bit(sketch, vectors, matmul_precision, precision):
    x, y = vectors(3, 1000, dtype=torch.float32), vectors(3, 48, dtype=torch.float32)
    outside = sketch.matvec(x), sketch.rmatvec(y)
    matmul_precision(precision)
    assert all(map(torch.equal, (sketch.matvec(x), sketch.rmatvec(y)), outside))
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_full_precision_is_on_inside_and_leaves_no_trace(matmul_precision, precision, fails):
    """Also where the products of this machine have no faster mode to fall into, and after an error."""
    matmul_precision(precision)
    flags = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [flag.fp32_precision for flag in flags]
    with pytest.raises(RuntimeError) if fails else nullcontext(), torch.autocast("cpu"), full_precision(CPU):
        assert not torch.is_autocast_enabled("cpu")
        assert [flag.fp32_precision for flag in flags] == ["ieee", "ieee"]
        if fails:
            raise RuntimeError
    assert [flag.fp32_precision for flag in flags] == before
    assert torch.get_float32_matmul_precision() == precision


def test_hadamard_too_is_exact_under_autocast(vectors):
    x = vectors(1024, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hadamard(x)
    assert torch.equal(inside, hadamard(x))


def test_the_default_device_changes_no_bit(sketch, vectors):
    """Models are often built under `torch.device("meta")` or "cuda": random numbers are drawn where x is."""
    x, y = vectors(1000), vectors(48)
    outside = sketch.matvec(x), sketch.rmatvec(y)
    with torch.device("meta"):
        inside = sketch.matvec(x), sketch.rmatvec(y)
    assert all(map(torch.equal, inside, outside))


def test_the_default_dtype_changes_no_bit(sketch, vectors):
    x = vectors(1000, dtype=torch.float32)
    outside = sketch.matvec(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sketch.matvec(x), outside)
    finally:
        torch.set_default_dtype(torch.float32)
