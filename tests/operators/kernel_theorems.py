"""A kernel is the reference up to rounding, for all sizes, types, ranges, batches and strides, and under transforms.

A test class to inherit for a kernel. The reference is a sketch's own `forward` and `adjoint` in float64, which
`test_formula.py` compares with dense matrices.

Rounding: additions in float32 lose 6e-8 each, and their errors grow with the square root of how many follow each other,
a hundred or so here; 1e-6 is far below any mistake.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import AFFD, BlockSRHT, CountSketch, _hadamard, kernel_in_use, kernels, random
from lightning_sketch.operators.random import FLIP_SLACK
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import LowRank

KINDS = [BlockSRHT, CountSketch]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FAR = 1 << 38  # beyond coordinate 2^37, where the index of a word of signs passes 2^32


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


def cut(x, seed, largest=30_000):
    """Cut a vector into pieces that begin and end anywhere, tiny and large ones, of three types, with gaps.

    Some of them lie in memory with other numbers in between.
    """
    generator, pieces, at = torch.Generator().manual_seed(seed), [], 0

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def size_of(*sizes):
        return one_of(*(size for size in sizes if size <= largest))

    while at < len(x):
        at += size_of(0, 0, 0, 1, 5, 300, 20_000)
        piece = x[at : at + size_of(1, 2, 100, 255, 256, 1000, 8192, 30_000)].to(one_of(*TYPES))
        if len(piece):
            pieces.append((at, one_of(piece, piece[:, None].expand(-1, 2).contiguous()[:, 1])))
        at += len(piece)
    return pieces


def summed(sketch, pieces):
    """Return the sum of the products of the pieces' columns, in float64."""
    return sum(sketch.forward(piece.double()[None], start) for start, piece in pieces)[0]


def gathered(sketch, chunks, number):
    """Return the sums of sketches of chunks by the kernel in use; what may be overwritten holds NaN, or is a copy."""
    spare = list(chunks.new_full((2, chunks.numel() + FLIP_SLACK), torch.nan))
    return kernels.gather(sketch, chunks.clone(), number, spare)


