"""The flat vector: its order, its parameters, and its sketch part by part."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT, Sketch, make_sketch

KINDS = ["block_srht", "count_sketch", "gaussian", "affd", "afjl", "qk", "ffd", "fjl"]


@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(layout, dtype=torch.float64):
    """One for each name, and the flat vector of them all."""
    flat = normal(layout.n, dtype=dtype)
    return dict(zip(layout.names, layout.unflatten(flat), strict=True)), flat


def test_the_order_is_that_of_the_module():
    layout = Layout.of(network())
    assert layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layout.shapes == ((4, 5), (4,), (3, 4), (3,))
    assert layout.n == 39


def test_shared_parameters_are_listed_once_under_their_first_name():
    assert Layout.of(Tied()).names == ("embedding.weight", "norm.weight", "norm.bias", "head.bias")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head.weight", ["embedding.weight"]),  # found under each of its names
        ("head.*", ["embedding.weight", "head.bias"]),
        ("*.bias", ["norm.bias", "head.bias"]),
        (["head.bias", "norm.*"], ["norm.weight", "norm.bias", "head.bias"]),  # still in the module's order
        (("norm.[w]*",), ["norm.weight"]),
    ],
)
def test_a_pattern_chooses_by_name(pattern, names):
    assert Layout.of(Tied(), pattern).names == tuple(names)


def test_frozen_parameters_are_left_out():
    module = network()
    module[0].weight.requires_grad_(False)
    assert Layout.of(module).names == ("0.bias", "2.weight", "2.bias")


def test_a_layout_is_fixed_when_it_is_made():
    module = network()
    layout = Layout.of(module)
    module[0].requires_grad_(False)
    assert [id(p) for p in layout.parameters(module)] == [id(p) for p in module.parameters()]


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, nn.parallel.DistributedDataParallel, lambda m: nn.DataParallel(torch.compile(m))],
    ids=["compiled", "data parallel", "distributed", "both"],
)
def test_names_are_those_without_wrappers(group, wrap):
    module = network()
    module[0] = torch.compile(module[0])
    layout, wrapped = Layout.of(network()), wrap(module)
    assert Layout.of(wrapped) == layout
    assert [id(p) for p in layout.parameters(wrapped)] == [id(p) for p in module.parameters()]


def test_flatten_and_unflatten_are_inverse():
    layout = Layout.of(network())
    named, flat = tensors(layout)
    assert torch.equal(layout.flatten(list(named.values()), flat), flat)
    assert layout.flatten([None, named["0.bias"], None, None], flat).nonzero().flatten().tolist() == [20, 21, 22, 23]


def test_unflatten_gives_views():
    layout = Layout.of(network())
    flat = torch.zeros(39)
    layout.unflatten(flat)[1][0] = 1
    assert flat.nonzero().item() == 20


def test_flatten_takes_parameters_themselves_and_keeps_their_gradient():
    module = network()
    layout = Layout.of(module)
    flat = layout.flatten(list(module.parameters()), torch.zeros((), dtype=torch.float64))
    assert torch.equal(flat, nn.utils.parameters_to_vector(module.parameters()).double())
    flat.sum().backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_sketch_of_the_tensors_is_that_of_the_vector(kind):
    layout = Layout.of(network())
    named, flat = tensors(layout)
    sketch = make_sketch(kind, n=39, dim=8, seed=3)
    torch.testing.assert_close(layout.sketch(sketch, named), sketch.matvec(flat))
    backwards = dict(reversed(named.items()))
    assert torch.equal(layout.sketch(sketch, backwards), layout.sketch(sketch, named))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_zero(kind):
    layout = Layout.of(network())
    named, flat = tensors(layout)
    flat = flat.clone()
    flat[20:24], flat[-3:] = 0, 0
    del named["2.bias"]
    sketch = make_sketch(kind, n=39, dim=8, seed=3)
    torch.testing.assert_close(layout.sketch(sketch, named | {"0.bias": None}), sketch.matvec(flat))
    assert not layout.sketch(sketch, {}).any()
    assert not layout.sketch(sketch, {"0.bias": None}).any()


def test_big_tensors_next_to_small_ones():
    """Small ones before, between and after tensors larger than a part; some empty."""
    sizes = [(3,), (0,), (600, 500), (7,), (3 << 20,), (2, 2), (200_000,), (100_000,), (5,), (0,)]
    layout = Layout(tuple(f"p{i}" for i in range(len(sizes))), tuple(torch.Size(size) for size in sizes))
    named, flat = tensors(layout, torch.float32)
    sketch = make_sketch("block_srht", n=layout.n, dim=100, seed=3)
    torch.testing.assert_close(layout.sketch(sketch, named), sketch.matvec(flat), rtol=1e-5, atol=1e-3)
    sparse = {name: named[name] for name in ("p1", "p3", "p8")}
    rest = layout.flatten([sparse.get(name) for name in layout.names], flat)
    torch.testing.assert_close(layout.sketch(sketch, sparse), sketch.matvec(rest), rtol=1e-5, atol=1e-5)


class Alternating(Sketch, register=False):
    """A kind of one's own, which streams without chunks: a number goes to the place that is its index modulo dim."""

    kind, streams = "alternating", True

    def forward(self, x, start):
        return x @ self.adjoint(torch.eye(self.dim, dtype=x.dtype), start, start + x.shape[1]).T

    def adjoint(self, y, start, stop):
        return y[:, torch.arange(start, stop) % self.dim]


