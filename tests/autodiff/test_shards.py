"""Vectors in shards are whole vectors: inner products, random numbers and sketches do not depend on the ranks.

On two processes, of parameters in uneven rows, in columns, whole as a DTensor, and whole without being one.
"""

import json
import sys

import pytest
import torch
from forks import Started
from torch import nn

from lightning_sketch.autodiff.shards import checksums, is_sharded, local, reduced_gradients, reshard
from lightning_sketch.operators.space import VectorSpace

ROWS, COLUMNS, WHOLE, PLAIN = (3, 5), (2, 4), (4,), (3,)  # 15 + 8 + 4 + 3 = 30 numbers
N = 30


def one_of_two(folder, rank):
    """Print what this rank has and finds."""
    from sharded_net import meet
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from lightning_sketch.autodiff.layout import Layout
    from lightning_sketch.autodiff.shards import Shards, tensor_parallel_groups
    from lightning_sketch.operators import BlockSRHT
    from lightning_sketch.operators.random import Key

    meet(folder, rank, 2)
    mesh = init_device_mesh("cpu", (2,))
    numbers = torch.arange(float(N)).double().split([15, 8, 4, 3])
    shapes, module = tuple(map(torch.Size, (ROWS, COLUMNS, WHOLE, PLAIN))), nn.Module()
    for name, x, shape, placement in zip("abcd", numbers, shapes, (Shard(0), Shard(1), Replicate(), None), strict=True):
        x = x.view(shape)
        x = x if placement is None else distribute_tensor(x, mesh, [placement])
        module.register_parameter(name, nn.Parameter(x))
    parameters = list(module.parameters())
    space = Shards(Layout(tuple("abcd"), shapes), parameters, torch.float64)
    x = space.flatten(parameters)
    y = x.cos()
    rows = Shards(Layout(("a",), shapes[:1]), parameters[:1], torch.float64)
    sketch, key = BlockSRHT(15, 4, seed=0), Key(3, "test")
    copies = torch.full_like(x, float(rank))
    found = {
        "size": space.size,
        "shapes": [list(piece.shape) for piece in space.pieces(x)],
        "views": all(piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for piece in space.pieces(x)),
        "x": x.tolist(),
        "dot": space.dot(x, y),
        "norm": space.norm(y),
        "normal": space.normal(key).tolist(),
        "whole": space.sketched(None, x).tolist(),
        "sketched": rows.sketched(sketch, x[: rows.size]).tolist(),
        "rows": rows.normal(key).tolist(),
        "missing": space.flatten([None, *parameters[1:]]).tolist(),
        "mean": space.mean_of_copies_(copies).tolist(),
        "sharded": is_sharded(module),
        "groups": [len(tensor_parallel_groups(module))],
    }
    net = nn.Sequential(nn.Linear(4, 2))
    found["groups"].append(len(tensor_parallel_groups(parallelize_module(net, mesh, {"0": ColwiseParallel()}))))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["fsdp"] = [of_fsdp(mesh, rank), of_fsdp(mesh, rank, mp_policy=half)]
    print(json.dumps(found))
    torch.distributed.destroy_process_group()


def of_fsdp(mesh, rank, **options):
    """Return what gradients are while those of a module under FSDP are put aside, and after.

    FSDP accumulates them in one place or another, by whether they are summed over ranks in another type.
    """
    from sharded_net import numbers, shard

    from lightning_sketch.autodiff.shards import tensor_parallel_groups

    def backward(module):
        module(torch.ones(2, 4) * (rank + 1)).square().sum().backward()

    def gradients(module):
        return [numbers([p.grad]).tolist() for p in module.parameters() if p.grad is not None]

    found, seen = {}, []
    for inside in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        shard(module, mesh, module[0], **options)
        found["fsdp groups"] = len(tensor_parallel_groups(module))
        module.set_requires_gradient_sync(False)
        backward(module)  # which FSDP keeps apart
        if inside:
            for fails in (False, True):
                try:
                    with reduced_gradients(module):
                        seen.append(gradients(module))
                        backward(module)
                        seen.append(gradients(module))
                        if fails:
                            raise KeyError
                except KeyError:
                    pass
        module.set_requires_gradient_sync(True)
        backward(module)
        found["after" if inside else "alone"] = gradients(module)
    return found | {"inside": seen}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    running = [Started(__file__, folder, rank) for rank in range(2)]
    ends = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors for _, errors in ends)
    return [json.loads(lines.splitlines()[-1]) for lines, _ in ends]