class Doubled(torch.Tensor):
    """Twice a tensor, which it holds; it has no memory of its own."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: 2 * x.held, (args, kwargs or {}))
        return function(*args, **kwargs)


class KernelTheorems:
    """Theorems of a kernel.

    Attributes:
        kernel: Its name.
        device: The device that it runs on.
    """

    kernel: str
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _forced(self, monkeypatch):
        """Let the kernel raise its errors, where the reference would step in."""
        monkeypatch.setenv("LIGHTNING_SKETCH_KERNEL", self.kernel)

    @pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
    def kind(self, request):
        return request.param

    @pytest.fixture
    def vectors(self):
        """Return a function that draws standard normal vectors on the device, the same in every test."""

        def draw(*shape, dtype=torch.float64):
            x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            return x.to(self.device, dtype)

        return draw

    @pytest.fixture
    def fresh_caches(self):
        """Keep tensors of a test out of the tables that other tests share."""
        for table in (random._page, _hadamard._matrix):
            table.cache_clear()
        yield
        for table in (random._page, _hadamard._matrix):
            table.cache_clear()

    def test_it_is_in_use(self, kind):
        assert kernel_in_use(kind(n=1 << 16, dim=1 << 15), self.device) == self.kernel
        assert kernel_in_use(AFFD(n=100, dim=10), self.device) == "torch"
        assert kernel_in_use(kind(n=100, dim=10), "meta") == "torch"

    def test_it_alone_computes(self, kind, vectors, monkeypatch):
        """Without the reference, whose rounding would pass all other theorems."""

        def refuse(*_):
            raise AssertionError("the reference is called")

        monkeypatch.setattr(kind, "gather", refuse)
        monkeypatch.setattr(kind, "scatter", refuse)
        sketch, y = kind(n=10_000, dim=300, seed=3), vectors(300).float()
        for dtype in TYPES:
            x = vectors(10_000, dtype=dtype).requires_grad_()
            sketch.matvec(x).backward(y)
            assert torch.equal(x.grad, sketch.rmatvec(y).to(dtype))
            assert kernels.forward_pieces(sketch, [(7, x.detach())]).isfinite().all()
            torch.func.vmap(sketch.matvec)(x.detach()[None])

    @pytest.mark.parametrize("dim", [1, 3, 200, 256, 4096, 5000, 8192, 1 << 14, 20_000, 1 << 15])
    def test_whole_vectors(self, kind, dim, vectors):
        """Of fewer numbers than a tile, and of a few chunks and a rest."""
        for n in (dim, 3 * dim + 10_001):
            assert_equal_products(kind(n=n, dim=dim, seed=3), 0, n, 1, torch.float32, vectors)

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("dim", [48, 4096, 10_000])
    def test_types_and_batches(self, kind, dim, dtype, vectors):
        assert_equal_products(kind(n=11_000, dim=dim, seed=3), 0, 11_000, 3, dtype, vectors)

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 1), (16, 8192), (8191, 8193), (17, 19_999), (8192, 20_000), (19_984, 20_000)]
    )
    @pytest.mark.parametrize("dim", [100, 4096, 20_000])
    def test_ranges_that_end_anywhere(self, kind, dim, start, stop, vectors):
        assert_equal_products(kind(n=20_000, dim=dim, seed=3), start, stop, 2, torch.float32, vectors)

    @pytest.mark.parametrize("far", [1 << 31, 1 << 37, FAR], ids=lambda far: f"2^{far.bit_length() - 1}")
    @pytest.mark.parametrize("dim", [100, 4096])
    def test_ranges_beyond_2_to_32(self, kind, dim, far, vectors):
        """At coordinate 2^37 the index of a word of signs passes 2^32."""
        assert_equal_products(kind(n=1 << 40, dim=dim, seed=3), far - 9000, far + 9000, 1, torch.float32, vectors)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("dim", [100, 4096])
    def test_pieces_are_the_vector_that_they_are_of(self, kind, dim, seed, vectors):
        """Also where the numbers of a chunk come from many pieces, and where whole chunks have none."""
        sketch = kind(n=120_000, dim=dim, seed=3)
        pieces = cut(vectors(sketch.n), seed)
        whole = torch.zeros(sketch.n, dtype=torch.float64, device=self.device)
        for start, piece in pieces:
            whole[start : start + len(piece)] = piece
        got = kernels.forward_pieces(sketch, pieces)
        assert got.shape == (dim,)
        assert got.dtype == torch.float32
        assert relative(got, sketch.forward(whole[None], 0)[0]) < 1e-6

    def test_pieces_beyond_2_to_32(self, kind, vectors):
        """With gaps of 2^37 numbers, which cost nothing."""
        sketch, x = kind(n=1 << 40, dim=100, seed=3), vectors(20_000).float()
        pieces = [(7, x[:100]), (FAR // 2 - 50, x[100:200]), (FAR - 999, x[200:2000]), (FAR + 999, x[2000:].bfloat16())]
        assert relative(kernels.forward_pieces(sketch, pieces), summed(sketch, pieces)) < 1e-6

    @pytest.mark.parametrize("first", [0, FAR], ids=["near", "far"])
    @pytest.mark.parametrize("dim", [48, 300, 5000])
    def test_gathered_chunks_are_the_sum_of_their_columns(self, kind, dim, first, vectors):
        """Chunks in any order, with others for each row or the same for all."""
        sketch = kind(n=1 << 40, dim=dim, seed=3)
        chunk, chunks = sketch.chunk, vectors(3, 4, sketch.chunk).float()
        number = torch.tensor([[8, 2, 3, 0], [5, 6, 1, 7], [9, 300, 10, 11]], device=self.device) + first // chunk
        for which in (number, number[:1]):
            true = [
                summed(sketch, [(int(c) * chunk, x) for c, x in zip(numbers, row, strict=True)])
                for numbers, row in zip(which.expand(3, 4), chunks, strict=True)
            ]
            assert relative(gathered(sketch, chunks, which), torch.stack(true)) < 1e-6

    def test_all_strides_give_the_same(self, kind, vectors):
        sketch, x = kind(n=10_000, dim=300, seed=3), vectors(2, 3, 10_000, dtype=torch.float32)
        expected = sketch.matvec(x)
        assert torch.equal(sketch.matvec(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
        assert torch.equal(sketch.matvec(x.mT.contiguous().mT), expected)
        wide = torch.full((2, 3, 10_016), torch.nan, device=self.device)
        wide[..., 16:] = x
        assert torch.equal(sketch.matvec(wide[..., 16:]), expected)
        assert torch.equal(sketch.matvec(x[:, :1].expand(-1, 3, -1)), expected[:, :1].expand(-1, 3, -1))
        assert relative(sketch.matvec(x[1, 2]), expected[1, 2].double()) < 1e-6  # other programs share the work
        y = vectors(2, 3, 300, dtype=torch.float32)
        assert torch.equal(sketch.rmatvec(y.mT.contiguous().mT), sketch.rmatvec(y))

    def test_one_number_spread_over_a_vector(self, kind, vectors):
        """An expanded number, whose stride is 0, as the gradient of a sum is."""
        sketch, one = kind(n=10_000, dim=300, seed=3), vectors(1, dtype=torch.float32)
        for x in (one.expand(10_000), one.expand(2, 10_000)):
            assert relative(sketch.matvec(x), sketch.matvec(x.double())) < 1e-6
        assert relative(sketch.rmatvec(one.expand(300)), sketch.rmatvec(one.double().expand(300))) < 1e-6

    def test_all_memory_is_written(self, kind, vectors):
        """In this mode PyTorch fills fresh memory with NaN, in which kernels place their sums and products."""
        sketch, x, y = kind(n=10_000, dim=300, seed=3), vectors(2, 10_000).float(), vectors(2, 300).float()
        pieces = [(17, x[0, :5000]), (9000, x[0, 5000:6000])]

        def products():
            number = torch.tensor([[4, 0, 9]], device=self.device)
            chunks = x[:, : 3 * sketch.chunk].view(2, 3, sketch.chunk)
            part = sketch.columns(11, 9999).rmatvec(y)
            return sketch.matvec(x), part, kernels.forward_pieces(sketch, pieces), gathered(sketch, chunks, number)

        plain = products()
        torch.use_deterministic_algorithms(True)
        try:
            assert all(map(torch.equal, products(), plain))
        finally:
            torch.use_deterministic_algorithms(False)

    def test_the_input_is_left_as_it_was(self, kind, vectors):
        """With a dim that is a power of two as well, where a sketch is read as it is given."""
        for dim in (300, 512):
            sketch, x, y = kind(n=10_000, dim=dim, seed=3), vectors(2, 10_000).float(), vectors(2, dim).float()
            sketch.matvec(x), sketch.rmatvec(y)
            kernels.forward_pieces(sketch, [(0, x[0, :6000]), (6001, x[0, 6000:9000])])
            assert torch.equal(x, vectors(2, 10_000).float())
            assert torch.equal(y, vectors(2, dim).float())

    def test_what_is_not_finite_stays_so(self, kind, vectors):
        """A gradient that has overflowed is seen in its sketch."""
        sketch, x = kind(n=10_000, dim=300, seed=3), vectors(10_000)
        for number in (torch.nan, torch.inf):
            x[5000] = number
            got = sketch.matvec(x.float()).isfinite()
            assert torch.equal(got, sketch.matvec(x).isfinite())
            assert not got.all()

    def test_double_and_empty_inputs_go_to_the_reference(self, kind, vectors):
        sketch, x = kind(n=1000, dim=48, seed=3), vectors(2, 1000)
        assert torch.equal(sketch.matvec(x), sketch.forward(x, 0))
        assert torch.equal(kernels.forward_pieces(sketch, [(0, x[0])]), sketch.forward(x[:1], 0)[0])
        chunks, number = x[:, : 2 * sketch.chunk].reshape(2, 2, -1), torch.tensor([[5, 0]], device=self.device)
        assert gathered(sketch, chunks, number).dtype == torch.float64
        assert sketch.matvec(x[:0].float()).shape == (0, 48)
        assert sketch.rmatvec(x[:0, :48].float()).shape == (0, 1000)

    def test_marks_on_tensors_are_not_overlooked(self, kind, vectors):
        """Some tensors are negated, or zero, by a mark: what lies in their memory is something else, or nothing."""
        sketch, x, y = kind(n=10_000, dim=300, seed=3), vectors(10_000).float(), vectors(300).float()
        spiral = torch.complex(x, x).conj().imag
        for negated in (torch._neg_view(x), spiral):
            assert negated.is_neg()
            assert relative(sketch.matvec(negated), -sketch.matvec(x.double())) < 1e-6
            assert relative(kernels.forward_pieces(sketch, [(0, negated)]), -sketch.matvec(x.double())) < 1e-6
        assert relative(sketch.rmatvec(torch._neg_view(y)), -sketch.rmatvec(y.double())) < 1e-6
        for product, size in ((sketch.matvec, 10_000), (sketch.rmatvec, 300)):
            assert not product(torch._efficientzerotensor(size, device=self.device)).any()

    def test_a_vector_that_requires_a_gradient_is_read_like_others(self, kind, vectors):
        sketch, x, y = kind(n=9000, dim=100, seed=3), vectors(9000).float(), vectors(100).float()
        plain = sketch.matvec(x), sketch.rmatvec(y), kernels.forward_pieces(sketch, [(0, x)])
        x.requires_grad_(), y.requires_grad_()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                again = sketch.matvec(x), sketch.rmatvec(y), kernels.forward_pieces(sketch, [(0, x)])
            assert not any(product.requires_grad for product in again)
            assert all(map(torch.equal, again, plain))
        parameter = torch.nn.Parameter(x.detach())
        assert torch.equal(sketch.matvec(parameter), plain[0])

    def test_derivatives_and_vmap(self, kind, vectors):
        sketch, x, y = kind(n=9000, dim=100, seed=3), vectors(9000).float().requires_grad_(), vectors(100).float()
        (gradient,) = torch.autograd.grad(sketch.matvec(x) @ y, x)
        assert torch.equal(gradient, sketch.rmatvec(y))
        batch = vectors(9000, 3).float()
        assert torch.equal(torch.func.vmap(sketch.matvec, in_dims=1)(batch), sketch.matvec(batch.T))
        _, tangent = torch.func.jvp(sketch.matvec, (x.detach(),), (batch[:, 0],))
        assert torch.equal(tangent, sketch.matvec(batch[:, 0]))

    def test_gradients_of_a_batch_of_losses(self, kind, vectors):
        """Of ||S x||², under vmap over grad: 2 SᵀS x."""
        sketch, x = kind(n=9000, dim=100, seed=3), vectors(2, 9000).float()
        got = torch.func.vmap(torch.func.grad(lambda x: sketch.matvec(x).square().sum()))(x)
        assert relative(got, 2 * sketch.rmatvec(sketch.matvec(x.double()))) < 2e-6  # two products

    @pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by `linearize` itself
    def test_recorded_operations_are_those_of_the_sketch(self, kind, vectors):
        """What records PyTorch's operations, and runs them again on other numbers, would miss those of a kernel."""
        sketch, (x, v) = kind(n=9000, dim=100, seed=3), vectors(2, 9000).float()
        _, derivative = torch.func.linearize(sketch.matvec, x)
        assert relative(derivative(v), sketch.matvec(v.double())) < 1e-6
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: sketch.matvec(x))(x)
        assert relative(graph(v), sketch.matvec(v.double())) < 1e-6

    def test_tensors_without_memory_are_not_read(self, kind, fresh_caches):
        """They have a shape and no numbers; a kernel that reads them ends the process."""
        sketch = kind(n=9000, dim=100, seed=3)
        with FakeTensorMode():
            x = torch.ones(2, 9000, device=self.device)
            y, back = sketch.matvec(x), sketch.rmatvec(torch.ones(2, 100, device=self.device))
        assert isinstance(y, FakeTensor)
        assert (y.shape, back.shape) == ((2, 100), (2, 9000))

    def test_a_tensor_of_another_type_says_what_its_numbers_are(self, kind, vectors):
        sketch, x = kind(n=9000, dim=100, seed=3), vectors(2, 9000).float()
        assert relative(sketch.matvec(Doubled(x)), 2 * sketch.matvec(x.double())) < 1e-6

    def test_gradients_of_examples(self, kind, vectors):
        """Whole chunks are sketched where they are formed, and what fills a chunk only in part is gathered."""
        layer = torch.nn.Linear(70, 300, bias=False, device=self.device)
        sketch = kind(n=21_000, dim=100, seed=3)
        accumulator = SketchAccumulator(sketch, Layout.of(layer), parameters={"weight": layer.weight})
        left, right = vectors(3, 2, 300).float(), vectors(3, 2, 70).float()
        accumulator.start(examples=3)
        accumulator.add(LowRank(layer.weight, left, right))
        gradients = torch.einsum("etr,etc->erc", left.double(), right.double()).flatten(1)
        assert relative(accumulator.rows(), sketch.matvec(gradients)) < 1e-6

    def test_the_compiled_operation_keeps_the_rules_of_pytorch(self, kind, vectors):
        """Its shapes, strides, aliasing and gradient registration, as PyTorch itself checks them."""
        for start, stop, adjoint, size in [(0, 9000, False, 9000), (20, 70, False, 50), (20, 70, True, 33)]:
            x = vectors(2, size).float().requires_grad_()
            torch.library.opcheck(torch.ops.lightning_sketch.apply, (x, kind.kind, 9000, 33, 3, start, stop, adjoint))
