"""A sketch is a value: equal fields are an equal sketch and an equal map, in every process, forever."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from sketch_kinds import each_kind_and

from lightning_sketch.operators import AFFD, AFJL, FFD, FJL, QK, BlockSRHT, CountSketch, Gaussian, make_sketch
from lightning_sketch.operators.kinds import KINDS

PINNED = {
    BlockSRHT: [22.627417, -7.7781746, 7.0710678, 16.970563, 10.606602],
    AFFD: [-1.0828223, -0.1943969, -15.150668, -15.581032, 2.0686059],
    AFJL: [2.9854319, 2.5420399, -0.12297193, 5.3166767, 38.178725],
    QK: [0.33433991, 17.282612, -18.698279, 10.139651, -1.6744774],
    FFD: [-1.7081938, -5.1418664, 10.454705, 1.096042, 4.9818927],
    FJL: [19.306204, -7.9207288, 3.1089603, -10.094703, 4.3500105],
    Gaussian: [8.7826743, 16.028709, -8.2036033, -0.63217006, -15.235495],
    CountSketch: [1, 0, -9, -7, 7],
}

FRESH = """
import json, torch
from lightning_sketch.operators.kinds import KINDS
x = torch.linspace(-1, 1, 100, dtype=torch.float64)
print(json.dumps({kind: cls(n=100, dim=33, seed=5).matvec(x).tolist() for kind, cls in KINDS.items()}))
"""


@pytest.mark.parametrize("cls", PINNED)
def test_the_map_is_pinned_forever(cls):
    """At a seed other than 0, over chunks and a padded one. A change here silently breaks every sketch ever stored.

    Held to 1e-6: products are rounded in another order on another machine.
    """
    x = torch.arange(1.0, 13, dtype=torch.float64)
    expected = torch.tensor(PINNED[cls], dtype=torch.float64)
    torch.testing.assert_close(cls(n=12, dim=5, seed=7).matvec(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [BlockSRHT, CountSketch])
def test_every_kernel_computes_the_pinned_map(make, kernel):
    """In float32, which kernels take."""
    expected = torch.tensor(PINNED[make], dtype=torch.float32)
    torch.testing.assert_close(make(n=12, dim=5, seed=7).matvec(torch.arange(1.0, 13)), expected, rtol=1e-6, atol=1e-6)


def test_every_kind_is_pinned():
    assert set(PINNED) == set(KINDS.values())


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_maps():
    out = subprocess.run([sys.executable, "-c", FRESH], check=True, capture_output=True, text=True).stdout
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)
    for kind, y in json.loads(out).items():
        sketch = make_sketch(kind, n=100, dim=33, seed=5)
        torch.testing.assert_close(torch.tensor(y, dtype=torch.float64), sketch.matvec(x))


def test_equal_fields_are_equal_sketches(make):
    a, b = make(n=100, dim=33, seed=3), make(100, 33, seed=3)
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, make(100, 33, seed=4), make(100, 32, seed=3), make(101, 33, seed=3)}) == 4


def test_kinds_differ_from_each_other():
    sketches = [cls(n=100, dim=33, seed=3) for cls in KINDS.values()]
    assert len(set(sketches)) == len(KINDS) == 8
    maps = torch.stack([sketch.as_matrix() for sketch in sketches])
    assert (torch.cdist(maps.flatten(1), maps.flatten(1)) + 9 * torch.eye(8) > 1).all()


def test_a_sketch_cannot_be_changed(make):
    with pytest.raises(AttributeError, match="cannot assign to field 'seed'"):
        make(n=100, dim=33).seed = 1


def test_the_spec_is_pinned(make):
    expected = {"kind": make.kind, "n": 100, "dim": 33, "seed": 3, "rng": "v1"}
    assert make(n=100, dim=33, seed=3).spec() == expected
    assert set(KINDS) == {"block_srht", "affd", "afjl", "qk", "ffd", "fjl", "gaussian", "count_sketch"}


@each_kind_and("seed", (1 << 63) - 1, 0, 3)
def test_a_sketch_comes_back_from_its_spec_in_json(make, seed):
    sketch = make(n=100, dim=33, seed=seed)
    assert make_sketch(**json.loads(json.dumps(sketch.spec()))) == sketch


@each_kind_and("travel", lambda value: pickle.loads(pickle.dumps(value)), copy.copy, copy.deepcopy)
def test_a_sketch_survives_copying_and_pickling(make, vectors, travel):
    sketch, x = make(n=100, dim=33, seed=3), vectors(100)
    for operator in (sketch, sketch.T @ sketch, sketch.columns(0, 100)):
        assert travel(operator) == operator
        assert torch.equal(travel(operator).matvec(x), operator.matvec(x))


def test_its_repr_is_the_call_that_makes_it(make):
    assert repr(make(n=100, dim=33, seed=3)) == f"{make.__name__}(n=100, dim=33, seed=3)"


def test_the_transpose_of_the_transpose_is_the_sketch_itself(make):
    sketch = make(n=100, dim=33, seed=3)
    assert sketch.T.T is sketch
    assert sketch.T.shape == (100, 33)


def test_operators_compose_as_matrices_do(make):
    first, then = make(n=100, dim=33, seed=3), make(n=33, dim=20, seed=4)
    a, b = first.as_matrix(dtype=torch.float64), then.as_matrix(dtype=torch.float64)
    both = then @ first
    assert both.shape == (20, 100)
    torch.testing.assert_close(both.as_matrix(dtype=torch.float64), b @ a)
    torch.testing.assert_close(both.T.as_matrix(dtype=torch.float64), (b @ a).T)
    torch.testing.assert_close((first @ first.T).as_matrix(dtype=torch.float64), a @ a.T)
    torch.testing.assert_close((first.T @ first).as_matrix(dtype=torch.float64), a.T @ a)


def test_columns_are_values_too(make):
    sketch = make(n=100, dim=33, seed=3)
    assert sketch.columns(10, 20) == make(n=100, dim=33, seed=3).columns(10, 20) != sketch.columns(10, 21)
    torch.testing.assert_close(sketch.columns(10, 20).as_matrix(), sketch.as_matrix()[:, 10:20])