X = torch.arange(float(N)).double()


@pytest.mark.slow
def test_a_vector_is_what_a_rank_has_of_the_parameters(ranks):
    assert [rank["size"] for rank in ranks] == [10 + 4 + 4 + 3, 5 + 4 + 4 + 3]
    assert ranks[0]["shapes"] == [[2, 5], [2, 2], [4], [3]]
    assert ranks[1]["shapes"] == [[1, 5], [2, 2], [4], [3]]
    assert all(rank["views"] for rank in ranks)
    columns = X[15:23].view(COLUMNS)
    for rank, rows, part in ((ranks[0], X[:10], columns[:, :2]), (ranks[1], X[10:15], columns[:, 2:])):
        assert rank["x"] == [*rows, *part.flatten(), *X[23:]]
        assert rank["missing"] == [*(0 * rows), *part.flatten(), *X[23:]]


@pytest.mark.slow
def test_inner_products_count_each_number_once(ranks):
    for rank in ranks:
        assert rank["dot"] == pytest.approx(float(X @ X.cos()), rel=1e-14)
        assert rank["norm"] == pytest.approx(float(X.cos().norm()), rel=1e-14)


@pytest.mark.slow
def test_random_vectors_and_sketches_do_not_depend_on_the_ranks(ranks):
    """Of shards by rows; of others numbers are in another order, and copies are the same."""
    from lightning_sketch.operators import BlockSRHT
    from lightning_sketch.operators.random import Key

    normal = VectorSpace(15, torch.float64, torch.device("cpu")).normal(Key(3, "test"))
    assert ranks[0]["rows"] + ranks[1]["rows"] == normal.tolist()
    assert ranks[0]["normal"][-7:] == ranks[1]["normal"][-7:]
    assert len({*ranks[0]["normal"], *ranks[1]["normal"]}) == N
    truth = BlockSRHT(15, 4, seed=0).matvec(X[:15])
    for rank in ranks:
        assert rank["sketched"] == pytest.approx(truth.tolist(), rel=1e-14)
        assert sorted(rank["whole"]) == X.tolist()
        assert rank["whole"][:15] + rank["whole"][23:] == [*X[:15], *X[23:]]


@pytest.mark.slow
def test_copies_are_averaged_and_nothing_else(ranks):
    for number, rank in enumerate(ranks):
        assert rank["mean"] == [float(number)] * (rank["size"] - 7) + [0.5] * 7


@pytest.mark.slow
def test_ranks_that_share_examples_are_those_along_which_fsdp_does_not_run(ranks):
    for rank in ranks:
        assert rank["sharded"]
        assert rank["groups"] == [1, 1]
        assert [found["fsdp groups"] for found in rank["fsdp"]] == [0, 0]


@pytest.mark.slow
def test_gradients_are_put_aside_and_come_back(ranks):
    """Also those that FSDP accumulates apart from `.grad`; inside, a backward pass begins from none, and is summed."""
    for found in (found for rank in ranks for found in rank["fsdp"]):
        assert found["after"] == found["alone"]
        before, here, again, there = found["inside"]
        assert before == again == []
        assert here == there
        for two, one in zip(found["alone"], here, strict=True):
            assert two == pytest.approx([2 * x for x in one], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_checksums_show_the_smallest_change(dtype):
    parameters = [nn.Parameter(torch.randn(5, 3, dtype=dtype)), nn.Parameter(torch.zeros(2, dtype=dtype))]
    before = checksums(parameters)
    assert checksums(parameters) == before
    with torch.no_grad():
        parameters[0][2, 1] = torch.nextafter(parameters[0][2, 1].float(), torch.tensor(9.0)).to(dtype) * 1.01
    between = checksums(parameters)
    assert between[0] != before[0]
    assert between[1] == before[1]
    with torch.no_grad():
        parameters[1][0] = -0.0
    assert checksums(parameters)[1] != before[1]


def test_a_module_in_one_process_is_left_alone():
    module = nn.Linear(2, 2)
    assert not is_sharded(module)
    assert local(module.weight).data_ptr() == module.weight.data_ptr()
    version = module.weight._version
    local(module.weight).zero_()
    assert module.weight._version == version
    module(torch.ones(1, 2)).sum().backward()
    kept = module.weight.grad
    reshard(module)
    with reduced_gradients(module):
        assert module.weight.grad is None
        module.weight.grad = torch.ones(2, 2)
    assert module.weight.grad is kept


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]))
