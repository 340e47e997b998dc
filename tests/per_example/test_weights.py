"""How a loss weighs examples: the ways that are tried, and the gradients that they give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.per_example.weights import Weighings


def test_shares_times_their_scale_are_the_examples_own_gradients():
    """For a mean over tokens with padding: each example's own mean loss, through the mean over all tokens."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, -100], [1, -100, -100, -100], [2, 2, 0, 1]])
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    data = {"x": x, "labels": labels}

    def mean_over_tokens(part):
        return F.cross_entropy((part["x"] @ w).flatten(0, 1), part["labels"].flatten())

    (way,) = Weighings(nn.Module(), num_labels)(data)
    scale = way.scale
    assert scale.tolist() == [8 / 3, 8.0, 2.0]
    for i in range(3):
        part = {key: value[i : i + 1] for key, value in data.items()}
        others = {**data, "labels": labels.where(torch.arange(3)[:, None] == i, -100)}
        alone = torch.autograd.grad(mean_over_tokens(part), w)[0]
        summed = F.cross_entropy((x @ w).flatten(0, 1), others["labels"].flatten(), reduction="sum")
        share = torch.autograd.grad(summed / 8, w)[0]  # what example i adds to the mean over all 8 labels
        torch.testing.assert_close(scale[i] * share, alone)


def scales(data, *arguments, module=None):
    return {way.name: way.scale.tolist() for way in Weighings(module or nn.Module(), *arguments)(data)}


def test_scales_of_a_plain_mean_a_sum_and_an_example_without_labels():
    data = {"x": torch.zeros(4, 2), "labels": torch.tensor([[1, 2], [1, -100], [-100, -100], [3, 3]])}
    assert scales(data, None, "mean") == {"a mean over examples": [4.0] * 4}
    assert scales(data, None, "sum") == {"a sum over examples": [1.0] * 4}
    assert scales(data, num_labels) == {"weight_fn": [2.5, 5.0, 0.0, 2.5]}


def test_usual_ways_are_listed_once_each_likely_ones_first():
    """Labels, shifted or not, masks, a mean and a sum over examples."""

    class TinyForCausalLM(nn.Module):
        config = None

    labels = torch.tensor([[1, 2, 3], [1, -100, -100]])
    uneven = {
        "input_ids": torch.full((2, 3), 7),
        "labels": labels,
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    plain = list(scales(uneven))
    assert plain == [
        "a mean over labels",
        "a mean over shifted labels",
        "a mean over ones of ['attention_mask']",
        "a mean over shifted ones of ['attention_mask']",
        "a mean over examples",
        "a sum over examples",
    ]
    assert list(scales(uneven, module=TinyForCausalLM()))[:2] == plain[1::-1]
    masked = scales((torch.randn(3, 2), torch.randn(3), torch.tensor([1.0, 0.0, 1.0])))
    assert list(masked) == ["a mean over examples", "a mean over ones of [2]", "a sum over examples"]
    empty = scales((torch.randn(3, 2), torch.zeros(3)))
    assert empty["a mean over ones of [1]"] == [0.0] * 3  # a way is there on every batch, so that it is not refuted
    assert masked["a mean over ones of [2]"] == [2.0, 0.0, 2.0]


def test_an_unknown_reduction_is_refused(untyped):
    with pytest.raises(ValueError, match="reduction='none' is not known"):
        Weighings(nn.Module(), None, "none")


def test_a_weight_fn_that_counts_keys_is_refused():
    with pytest.raises(ValueError, match="counts the keys of a mapping"):
        Weighings(nn.Module(), len)({"x": torch.zeros(3, 2)})
