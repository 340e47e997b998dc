"""In compiled code a sketch is one opaque operation: no graph break, the same numbers, the same gradients.

Run by `test_compile.py` in a process of its own: the checkers of types cannot be traced.
"""

import shutil

import pytest
import torch
from launches import Launches

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT, CountSketch


@pytest.fixture
def sketch(make):
    torch._dynamo.reset()
    return make(n=100, dim=33, seed=(1 << 63) - 1)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def test_compiled_products_are_the_plain_ones(sketch, vectors):
    x, y = vectors(2, 100), vectors(2, 33)
    assert torch.equal(compiled(lambda x: sketch.matvec(x))(x), sketch.matvec(x))
    assert torch.equal(compiled(lambda y: sketch.T.matvec(y))(y), sketch.rmatvec(y))


def test_compiled_columns_are_the_plain_ones(sketch, vectors):
    x, columns = vectors(2, 50), sketch.columns(30, 80)
    got = compiled(lambda x: columns.rmatvec(columns.matvec(x)))(x)
    torch.testing.assert_close(got, columns.rmatvec(columns.matvec(x)))


def test_compiled_code_differentiates_as_plain_code_does(sketch, vectors):
    """The gradient of ||S(2 x)||² is 8 SᵀS x."""
    x = vectors(2, 100).requires_grad_()
    compiled(lambda x: sketch.matvec(2 * x).square().sum())(x).backward()
    torch.testing.assert_close(x.grad, 8 * sketch.rmatvec(sketch.matvec(x.detach())))


def test_compiled_half_inputs_are_sketched_in_float32(vectors):
    sketch = BlockSRHT(n=100, dim=33, seed=3)
    x = vectors(2, 100, dtype=torch.bfloat16).requires_grad_()
    y = compiled(lambda x: sketch.matvec(x))(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(x.grad, sketch.rmatvec(torch.ones(2, 33)).bfloat16())


def test_a_compiled_sketch_of_tensors_is_the_plain_one(vectors):
    layout = Layout(("a", "b"), (torch.Size([3, 4]), torch.Size([5])))
    a, b, sketch = vectors(3, 4), vectors(5), BlockSRHT(n=17, dim=6)
    got = compiled(lambda a, b: layout.sketch(sketch, {"a": a, "b": b}))(a, b)
    torch.testing.assert_close(got, layout.sketch(sketch, {"a": a, "b": b}))


@pytest.mark.parametrize("kind", [BlockSRHT, CountSketch])
def test_compiled_products_in_float32_are_the_plain_ones(kind, vectors):
    """Those that kernels compute."""
    sketch, x, y = kind(n=9000, dim=100, seed=3), vectors(2, 9000).float(), vectors(2, 100).float()
    x.requires_grad_()
    got = compiled(lambda x: sketch.matvec(2 * x))(x)
    got.backward(y)
    assert torch.equal(got, sketch.matvec(2 * x))
    assert torch.equal(x.grad, 2 * sketch.rmatvec(y))


def test_a_batch_of_another_size_needs_no_other_graph(vectors):
    """Compiled with dynamic shapes, one graph works for every batch."""
    sketch, graphs = BlockSRHT(n=100, dim=33, seed=3), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    function = compiled(lambda x: sketch.matvec(x), count, dynamic=True)
    for size in (2, 3, 5):
        torch.testing.assert_close(function(vectors(size, 100)), sketch.matvec(vectors(size, 100)))
    assert len(graphs) == 1


def test_vmap_compiles(sketch, vectors):
    x = vectors(100, 3)
    torch.testing.assert_close(compiled(torch.func.vmap(sketch.matvec, in_dims=1))(x), sketch.matvec(x.T))


def test_the_operation_keeps_the_rules_of_pytorch(sketch, vectors):
    """Its shapes, strides, aliasing and gradient registration, as PyTorch itself checks them."""
    for start, stop, adjoint, size in [(0, 100, False, 100), (20, 70, False, 50), (20, 70, True, 33)]:
        x = vectors(2, size).requires_grad_()
        fields = sketch.kind, sketch.n, sketch.dim, sketch.seed, start, stop, adjoint
        torch.library.opcheck(torch.ops.lightning_sketch.apply, (x, *fields))


def test_a_batch_of_the_operation_is_one_call(sketch, vectors):
    """In place of one for each vector."""
    x, fields = vectors(100, 3), (sketch.kind, 100, 33, sketch.seed, 0, 100, False)
    with Launches() as counted:
        got = torch.vmap(lambda x: torch.ops.lightning_sketch.apply(x, *fields), in_dims=1)(x)
    torch.testing.assert_close(got, sketch.matvec(x.T))
    assert [name for name in counted.names if "lightning_sketch" in name] == ["lightning_sketch.apply.default"]


def test_jvp_in_compiled_code_is_refused(vectors):
    """Forward mode would take the derivative of an opaque operation for zero, without an error."""
    sketch, (x, v) = BlockSRHT(n=100, dim=33, seed=3), vectors(2, 100)
    with pytest.raises(RuntimeError):
        compiled(lambda x, v: torch.func.jvp(sketch.matvec, (x,), (v,))[1])(x, v)


@pytest.mark.skipif(not shutil.which("g++"), reason="the default backend needs a C++ compiler")
def test_the_default_backend_compiles_it(vectors):
    sketch, x = BlockSRHT(n=100, dim=33, seed=3), vectors(2, 100).requires_grad_()
    compiled(lambda x: sketch.matvec(2 * x).square().sum(), backend="inductor")(x).backward()
    torch.testing.assert_close(x.grad, 8 * sketch.rmatvec(sketch.matvec(x.detach())))
