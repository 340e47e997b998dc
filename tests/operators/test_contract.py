"""Every kind passes the tests that a sketch of one's own may inherit, and some that are for built-in kinds only.

BlockSRHT passes them at all sizes. The other kinds run at one uneven size, and at all sizes in `make test-all`.
Identities are tested in float64 to the tolerance of `assert_close`, 1e-7: far above rounding, far below any mistake.
"""

from dataclasses import dataclass

import pytest
import torch

from lightning_sketch import GradientSketchWriter
from lightning_sketch.attribution import GradientStore
from lightning_sketch.autodiff import Layout
from lightning_sketch.operators import QK, BlockSRHT, CountSketch, Sketch, make_sketch
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.operators.random import words
from lightning_sketch.store import StoreSpec
from lightning_sketch.testing import SketchTests

KERNELS = [BlockSRHT, CountSketch]  # kinds that have some
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Several chunks and zero-padding; QK has a single factor up to n = 1024.
ONE_SIZE = {kind: ((3000 if kind is QK else 1000, 48),) for kind in KINDS.values()}
ONE_SIZE[BlockSRHT] = SketchTests.sizes


for _kind, _sizes in ONE_SIZE.items():
    _name = f"Test{_kind.__name__}"
    globals()[_name] = type(_name, (SketchTests,), {"kind": _kind, "sizes": _sizes})
    if _kind is not BlockSRHT:
        _name += "AtAllSizes"
        globals()[_name] = pytest.mark.slow(type(_name, (SketchTests,), {"kind": _kind}))


class InFloat32(SketchTests):
    """The kernels take vectors in float32; `assert_close` then holds identities to 1e-6 and 1e-5."""

    sizes = ((1, 1), (1000, 48))

    def vectors(self, *shape):
        return super().vectors(*shape).float()


for _kind in KERNELS:
    _name = f"Test{_kind.__name__}InFloat32"
    globals()[_name] = pytest.mark.usefixtures("kernel")(type(_name, (InFloat32,), {"kind": _kind}))


@pytest.fixture
def toy():
    """A kind of one's own, random signs times every dim-th coordinate, which is removed after the test."""
    before = dict(KINDS)

    @dataclass(frozen=True)
    class Toy(Sketch):
        kind = "toy"
        streams = True

        def _signs(self, start, stop, like):
            return 1 - 2 * (words(self.key("signs"), start, stop, like.device) & 1).to(like)

        def forward(self, x, start):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            place = torch.arange(start, start + x.shape[1]) % self.dim
            out = x.new_zeros(len(x), self.dim)
            return out.index_add(1, place, x * self._signs(start, start + x.shape[1], x))

        def adjoint(self, y, start, stop):
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            return y[:, torch.arange(start, stop) % self.dim] * self._signs(start, stop, y)

    yield Toy
    KINDS.clear()
    KINDS.update(before)


def test_a_kind_of_ones_own_is_known_from_its_definition_on(toy, tmp_path):
    """The writer and stores accept it by name, and it passes the tests to inherit."""
    sketch = make_sketch("toy", n=40, dim=8, seed=1)
    assert sketch == toy(n=40, dim=8, seed=1)
    GradientSketchWriter(sketch="toy")
    spec = StoreSpec.of(sketch, Layout(("w",), (torch.Size([40]),)))
    assert GradientStore.create(tmp_path / "store", spec).sketch == sketch
    suite = type("Suite", (SketchTests,), {"kind": toy})()
    for name in (name for name in dir(suite) if name.startswith("test_")):
        if name != "test_equal_fields_are_one_map_and_another_seed_is_another":  # a class in a function is not pickled
            getattr(suite, name)()


def test_a_store_of_a_kind_that_is_not_defined_says_so(toy, tmp_path):
    spec = StoreSpec.of(toy(n=40, dim=8), Layout(("w",), (torch.Size([40]),)))
    GradientStore.create(tmp_path / "store", spec)
    del KINDS["toy"]
    with pytest.raises(ValueError, match=r"unknown kind of sketch 'toy'.*import the module that defines it first"):
        _ = GradientStore.open(tmp_path / "store").sketch


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"Other has kind='block_srht', which .*BlockSRHT has already"):
        type("Other", (Sketch,), {"kind": "block_srht"})
    assert KINDS["block_srht"].__name__ == "BlockSRHT"


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.streams])
def test_columns_far_beyond_2_to_32_are_other_columns_of_one_map(kind, vectors):
    """Signs lie 32 to a word: at coordinate 2^37 the index of the word passes 2^32."""
    sketch, x, far = kind(n=1 << 40, dim=8, seed=3), vectors(2, 64), 1 << 37
    whole = sketch.columns(far - 32, far + 32)
    parts = sketch.columns(far - 32, far).matvec(x[:, :32]) + sketch.columns(far, far + 32).matvec(x[:, 32:])
    torch.testing.assert_close(whole.matvec(x), parts)
    assert not torch.allclose(whole.as_matrix()[:, 32:], sketch.columns(0, 32).as_matrix())


def test_the_size_of_the_cache_changes_nothing(make, vectors, monkeypatch):
    """Vectors are processed in pieces; with pieces of 64 numbers, every loop over them has many steps."""
    sketch, x, y = make(n=1000, dim=48, seed=3), vectors(5, 1000), vectors(5, 48)
    whole = sketch.matvec(x), sketch.rmatvec(y)
    monkeypatch.setattr("lightning_sketch.operators._hadamard.CACHED", 64)
    torch.testing.assert_close((sketch.matvec(x), sketch.rmatvec(y)), whole)


def test_no_memory_is_read_before_it_is_written(make, vectors):
    """In this mode PyTorch fills fresh memory with NaN."""
    sketch, x, y = make(n=1000, dim=48, seed=3), vectors(5, 1000), vectors(5, 48)
    plain = sketch.matvec(x), sketch.rmatvec(y)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close((sketch.matvec(x), sketch.rmatvec(y)), plain)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
def test_same_fields_same_map_on_every_device(make, vectors, device):
    for n, dim in ONE_SIZE[make]:
        sketch, x, y = make(n=n, dim=dim, seed=3), vectors(3, n), vectors(3, dim)
        again = make(n=n, dim=dim, seed=3)
        torch.testing.assert_close(again.matvec(x.to(device)).cpu(), sketch.matvec(x))
        torch.testing.assert_close(again.rmatvec(y.to(device)).cpu(), sketch.rmatvec(y))
