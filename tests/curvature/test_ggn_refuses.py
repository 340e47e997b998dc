"""What the Gauss-Newton matrix cannot be had of is refused with a way out."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_sketch.curvature import GGN, CrossEntropy

X = torch.linspace(-1, 1, 12).view(4, 3)
Y = torch.tensor([0, 1, 2, 0])


def product(batch, module=None, **kwargs):
    """Return a product over two batches: with a single one, the loss is computed before."""
    g = GGN(module or nn.Linear(3, 3), [batch, batch], **kwargs)
    return g.matvec(torch.ones(g.shape[0]))


@pytest.mark.parametrize(
    ("output", "labels", "found"),
    [
        ((4, 3, 3), (4, 3), "found 2 axes of classes"),
        ((4, 3, 5), (4, 4), "found 0 axes of classes"),
        ((4,), (4,), "found 0 axes of classes"),
        ((4, 3), (3,), "found 0 axes of classes"),
    ],
    ids=["either", "neither", "none", "other size"],
)
def test_classes_along_an_axis_that_cannot_be_told(output, labels, found):
    shapes = (
        rf"{found} in an output of shape \({output[0]},.* for labels of shape \({labels[0]},.*; pass output_loss_fn"
    )
    for call in (CrossEntropy(), lambda z, batch: CrossEntropy().hessian_matvec(z, batch, z)):
        with pytest.raises(ValueError, match=shapes):
            call(torch.zeros(output), (X, torch.zeros(labels, dtype=torch.long)))


def test_two_axes_of_classes_may_be_told_apart_by_hand():
    module, batch = nn.Linear(3, 3), (torch.ones(4, 3, 3), torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="found 2 axes"):
        product(batch, module)
    assert product(batch, module, output_loss_fn=lambda z, b: functional.cross_entropy(z, b[1])).isfinite().all()


def test_squared_errors_of_unequal_shapes():
    """With broadcasting, each output would be compared with each label."""
    with pytest.raises(ValueError, match=r"equal shapes, got output \(4, 1\) and labels \(4,\); reshape one"):
        product((X, torch.full((4,), 0.5)), nn.Linear(3, 1))


@pytest.mark.parametrize(
    ("batch", "kind"),
    [(X, "Tensor"), ([X], "list"), ((X, "label"), "tuple"), ({"input": X}, "dict")],
    ids=["tensor", "alone", "text", "unnamed"],
)
def test_a_batch_without_labels(batch, kind):
    with pytest.raises(ValueError, match=f"no labels in a batch of type {kind}.*; pass output_loss_fn"):
        product(batch)


def test_labels_out_of_range():
    with pytest.raises(IndexError, match="out of bounds"):
        product((X, Y + 1))


@pytest.mark.parametrize("returned", [lambda z: (z, z), lambda z: {"out": z}, lambda z: None])
def test_an_output_that_is_no_tensor(returned):
    with pytest.raises(ValueError, match=r"the model returned a \w+; pass model_fn=lambda module, batch"):
        product((X, Y), model_fn=lambda module, batch: returned(module(batch[0])))


@pytest.mark.parametrize("cut", [lambda module, batch: module(batch[0]).detach(), lambda module, batch: batch[0]])
def test_an_output_cut_off_from_the_parameters(cut):
    with pytest.raises(ValueError, match=r"does not depend on the parameters weight, bias.*no_grad"):
        product((X, Y), model_fn=cut)


def multiplied(z):
    """Multiply outputs, by an operation whose backward pass PyTorch cannot differentiate."""
    return torch.segment_reduce(z.flatten(), "prod", lengths=torch.tensor([z.numel()]))


def test_an_operation_of_the_model_without_second_derivative():
    """J v is computed by differentiating Jᵀ u once more."""
    with pytest.raises(ValueError, match=r"cannot differentiate twice: .*_segment_reduce_backward is not impl"):
        product((X, Y), model_fn=lambda m, b: multiplied(m(b[0])), output_loss_fn=lambda z, batch: z.square().mean())


def test_an_operation_of_the_loss_without_second_derivative():
    with pytest.raises(ValueError, match=r"cannot differentiate twice: .*_segment_reduce_backward"):
        product((X, Y), output_loss_fn=lambda z, batch: multiplied(z).mean())


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        product((torch.ones(4, 2), Y))