def test_a_kind_without_chunks_maps_tensors_too():
    layout = Layout.of(network())
    named, flat = tensors(layout)
    sketch, y = Alternating(layout.n, 5), normal(5)
    torch.testing.assert_close(layout.sketch(sketch, named), sketch.matvec(flat))
    back = torch.cat([part.flatten() for part in layout.adjoint(sketch, y, like=list(named.values()))])
    torch.testing.assert_close(back, sketch.rmatvec(y))


def test_the_adjoint_of_large_tensors_comes_in_their_shapes():
    layout = Layout(("a", "b"), (torch.Size([10]), torch.Size([3 << 20])))
    named, _ = tensors(layout, torch.float32)
    sketch = BlockSRHT(layout.n, 8)
    y = normal(8).float()
    back = torch.cat([part.flatten() for part in layout.adjoint(sketch, y, like=list(named.values()))])
    torch.testing.assert_close(back, sketch.rmatvec(y))


def test_a_sketch_of_tensors_with_a_graph_is_differentiable():
    layout = Layout(("a", "b"), (torch.Size([3, 4]), torch.Size([5])))
    named = {"a": normal(3, 4).requires_grad_(), "b": normal(5)}
    sketch, y = BlockSRHT(layout.n, 6), normal(6)
    (gradient,) = torch.autograd.grad(layout.sketch(sketch, named) @ y, named["a"])
    torch.testing.assert_close(gradient.flatten(), sketch.rmatvec(y)[:12])


def test_a_sketch_of_tensors_has_tangents_and_is_mapped():
    layout = Layout(("a", "b"), (torch.Size([3, 4]), torch.Size([5])))
    a, b, da = normal(3, 4), normal(5), normal(3, 4, seed=1)
    sketch = BlockSRHT(layout.n, 6)

    def f(a, b):
        return layout.sketch(sketch, {"a": a, "b": b})

    expected = sketch.matvec(layout.flatten([da, None], a))
    torch.testing.assert_close(torch.func.jvp(lambda a: f(a, b), (a,), (da,))[1], expected)
    rows = torch.func.vmap(f)(torch.stack([a, da]), torch.stack([b, 0 * b]))
    torch.testing.assert_close(rows, torch.stack([f(a, b), expected]))


def test_tensors_without_numbers_have_a_sketch_of_zeros():
    layout = Layout(("a", "b"), (torch.Size([0, 3]), torch.Size([9])))
    assert torch.equal(layout.sketch(BlockSRHT(9, 4), {"a": torch.ones(0, 3)}), torch.zeros(4))


