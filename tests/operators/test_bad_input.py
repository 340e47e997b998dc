"""What cannot be sketched is refused at once, with what was asked, what came, and what to do.

The checks are those of the base class: they are tested on BlockSRHT, and once on each kind.
"""

import jaxtyping
import numpy as np
import pytest
import torch

from lightning_sketch.operators import BlockSRHT, make_sketch

pytestmark = pytest.mark.usefixtures("untyped")

SKETCH = BlockSRHT(n=100, dim=33, seed=3)


def test_the_checkers_of_types_are_silent_here():
    """Otherwise they would raise first, and the messages below would not be tested."""
    assert jaxtyping.config.jaxtyping_disable


@pytest.mark.parametrize("product", ["matvec", "rmatvec"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 7), (100, 7), (33, 7)])
def test_a_last_axis_of_another_size_is_refused(product, shape):
    size = 100 if product == "matvec" else 33
    words = rf"BlockSRHT\.{product} takes vectors of size {size} .*got shape \({', '.join(map(str, shape))},?\);.*move"
    with pytest.raises(ValueError, match=words):
        getattr(SKETCH, product)(torch.ones(shape))


def test_vectors_for_the_whole_are_refused_by_columns():
    with pytest.raises(ValueError, match=r"BlockSRHT\.columns\(20, 50\)\.matvec takes .* size 30 .* shape \(100,\)"):
        SKETCH.columns(20, 50).matvec(torch.ones(100))
    with pytest.raises(ValueError, match=r"BlockSRHT\.columns\(20, 50\)\.rmatvec takes .* size 33 .* shape \(30,\)"):
        SKETCH.columns(20, 50).rmatvec(torch.ones(30))


@pytest.mark.parametrize("product", ["matvec", "rmatvec"])
@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [(torch.int64, r"\.float\(\)"), (torch.bool, r"\.float\(\)"), (torch.complex64, "real and imaginary parts")],
)
def test_numbers_that_are_not_real_floats_are_refused(product, dtype, way_out):
    with pytest.raises(TypeError, match=rf"BlockSRHT\.{product} takes real .*, got {dtype}; .*{way_out}"):
        getattr(SKETCH, product)(torch.ones(100 if product == "matvec" else 33, dtype=dtype))


@pytest.mark.parametrize("x", [[1.0] * 100, np.ones(100), None], ids=lambda x: type(x).__name__)
def test_what_is_no_tensor_is_refused(x):
    with pytest.raises(TypeError, match=rf"takes a torch tensor, got {type(x).__name__}; use torch\.as_tensor"):
        SKETCH.matvec(x)


@pytest.mark.parametrize(("n", "dim"), [(8, 9), (8, 0), (8, -1), (0, 0), (0, 1), (-5, -7)])
def test_a_dim_outside_of_1_to_n_is_refused(n, dim):
    with pytest.raises(ValueError, match=rf"0 < dim <= n, got dim={dim}, n={n}; .* choose a dim no larger than n"):
        BlockSRHT(n=n, dim=dim)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_outside_of_63_bits_is_refused(seed):
    with pytest.raises(ValueError, match=rf"0 <= seed < 2\^63, got seed={seed}; use abs"):
        BlockSRHT(n=100, dim=33, seed=seed)


@pytest.mark.parametrize("field", ["n", "dim", "seed"])
@pytest.mark.parametrize("value", [33.0, 1e6, True, False, "33", None, np.float64(33)], ids=repr)
def test_a_field_that_is_no_integer_is_refused(field, value):
    with pytest.raises(TypeError, match=rf"BlockSRHT takes an integer {field}, got .*; use int\("):
        BlockSRHT(**{"n": 100, "dim": 33, "seed": 3, field: value})


@pytest.mark.parametrize("integer", [np.int64, torch.tensor])
def test_integers_of_other_libraries_are_welcome_and_become_plain_ones(integer):
    sketch = BlockSRHT(n=integer(100), dim=integer(33), seed=integer(3))
    assert sketch == SKETCH
    assert [type(value) for value in vars(sketch).values()] == [int] * 3


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 101), (5, 5), (6, 5), (100, 101)])
def test_columns_outside_of_the_sketch_are_refused(start, stop):
    with pytest.raises(ValueError, match=rf"start < stop <= n, got start={start}, stop={stop}, n=100; ask"):
        SKETCH.columns(start, stop)


def test_operators_of_mismatching_sizes_do_not_compose():
    with pytest.raises(ValueError, match=r"\(33, 100\) with \(33, 100\): .* size 100, .* gives size 33"):
        SKETCH @ SKETCH


def test_each_kind_refuses_what_the_base_class_refuses(make):
    """No kind replaces the checks of its fields, of its columns, or of its vectors."""
    name, sketch = make.__name__, make(n=100, dim=33, seed=3)
    with pytest.raises(ValueError, match=rf"{name} needs 0 < dim <= n"):
        make(n=8, dim=9)
    with pytest.raises(ValueError, match=rf"{name} needs 0 <= seed"):
        make(n=100, dim=33, seed=-1)
    with pytest.raises(TypeError, match=rf"{name} takes an integer n"):
        make(n=100.0, dim=33)
    with pytest.raises(ValueError, match="columns needs"):
        sketch.columns(0, 101)
    for product in ("matvec", "rmatvec"):
        with pytest.raises(ValueError, match=rf"{name}\.{product} takes vectors of size"):
            getattr(sketch, product)(torch.ones(3, 7))
        with pytest.raises(TypeError, match=rf"{name}\.{product} takes real"):
            getattr(sketch, product)(torch.ones(100 if product == "matvec" else 33, dtype=torch.int64))


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown kind of sketch 'srht'; choose one of .*block_srht.*qk.*import the"):
        make_sketch("srht", n=100, dim=33)


def test_random_bits_of_another_version_are_refused():
    spec = BlockSRHT(n=100, dim=33).spec() | {"rng": "v0"}
    with pytest.raises(ValueError, match=r"random bits 'v0', this version .* makes 'v1'; install"):
        make_sketch(**spec)


def test_a_field_that_a_sketch_does_not_have_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        make_sketch("affd", n=100, dim=33, width=2)
