"""What cannot be sketched is refused at once, with what was asked, what came, and what to do."""

import re

import jaxtyping
import numpy as np
import pytest
import torch

from lightning_sketch.operators import BlockSRHT, make_sketch

pytestmark = pytest.mark.usefixtures("unchecked")


def refused(error, message):
    """This error, with this whole message."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.fixture
def sketch(make):
    return make(n=100, dim=33, seed=3)


def test_the_checkers_of_types_are_silent_here():
    """Otherwise they would answer first, and the messages below would go untested."""
    assert jaxtyping.config.jaxtyping_disable


@pytest.mark.parametrize("way", ["matvec", "rmatvec"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 7), (100, 7), (33, 7)])
def test_a_last_axis_of_another_size_is_refused(sketch, way, shape):
    size = 100 if way == "matvec" else 33
    message = (
        f"{type(sketch).__name__}.{way} takes vectors of size {size} along the last axis, got shape {shape}; "
        f"move that axis last, or build an operator of the right size."
    )
    with refused(ValueError, message):
        getattr(sketch, way)(torch.ones(shape))


def test_vectors_for_the_whole_are_refused_by_columns(sketch):
    name = f"{type(sketch).__name__}.columns(20, 50)"
    with refused(
        ValueError,
        f"{name}.matvec takes vectors of size 30 along the last axis, got shape (100,); "
        f"move that axis last, or build an operator of the right size.",
    ):
        sketch.columns(20, 50).matvec(torch.ones(100))


@pytest.mark.parametrize("way", ["matvec", "rmatvec"])
@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        (torch.int64, "convert it with .float()"),
        (torch.bool, "convert it with .float()"),
        (torch.complex64, "sketch real and imaginary parts apart"),
    ],
)
def test_numbers_that_are_not_real_floats_are_refused(sketch, way, dtype, way_out):
    name = f"{type(sketch).__name__}.{way}"
    with refused(TypeError, f"{name} takes real floating-point numbers, got {dtype}; {way_out}."):
        getattr(sketch, way)(torch.ones(100 if way == "matvec" else 33, dtype=dtype))


@pytest.mark.parametrize("x", [[1.0] * 100, np.ones(100), None], ids=lambda x: type(x).__name__)
def test_what_is_no_tensor_is_refused(sketch, x):
    message = f"{type(sketch).__name__}.matvec takes a torch tensor, got {type(x).__name__}; use torch.as_tensor."
    with refused(TypeError, message):
        sketch.matvec(x)


@pytest.mark.parametrize(("n", "dim"), [(8, 9), (8, 0), (8, -1), (0, 0), (0, 1), (-5, -7)])
def test_a_dim_outside_of_1_to_n_is_refused(make, n, dim):
    message = (
        f"{make.__name__} needs 0 < dim <= n, got dim={dim}, n={n}; a sketch shrinks, so choose a dim no larger than n."
    )
    with refused(ValueError, message):
        make(n=n, dim=dim)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_outside_of_63_bits_is_refused(make, seed):
    message = f"{make.__name__} needs 0 <= seed < 2^63, got seed={seed}; use abs(seed) % 2**63."
    with refused(ValueError, message):
        make(n=100, dim=33, seed=seed)


@pytest.mark.parametrize("field", ["n", "dim", "seed"])
@pytest.mark.parametrize("value", [33.0, 1e6, True, False, "33", None, np.float64(33)], ids=repr)
def test_a_field_that_is_no_integer_is_refused(make, field, value):
    message = f"{make.__name__} takes an integer {field}, got {value!r}; use int(...)."
    with refused(TypeError, message):
        make(**{"n": 100, "dim": 33, "seed": 3, field: value})


@pytest.mark.parametrize("integer", [np.int64, torch.tensor])
def test_integers_of_other_libraries_are_welcome_and_become_plain_ones(make, integer):
    sketch = make(n=integer(100), dim=integer(33), seed=integer(3))
    assert sketch == make(n=100, dim=33, seed=3)
    assert [type(value) for value in vars(sketch).values()] == [int] * 3


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 101), (5, 5), (6, 5), (100, 101)])
def test_columns_outside_of_the_sketch_are_refused(sketch, start, stop):
    message = (
        f"columns needs 0 <= start < stop <= n, got start={start}, stop={stop}, n=100; "
        f"ask for a range inside the sketch."
    )
    with refused(ValueError, message):
        sketch.columns(start, stop)


def test_operators_of_mismatching_sizes_do_not_compose(sketch):
    message = (
        "cannot compose (33, 100) with (33, 100): the left operator takes vectors of size 100, "
        "the right one gives size 33."
    )
    with refused(ValueError, message):
        sketch @ sketch


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown kind of sketch 'srht'; choose one of .*block_srht.*qk.*import the"):
        make_sketch("srht", n=100, dim=33)


def test_random_bits_of_another_version_are_refused():
    spec = BlockSRHT(n=100, dim=33).spec() | {"rng": "v0"}
    with refused(
        ValueError,
        "the sketch was made with random bits 'v0', this version of lightning_sketch makes 'v1'; "
        "install the version that wrote it.",
    ):
        make_sketch(**spec)


def test_a_field_that_a_sketch_does_not_have_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        make_sketch("affd", n=100, dim=33, width=2)
