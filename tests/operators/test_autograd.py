"""A sketch is differentiable to any order, in both modes, under vmap, and keeps nothing for the backward pass."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

N, DIM = 12, 5


@pytest.fixture
def sketch(make):
    return make(n=N, dim=DIM, seed=3)


@pytest.fixture
def gram(sketch):
    """Return SᵀS as a dense matrix."""
    matrix = sketch.as_matrix(dtype=torch.float64)
    return matrix.T @ matrix


def test_backward_of_matvec_is_rmatvec(sketch, vectors):
    x, y = vectors(3, N).requires_grad_(), vectors(3, DIM)
    sketch.matvec(x).backward(y)
    torch.testing.assert_close(x.grad, sketch.rmatvec(y))


def test_backward_of_rmatvec_is_matvec(sketch, vectors):
    x, y = vectors(3, N), vectors(3, DIM).requires_grad_()
    sketch.rmatvec(y).backward(x)
    torch.testing.assert_close(y.grad, sketch.matvec(x))


@pytest.mark.parametrize("way", ["matvec", "rmatvec"])
def test_derivatives_are_those_of_finite_differences(sketch, vectors, way):
    """Once in reverse and in forward mode; then twice, reverse over reverse and forward over reverse."""
    product = getattr(sketch.columns(1, N - 1), way)
    x = vectors(N - 2 if way == "matvec" else DIM).requires_grad_()
    assert gradcheck(product, x, check_forward_ad=True)
    assert gradgradcheck(lambda x: product(x) ** 3, x, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_backward_saves_nothing(sketch, vectors):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = sketch.matvec(vectors(4, N).requires_grad_())
        sketch.rmatvec(y).sum()
    assert sum(t.numel() for t in saved) == 0


def test_vmap_is_the_batch(sketch, vectors):
    x = vectors(4, N)
    torch.testing.assert_close(vmap(sketch.matvec)(x), sketch.matvec(x))
    torch.testing.assert_close(vmap(sketch.matvec, in_dims=1)(x.T), sketch.matvec(x))
    torch.testing.assert_close(vmap(sketch.matvec, out_dims=1)(x), sketch.matvec(x).T)
    torch.testing.assert_close(vmap(sketch.rmatvec)(sketch.matvec(x)), sketch.rmatvec(sketch.matvec(x)))


def test_nested_vmap_is_the_nested_batch(sketch, vectors):
    x = vectors(2, 4, 3, N)
    torch.testing.assert_close(vmap(vmap(sketch.matvec))(x), sketch.matvec(x))
    inner = vmap(sketch.matvec, in_dims=1, out_dims=1)
    torch.testing.assert_close(vmap(inner, in_dims=2)(x.permute(1, 2, 0, 3)), sketch.matvec(x))


def test_a_vmap_that_does_not_reach_the_sketch_leaves_it_alone(sketch, vectors):
    x = vectors(N)
    scaled = vmap(lambda factor: factor * sketch.matvec(x))(torch.arange(3.0))
    torch.testing.assert_close(scaled[2], 2 * sketch.matvec(x))


def test_jvp_sketches_the_tangent(sketch, vectors):
    x, v = vectors(2, N)
    torch.testing.assert_close(jvp(sketch.matvec, (x,), (v,)), (sketch.matvec(x), sketch.matvec(v)))
    y, w = vectors(2, DIM)
    torch.testing.assert_close(jvp(sketch.rmatvec, (y,), (w,)), (sketch.rmatvec(y), sketch.rmatvec(w)))


def test_forward_over_forward_is_the_second_derivative(sketch, vectors):
    """The second derivative of sum (S x)³ along v and w is 6 sum (S x)(S v)(S w)."""
    x, v, w = vectors(3, N)

    def along_v(x):
        return jvp(lambda x: (sketch.matvec(x) ** 3).sum(), (x,), (v,))[1]

    _, second = jvp(along_v, (x,), (w,))
    torch.testing.assert_close(second, 6 * (sketch.matvec(x) * sketch.matvec(v) * sketch.matvec(w)).sum())


def test_vmap_of_grad_gives_per_example_gradients(sketch, gram, vectors):
    """The gradient of ||S x||² is 2 SᵀS x."""
    x = vectors(4, N)
    got = vmap(grad(lambda x: sketch.matvec(x).square().sum()))(x)
    torch.testing.assert_close(got, 2 * x @ gram)


def test_the_hessian_of_the_squared_norm_is_twice_the_gram_matrix(sketch, gram, vectors):
    got = hessian(lambda x: sketch.matvec(x).square().sum())(vectors(N))
    torch.testing.assert_close(got, 2 * gram)


def test_double_backward_through_a_nonlinear_loss(sketch, vectors):
    """H v for sum (S x)³ is Sᵀ(6 S x ∘ S v)."""
    x, v = vectors(N).requires_grad_(), vectors(2, N)[1]
    (first,) = torch.autograd.grad((sketch.matvec(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first @ v, x)
    torch.testing.assert_close(second, sketch.rmatvec(6 * sketch.matvec(x) * sketch.matvec(v)).detach())


def test_a_first_call_in_inference_mode_spoils_nothing(sketch, vectors):
    """Small tables are cached: those made in inference mode must work in a training step as well."""
    from lightning_sketch.operators import _hadamard, random

    _hadamard._matrix.cache_clear()
    random._quantiles.cache_clear()
    with torch.inference_mode():
        sketch.matvec(vectors(N))
    x = vectors(N).requires_grad_()
    (first,) = torch.autograd.grad(sketch.matvec(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad.isfinite().all()
