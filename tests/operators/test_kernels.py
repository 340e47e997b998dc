"""Which kernel computes a sketch, and what happens when one fails; pieces and chunks are the vector they are of."""

import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from forks import Started
from kernel_theorems import cut, gathered, relative, summed

from lightning_sketch.operators import AFFD, BlockSRHT, CountSketch, Sketch, kernel_in_use, kernels
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.operators.streaming import StreamingSketch

FORCED = "LIGHTNING_SKETCH_KERNEL"
LAUNCHES = "lightning_sketch.operators.kernels.numba.launches"
STREAMING = [kind for kind in KINDS.values() if issubclass(kind, StreamingSketch)]

PRODUCT = """
import sys
import torch
from lightning_sketch.operators import BlockSRHT, kernel_in_use
{first}
sketch = BlockSRHT(n=1000, dim=48, seed=3)
x = torch.linspace(-1, 1, 1000)
true = sketch.matvec(x.double())
print(kernel_in_use(sketch, "cpu"), float((sketch.matvec(x) - true).norm() / true.norm()))
"""


@pytest.fixture
def numba(monkeypatch):
    """Let numba be chosen, as if nothing had failed in this process."""
    pytest.importorskip("numba", minversion="0.60")
    monkeypatch.delenv(FORCED, raising=False)
    monkeypatch.setattr(kernels, "_broken", set())


@pytest.fixture
def in_numba_or_torch(vectors):
    """Return a sketch, a vector, and a function that says whether a product is the right one."""
    sketch, x = BlockSRHT(n=1000, dim=48, seed=3), vectors(1000).float()
    return sketch, x, lambda got: relative(got, sketch.matvec(x.double())) < 1e-6


def test_the_device_and_the_kind_decide(numba):
    for kind in (BlockSRHT, CountSketch):
        assert kernel_in_use(kind(n=100, dim=10), "cpu") == "numba"
        assert kernel_in_use(kind(n=100, dim=10), torch.device("meta")) == "torch"
    assert kernel_in_use(AFFD(n=100, dim=10), "cpu") == "torch"
    assert kernel_in_use(BlockSRHT(n=1 << 22, dim=1 << 21), "cpu") == "numba"
    assert kernel_in_use(BlockSRHT(n=1 << 22, dim=(1 << 21) + 1), "cpu") == "torch"
    assert kernel_in_use(CountSketch(n=1 << 22, dim=(1 << 21) + 1), "cpu") == "numba"


def test_a_kernel_can_be_forced(numba, monkeypatch):
    sketch = BlockSRHT(n=100, dim=10)
    for name, in_use in (("torch", "torch"), ("numba", "numba"), ("triton", "torch"), ("", "numba")):
        monkeypatch.setenv(FORCED, name)
        assert kernel_in_use(sketch, "cpu") == in_use  # Triton has no kernels for a CPU
    monkeypatch.setenv(FORCED, "cuda")
    with pytest.raises(ValueError, match=r"LIGHTNING_SKETCH_KERNEL takes torch, numba, triton, got 'cuda'; unset it"):
        kernel_in_use(sketch, "cpu")


def test_a_kind_of_ones_own_computes_itself(numba, vectors):
    """Also one that derives from a kind with kernels, with its name or another one, and changes what it inherits."""

    class Twice(BlockSRHT, register=False):
        def forward(self, x, start):
            return 2 * super().forward(x, start)

    @dataclass(frozen=True)
    class Named(Twice, register=False):
        kind = "twice"

    assert (Twice.kind, Named.kind) == ("block_srht", "twice")
    for kind in (Twice, Named):
        sketch, x = kind(n=100, dim=10, seed=3), vectors(100).float()
        assert kernel_in_use(sketch, "cpu") == "torch"
        assert torch.equal(sketch.matvec(x), sketch.forward(x[None], 0)[0])
        assert torch.equal(kernels.forward_pieces(sketch, [(0, x)]), sketch.matvec(x))


def test_a_kernel_that_fails_is_given_up_with_one_warning(numba, in_numba_or_torch, monkeypatch):
    """The reference goes on, with the products that are asked for."""
    sketch, x, right = in_numba_or_torch
    monkeypatch.setitem(sys.modules, LAUNCHES, None)  # its import fails
    with pytest.warns(UserWarning, match=r"kernels in numba failed \(ModuleNotFoundError: .*by PyTorch's operations"):
        assert right(sketch.matvec(x))
    assert kernel_in_use(sketch, "cpu") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert right(sketch.matvec(x))
        assert right(kernels.forward_pieces(sketch, [(0, x)]))
        sketch.rmatvec(sketch.matvec(x))


