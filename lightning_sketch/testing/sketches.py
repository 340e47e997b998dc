"""A test class to inherit for a kind of sketch.

A sketch is a linear map with an exact adjoint, can be cut into columns, depends on its fields alone, and preserves
inner products on average. Identities are tested in float64 to the tolerance of `assert_close`, 1e-7: far above
rounding, far below any mistake.
"""

import math
import pickle
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.operators.sketch import Sketch


class SketchTests:
    """Pytest tests that each kind of sketch has to pass.

    Attributes:
        kind: The class of the sketch, set by the subclass.
        sizes: Pairs (n, dim) to test: trivial, uneven, square, several chunks.

    Example::

        class TestMySketch(SketchTests):
            kind = MySketch
    """

    kind: type[Sketch]
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (100, 33), (100, 100), (1000, 48))

    def vectors(self, *shape: int) -> Tensor:
        """Return standard normal vectors in float64, the same each time."""
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def sketches(self) -> list[Sketch]:
        """Return a sketch of each size."""
        return [self.kind(n=n, dim=dim, seed=3) for n, dim in self.sizes]

    def test_matvec_is_linear(self):
        """Test S (2 x - y) = 2 S x - S y."""
        for s in self.sketches():
            x, y = self.vectors(2, s.n)
            torch.testing.assert_close(s.matvec(2 * x - y), 2 * s.matvec(x) - s.matvec(y))

    def test_rmatvec_is_the_adjoint(self):
        """Test ⟨S x, y⟩ = ⟨x, Sᵀ y⟩, and each entry of one matrix."""
        for s in self.sketches():
            x, y = self.vectors(s.n), self.vectors(s.dim + 1)[1:]
            torch.testing.assert_close(s.matvec(x) @ y, x @ s.rmatvec(y))
        s = self.kind(n=100, dim=33, seed=3)
        matrix = s.as_matrix(dtype=torch.float64)
        assert matrix.shape == s.shape
        torch.testing.assert_close(s.T.as_matrix(dtype=torch.float64), matrix.T)

    def test_batch_axes_are_independent(self):
        """Test one vector among others, an empty batch, and other strides."""
        for s in self.sketches():
            x, y = self.vectors(2, 3, s.n), self.vectors(2, 3, s.dim)
            torch.testing.assert_close(s.matvec(x)[1, 2], s.matvec(x[1, 2]))
            torch.testing.assert_close(s.rmatvec(y)[1, 2], s.rmatvec(y[1, 2]))
            assert s.matvec(x[:, :0]).shape == (2, 0, s.dim)
            assert s.rmatvec(y[:0, 0]).shape == (0, s.n)
            assert torch.equal(s.matvec(x[0].T.contiguous().T), s.matvec(x[0]))

    def test_the_input_is_left_as_it_was(self):
        """Test that neither product writes into its argument."""
        for s in self.sketches():
            x, y = self.vectors(3, s.n), self.vectors(3, s.dim)
            s.matvec(x)
            s.rmatvec(y)
            assert torch.equal(x, self.vectors(3, s.n))
            assert torch.equal(y, self.vectors(3, s.dim))

    def test_columns_sum_to_the_whole(self):
        """Test ranges that tile [0, n): uneven ones, ones of a single coordinate, and slices of the adjoint."""
        s, x, y = self.kind(n=20_000, dim=24, seed=3), self.vectors(20_000), self.vectors(2, 24)
        for cuts in ((0, 1, 40, 41, 20_000), (0, 8191, 8193, 16_385, 20_000)):
            parts = [s.columns(a, b).matvec(x[a:b]) for a, b in pairwise(cuts)]
            torch.testing.assert_close(sum(parts), s.matvec(x))
            for a, b in pairwise(cuts):
                torch.testing.assert_close(s.columns(a, b).rmatvec(y), s.rmatvec(y)[:, a:b])

    def test_inner_products_are_preserved_on_average(self):
        """Test E⟨S x, S y⟩ = ⟨x, y⟩ over seeds, within five standard errors.

        x and y overlap, so that a wrong scale stands out of the noise; neither size is a power of two, so that
        scaling by n or dim instead of the padded sizes stands out too.
        """
        x, noise = self.vectors(2, 100)
        pair = torch.stack((x, x + 0.3 * noise))
        sketched = torch.stack([self.kind(n=100, dim=33, seed=seed).matvec(pair) for seed in range(300)])
        got = (sketched[:, 0] * sketched[:, 1]).sum(-1)
        assert abs(got.mean() - pair[0] @ pair[1]) < 5 * got.std() / math.sqrt(len(got))

    def test_the_average_map_is_zero(self):
        """Test E[S] = 0 over seeds, within five standard errors: the seed gives every entry a random sign."""
        entries = torch.stack([self.kind(n=10, dim=6, seed=seed).T.as_matrix() for seed in range(100)])
        assert (entries.mean(0).abs() <= 5 * entries.std(0) / math.sqrt(100)).all()

    def test_equal_fields_are_one_map_and_another_seed_is_another(self):
        """Test that the map is a function of the fields: built again, from its spec, and after pickling."""
        x = self.vectors(100)
        s = self.kind(n=100, dim=33, seed=0)
        for again in (self.kind(n=100, dim=33, seed=0), make_sketch(**s.spec()), pickle.loads(pickle.dumps(s))):
            assert again == s
            assert torch.equal(again.matvec(x), s.matvec(x))
        assert not torch.allclose(self.kind(n=100, dim=33, seed=1).matvec(x), s.matvec(x))

    def test_results_are_float32_or_wider(self):
        """Test float64 for float64 and float32 for all else, near the product in float64 to the input's rounding."""
        s = self.kind(n=1000, dim=48, seed=3)
        for dtype, tolerance in ((torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
            x, y = self.vectors(2, 1000).to(dtype), self.vectors(2, 48).to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            for got, true in ((s.matvec(x), s.matvec(x.double())), (s.rmatvec(y), s.rmatvec(y.double()))):
                assert got.dtype == wide
                assert (got.double() - true).norm() <= tolerance * true.norm()

    def test_gradients_are_those_of_a_linear_map(self):
        """Test that the derivative of S x along v is S v, backward and by vmap."""
        s = self.kind(n=30, dim=7, seed=3)
        x, y = self.vectors(30).requires_grad_(), self.vectors(7)
        (gradient,) = torch.autograd.grad(s.matvec(x) @ y, x)
        torch.testing.assert_close(gradient, s.rmatvec(y))
        torch.testing.assert_close(torch.func.vmap(s.matvec)(self.vectors(3, 30)), s.matvec(self.vectors(3, 30)))

    def test_the_global_generators_are_left_alone(self):
        """Test that randomness comes from the seed alone."""
        before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
        for s in self.sketches():
            s.rmatvec(s.matvec(self.vectors(s.n)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == pickle.dumps(np.random.get_state())
