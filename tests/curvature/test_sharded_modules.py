"""Products with Hessians of sharded modules are those of whole ones, or are refused by name; nothing hangs.

Two processes run all checks one after the other; truth is the Hessian as a matrix, by autograd in float64.
"""

import json
import math
import re
from pathlib import Path

import pytest
from forks import Started

PROGRAM = Path(__file__).with_name("sharded_modules_run.py")
PRODUCTS = re.findall(r"^@product\ndef (\w+)", PROGRAM.read_text(), re.MULTILINE)
EPSILON = 2.0**-52

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What both ranks found, by the name of a check."""
    folder = tmp_path_factory.mktemp("modules")
    running = [Started(PROGRAM, folder, rank, 2) for rank in range(2)]
    ends = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors for _, errors in ends)
    ranks = [json.loads(lines.splitlines()[-1]) for lines, _ in ends]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def error_and_bar(parts):
    """Return the error of both ranks' parts together, and the one that is stated."""
    assert not any(isinstance(part, str) for part in parts), parts
    return math.hypot(*(error for error, _ in parts)), parts[0][1]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_the_whole_module(found, name):
    """Measured errors of at most 2e-10, and 1.5 times what is stated of them."""
    error, bar = error_and_bar(found[name])
    assert error <= min(1e-8, 3 * bar)
    assert bar <= 1e-8


@pytest.mark.parametrize("name", ["policy", "weights", "autocast"])
def test_in_bfloat16_the_stated_error_is_the_error(found, name):
    """Gathered in bfloat16, stored in it, or computed in it. Measured 0.4 to 0.9 of what is stated."""
    error, bar = error_and_bar([rank[name] for rank in found["half_precision"]])
    assert 0.005 < bar < 0.15
    assert error <= 1.5 * bar


def test_weights_in_bfloat16_are_restored(found):
    assert all(rank["restored"] for rank in found["half_precision"])


def test_a_measurement_of_dropout_leaves_no_trace_and_repeats(found):
    for rank in found["state"]:
        assert rank["samples"] == 3
        assert rank["random"]
        assert rank["same"]
        assert rank["modes"]
        assert rank["repeats"]
        assert rank["symmetric"][0] == pytest.approx(rank["symmetric"][1], rel=1e-7)


def test_all_ranks_fail_together_and_go_on(found):
    for where, what in (("first", "loss of batch 0 is nan"), ("second", "loss of batch 1 is nan"), ("none", "no exam")):
        here, there = (rank[where] for rank in found["failures"])
        assert len(here) == 3  # a product, a gradient and a loss
        assert all("another rank c" in message for message in here)
        assert all(what in message for message in there)
    error, bar = error_and_bar([rank["after"] for rank in found["failures"]])
    assert error <= min(1e-8, 3 * bar)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("detached", "a gradient is stopped"),
        ("hooked", "a function or hook changes it"),
        ("constant", "the loss does not depend on the parameters 0.weight"),
    ],
)
def test_a_gradient_that_is_no_derivative_is_refused(found, name, message):
    assert all(message in rank[name] for rank in found["no_hessian"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("double_backward", "ValueError: hvp='double_backward' needs second derivatives"),
        ("forward_over_reverse", "ValueError: hvp='forward_over_reverse' needs second derivatives"),
        ("micro_batch_size", "ValueError: micro_batch_size=2 cuts batches on each rank"),
        ("GGN", "TypeError: parameter 0.weight is sharded (a DTensor), and products of GGN need"),
        (
            "EmpiricalFisher",
            "TypeError: parameter 0.weight is sharded (a DTensor), and products of EmpiricalFisher need",
        ),
        ("over_batches", "ValueError: over_batches=True takes the batches of each rank apart"),
        ("projected", "ValueError: method='projected' needs whole vectors"),
        ("loss_slice", "ValueError: loss_slice moves whole parameters"),
        ("keskar", "ValueError: keskar_sharpness moves whole parameters"),
        ("optimizer in backward", "ValueError: parameter 2.weight has a hook"),
        ("max_norm", "ValueError: Embedding(max_norm=0.5) writes into its weight"),
        ("other batches", "ValueError: the batches of this rank are others"),
        ("drifted apart", "ValueError: parameter 0.weight is whole on several ranks and not the same on all"),
        ("float16", "TypeError: parameter 0.weight is sharded in float16"),
        ("whole vector", "numbers on this rank (93 on all)"),
        ("noise", "pass a loss_fn whose value is fixed"),
    ],
)
def test_what_shards_cannot_do_is_refused_by_name(found, name, message):
    assert all(message in rank[name] for rank in found["refusals"])


def test_refused_modules_keep_their_weights(found):
    assert all(rank["restored"] for rank in found["refusals"])


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_after_an_optimizer_step_the_matrix_is_that_of_the_new_weights(found, how):
    parts = [rank[how] for rank in found["optimizer_steps"]]
    error, bar = error_and_bar([part[:2] for part in parts])
    assert error <= min(1e-8, 3 * bar)
    for _, _, off, change in parts:
        assert off <= 8 * EPSILON
        assert change > 0.1
    assert all("the loss of batch 0 is nan" in rank[f"{how} to NaN"] for rank in found["optimizer_steps"])


def test_eigenvectors_sums_and_deflated_matrices(found):
    """Of relative errors; Ritz values are off by the square of residuals of at most 1e-3."""
    for rank in found["algebra"]:
        assert max(map(abs, [*rank["values"], rank["deflated"], rank["sum"]])) <= 1e-6
        assert rank["lengths"] == pytest.approx([1, 1], rel=1e-9)
        assert rank["products"] == pytest.approx(rank["residuals"], rel=0.1)
        assert max(rank["residuals"]) <= 1e-3


def test_adam_preconditions_shards_as_it_does_the_whole_module(found):
    """As of the critical learning rate: both after three steps, of which whole and sharded weights are the same."""
    for rank in found["preconditioned"]:
        assert max(map(abs, rank["tops"])) <= 1e-6
        sharded, whole = rank["factors"]
        assert sharded == pytest.approx(whole, rel=1e-6)
        assert rank["same"]