def test_a_forced_kernel_that_fails_says_so(numba, in_numba_or_torch, monkeypatch):
    sketch, x, right = in_numba_or_torch
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, LAUNCHES, None)
        broken.setenv(FORCED, "numba")
        with pytest.raises(ModuleNotFoundError, match="launches"):
            sketch.matvec(x)
    assert right(sketch.matvec(x))
    assert kernel_in_use(sketch, "cpu") == "numba"


def test_an_error_of_the_reference_too_is_no_failure_of_the_kernel(numba, in_numba_or_torch, monkeypatch):
    sketch, x, right = in_numba_or_torch

    def fail(*_):
        raise ValueError("in the reference")

    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, LAUNCHES, None)
        broken.setattr(BlockSRHT, "gather", fail)
        with pytest.raises(ValueError, match="in the reference"):
            sketch.matvec(x)
    assert right(sketch.matvec(x))
    assert kernel_in_use(sketch, "cpu") == "numba"


def test_a_lack_of_memory_is_no_failure_of_the_kernel(numba, in_numba_or_torch, monkeypatch):
    """The reference would need as much."""
    sketch, x, right = in_numba_or_torch
    with monkeypatch.context() as full:
        full.setattr(f"{LAUNCHES}.forward", lambda *_: [0] * (1 << 60))
        with pytest.raises(MemoryError):
            sketch.matvec(x)
    assert right(sketch.matvec(x))
    assert kernel_in_use(sketch, "cpu") == "numba"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "module"),
    [
        ("sys.modules['numba'] = None", None),
        ("", "raise AttributeError(\"module 'coverage' has no attribute 'types'\")"),
        ("", "__version__ = '0.59.1'"),
    ],
    ids=["missing", "broken", "old"],
)
def test_without_numba_the_reference_computes(tmp_path, monkeypatch, first, module):
    monkeypatch.delenv(FORCED, raising=False)
    if module:
        (tmp_path / "numba.py").write_text(module)
    (tmp_path / "product.py").write_text(PRODUCT.format(first=first))
    output, errors = Started(tmp_path / "product.py").communicate()
    assert errors == ""
    kernel, error = output.split()
    assert kernel == "torch"
    assert float(error) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_are_the_vector_that_they_are_of(make, vectors, monkeypatch, dtype):
    """By the reference of each kind, and by the one that a kind of one's own inherits."""
    monkeypatch.setenv(FORCED, "torch")
    monkeypatch.setattr("lightning_sketch.operators._hadamard.CACHED", 512)  # loops over vectors have many steps then
    sketch = make(n=3000, dim=48, seed=3)
    pieces = cut(vectors(sketch.n), 1, largest=300)
    if dtype == torch.float64:
        pieces = [(start, piece.double()) for start, piece in pieces]
    whole = torch.zeros(1, sketch.n, dtype=torch.float64)
    for start, piece in pieces:
        whole[0, start : start + len(piece)] = piece
    true = sketch.forward(whole, 0)[0]
    for got in (kernels.forward_pieces(sketch, pieces), Sketch.forward_pieces(sketch, pieces)[0]):
        assert got.dtype == dtype
        assert relative(got, true) < (3e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", [BlockSRHT, CountSketch], ids=lambda kind: kind.__name__)
def test_pieces_of_a_long_vector_are_the_vector(kind, vectors, monkeypatch):
    """By the reference, with gaps of whole chunks and pieces of many."""
    monkeypatch.setenv(FORCED, "torch")
    sketch = kind(n=600_000, dim=300, seed=3)
    pieces = cut(vectors(sketch.n), 0)
    assert relative(kernels.forward_pieces(sketch, pieces), summed(sketch, pieces)) < 1e-6


def test_one_piece_in_float64_makes_the_sketch_float64(make, vectors):
    x = vectors(1000)
    pieces = [(0, x[:500].bfloat16()), (500, x[500:])]
    whole = torch.cat((x[:500].bfloat16().double(), x[500:]))
    sketch = make(n=1000, dim=48, seed=3)
    torch.testing.assert_close(kernels.forward_pieces(sketch, pieces), sketch.matvec(whole))


@pytest.mark.parametrize("kind", STREAMING, ids=lambda kind: kind.__name__)
def test_gathered_chunks_are_the_sum_of_their_columns(kind, vectors):
    """Of each kind that streams, in float64 and by the reference."""
    sketch = kind(n=1 << 40, dim=48, seed=3)
    chunks, number = vectors(2, 3, sketch.chunk), torch.tensor([[8, 2, 1 << 32], [0, 7, 5]])
    true = [
        summed(sketch, [(int(c) * sketch.chunk, x) for c, x in zip(numbers, row, strict=True)])
        for numbers, row in zip(number, chunks, strict=True)
    ]
    torch.testing.assert_close(gathered(sketch, chunks, number), torch.stack(true))
