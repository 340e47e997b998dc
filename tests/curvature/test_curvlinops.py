"""On curvlinops' own cases, our matrices are theirs.

Models, losses and data are those of the tests in a checkout of https://github.com/f-dangel/curvlinops (version 3),
named by the environment variable CURVLINOPS; they are not in its wheel. It needs einops and einconv. Run by

    CURVLINOPS=path/to/checkout pytest -m peers
"""

import importlib
import math
import os
import sys

import pytest
import torch
from torch import nn

from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian

checkout = os.environ.get("CURVLINOPS", "")
if checkout:
    sys.path.insert(0, checkout)  # before the `test` of the standard library, which has the same name
if not (os.path.isdir(os.path.join(checkout, "test")) and importlib.util.find_spec("curvlinops")):
    pytest.skip("CURVLINOPS is not a checkout of curvlinops", allow_module_level=True)

curvlinops = importlib.import_module("curvlinops")
their_cases = importlib.import_module("test.cases")
their_fixtures = importlib.import_module("test.conftest")
change_dtype = importlib.import_module("test.utils").change_dtype

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

_ON_CPU = [case for case in (*their_cases.CASES, *their_cases.CNN_CASES) if case["device"].type == "cpu"]
_NAMES = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy",
    nn.MSELoss: "squared_error",
}


class OfFunction(nn.Module):
    """Give a function of named parameters the form of a module."""

    def __init__(self, function, parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x):
        return self.function(dict(self.named_parameters()), x)


class Case:
    """A case of theirs, and what it is called here: a module at its parameters, and a mean over examples.

    Attributes:
        theirs: Model, loss, parameters, data, and what else their operators take.
        module: The model at these parameters.
        scale: Their matrix over ours. It is the number of examples where their losses are sums.
    """

    def __init__(self, case):
        model, self.loss, parameters, self.batches, batch_size_fn = change_dtype(
            their_fixtures.initialize_case(case), torch.float64
        )
        self.theirs = (model, self.loss, parameters, self.batches), {"batch_size_fn": batch_size_fn}
        if isinstance(model, nn.Module):
            self.module = model
            model.load_state_dict({k: v.detach() for k, v in parameters.items()})
        else:
            self.module = OfFunction(model, parameters)
        examples = sum(len(y) for _, y in self.batches)
        self.is_sum = self.loss.reduction == "sum"
        self.scale = examples if self.is_sum else 1

    def output_loss(self, output, batch):
        """Return the mean over examples of what they sum, or the mean that they take."""
        y = batch[1]
        return self.loss(output, y) / (len(y) if self.is_sum else 1)

    def training_loss(self, module, batch):
        return self.output_loss(module(batch[0]), batch)

    def single_losses(self, module, batch):
        """Return the losses of single examples, of which each position of a sequence is one of theirs."""
        output, y = module(batch[0]), batch[1]
        losses = type(self.loss)(reduction="none")(output, y)
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return losses.flatten()
        # Their mean of outer products is over examples and outputs, but the gradients are those of sums over outputs.
        return losses.flatten(0, -2).sum(-1) / (1 if self.is_sum else math.sqrt(y.shape[-1]))

    def rows(self, batch):
        """Return how many examples they find in a batch."""
        y = batch[1]
        return y.numel() if isinstance(self.loss, nn.CrossEntropyLoss) else y[..., 0].numel()


@pytest.fixture(params=range(len(_ON_CPU)))
def case(request):
    return Case(_ON_CPU[request.param])


def matrix(operator):
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


def assert_equal(ours, theirs, relative):
    assert float((ours - theirs).norm()) <= relative * float(theirs.norm())


@pytest.mark.parametrize("hvp", ["auto", "double_backward", "forward_over_reverse"])
def test_the_hessian_is_theirs(case, hvp):
    (args, kwargs), h = case.theirs, Hessian(case.training_loss, case.module, case.batches, hvp=hvp)
    assert_equal(case.scale * h.as_matrix(), matrix(curvlinops.HessianLinearOperator(*args, **kwargs)), 1e-10)


def test_a_hessian_by_differences_is_theirs_or_refused_for_its_kinks(case, record_property):
    """All cases have ReLUs. A column that is not refused has three correct digits."""
    args, kwargs = case.theirs
    theirs = matrix(curvlinops.HessianLinearOperator(*args, **kwargs))
    h = Hessian(case.training_loss, case.module, case.batches, hvp="finite_differences")
    columns = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))[:50]
    refused = 0
    for i in columns:
        found, message = None, ""
        try:
            found = h @ torch.eye(len(theirs), dtype=torch.float64)[i]
        except ValueError as error:
            message = str(error)
        assert found is not None or "kinks" in message
        if found is None:
            refused += 1
        else:
            bound = 1e-3 * float(theirs[i].norm()) + 1e-9 * float(theirs.norm())
            assert float((case.scale * found - theirs[i]).norm()) <= bound
    record_property("refused", f"{refused} of {len(columns)}")
    assert refused < len(columns)


def test_the_gauss_newton_matrix_is_theirs(case):
    (args, kwargs), g = case.theirs, GGN(case.module, case.batches, output_loss_fn=case.output_loss)
    assert_equal(case.scale * g.as_matrix(), matrix(curvlinops.GGNLinearOperator(*args, **kwargs)), 1e-10)


def test_the_gauss_newton_matrix_of_a_named_loss_is_theirs(case):
    """Our losses by name have the classes last; theirs of a sequence have them second."""
    (args, kwargs), name = case.theirs, _NAMES[type(case.loss)]
    axis = 1 if name == "cross_entropy" else -1
    scale = sum(case.rows(batch) for batch in case.batches) if case.is_sum else 1
    if case.is_sum and name != "cross_entropy":  # a sum over outputs too, where ours is a mean over them
        scale *= case.batches[0][1].shape[-1]
    g = GGN(case.module, case.batches, lambda module, batch: module(batch[0]).movedim(axis, -1), name)
    assert_equal(scale * g.as_matrix(), matrix(curvlinops.GGNLinearOperator(*args, **kwargs)), 1e-10)


def test_the_empirical_fisher_is_theirs(case):
    (args, kwargs), scale = case.theirs, sum(map(case.rows, case.batches)) if case.is_sum else 1
    f = EmpiricalFisher(case.single_losses, case.module, case.batches, num_examples=case.rows)
    assert_equal(scale * f.as_matrix(), matrix(curvlinops.EFLinearOperator(*args, **kwargs)), 1e-10)