def test_tensors_that_have_to_be_copied_come_in_several_lists():
    """Transposed and in float16, more numbers than are copied at once."""
    layout = Layout(tuple("abcd"), tuple(map(torch.Size, [(900, 1000), (10,), (1100, 1000), (7, 3)])))
    named = {"a": normal(1000, 900).float().T, "b": normal(10).float(), "c": normal(1100, 1000).half()}
    sketch = BlockSRHT(layout.n, 8)
    whole = layout.flatten([*named.values(), None], torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(layout.sketch(sketch, named).double(), sketch.matvec(whole), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["block_srht", "affd"])
def test_sparse_gradients_are_coalesced(kind):
    module = nn.Embedding(7, 4, sparse=True)
    module(torch.tensor([2, 5, 2])).pow(2).sum().backward()
    gradient = module.weight.grad
    assert not gradient.is_coalesced()
    layout, sketch = Layout.of(module), make_sketch(kind, n=28, dim=8, seed=3)
    torch.testing.assert_close(
        layout.sketch(sketch, {"weight": gradient}), sketch.matvec(gradient.to_dense().flatten())
    )


@pytest.mark.parametrize("kind", ["block_srht", "affd"])
def test_precisions_may_differ_and_the_sum_is_at_least_float32(kind):
    layout = Layout.of(network())
    named, _ = tensors(layout)
    sketch = make_sketch(kind, n=39, dim=8, seed=3)
    for last, expected in ((torch.float32, torch.float32), (torch.float64, torch.float64)):
        mixed = {name: t.to(last if name == "2.bias" else torch.bfloat16) for name, t in named.items()}
        exact = sketch.matvec(layout.flatten(list(mixed.values()), torch.zeros((), dtype=torch.float64)))
        got = layout.sketch(sketch, mixed)
        assert got.dtype == expected
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter():
    layout = Layout(("w",), (torch.Size((4, 6)),))
    sketch, w = make_sketch("block_srht", n=24, dim=8, seed=3), normal(6, 4).T
    torch.testing.assert_close(layout.sketch(sketch, {"w": w}), sketch.matvec(w.flatten()))


def test_an_unknown_name_a_wrong_shape_and_a_wrong_size_are_refused():
    layout = Layout.of(network())
    sketch = make_sketch("block_srht", n=39, dim=8)
    with pytest.raises(ValueError, match=r"2.weigth is not in the layout; it starts with 0.weight, 0.bias"):
        layout.sketch(sketch, {"2.weigth": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"2.weight has shape \(4, 3\), the layout says \(3, 4\)"):
        layout.sketch(sketch, {"2.weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="takes n=40 numbers, the layout has 39; build it with n=39"):
        layout.sketch(make_sketch("block_srht", n=40, dim=8), {})


def test_complex_numbers_are_refused(untyped):
    module = network()
    module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameter phase is torch.complex64; replace it by two real parameters"):
        Layout.of(module)
    layout = Layout.of(module, ["0.*", "2.*"])
    with pytest.raises(TypeError, match=r"0.bias is torch.complex64; sketch its real and imaginary parts apart"):
        layout.sketch(make_sketch("block_srht", n=39, dim=8), {"0.bias": torch.zeros(4, dtype=torch.complex64)})


def test_shards_are_sketched_where_they_are(group):
    """Beside whole tensors and missing ones; on one rank, two ranks are in callbacks/test_sharded.py."""
    layout, mesh = Layout.of(network()), init_device_mesh("cpu", (1,))
    tensors = {name: torch.randn(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    sketch = make_sketch("block_srht", n=39, dim=8)
    mixed = {"0.weight": distribute_tensor(tensors["0.weight"], mesh, [Shard(0)]), "0.bias": tensors["0.bias"]}
    mixed["2.weight"] = distribute_tensor(tensors["2.weight"], mesh, [Replicate()])
    whole = {**tensors, "2.bias": None}
    torch.testing.assert_close(layout.sketch(sketch, mixed), layout.sketch(sketch, whole), rtol=1e-6, atol=1e-6)


def test_shards_that_are_no_runs_of_rows_are_refused(group):
    shards = distribute_tensor(torch.zeros(3, 4), init_device_mesh("cpu", (1,)), [Shard(1)])
    with pytest.raises(TypeError, match=r"2.weight is sharded as .*; pass tensor.full_tensor\(\)"):
        Layout.of(network()).sketch(make_sketch("block_srht", n=39, dim=8), {"2.weight": shards})
    rows = distribute_tensor(torch.zeros(3, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match=r"AFFD needs the whole vector, 2.weight is sharded; use 'block_srht'"):
        Layout.of(network()).sketch(make_sketch("affd", n=39, dim=8), {"2.weight": rows})


def test_nothing_to_list_is_refused():
    with pytest.raises(ValueError, match="Sequential has no trainable parameter; set requires_grad=True"):
        Layout.of(network().requires_grad_(False))
    with pytest.raises(ValueError, match=r"no trainable parameter matches 'head\.\*'; the names start with 0.weight"):
        Layout.of(network(), "head.*")
    with pytest.raises(ValueError, match=r"names start with 0.weight.*For all parameters of a module write '2\.\*'"):
        Layout.of(network(), ["2"])


def test_another_module_is_refused():
    with pytest.raises(ValueError, match=r"Linear lacks parameters of the layout: 0.weight, .*2.bias\."):
        Layout.of(network()).parameters(nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"lacks parameters of the layout: 0.weight\.$"):
        Layout.of(network()).parameters(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
