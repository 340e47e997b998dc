"""Rows have the scale of the examples' own gradients on every batch, or say that it is not known.

Each pass begins with an even batch, from which nothing can be learned about how the loss weighs examples, and goes on
with uneven ones. Truth is autograd, one example at a time.
"""

import warnings

import pytest
import torch
from uneven import KINDS, Net, truth_of

from lightning_sketch import sketch_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT


def wrong_unmarked(kind, passes, batches, engine="auto"):
    """Return how many rows have a wrong scale and are not marked, how many are marked, and how many there are."""
    make, loss = KINDS[kind]
    wrong = marked = total = 0
    for seed in range(passes):
        torch.manual_seed(seed)
        module = Net()
        sketch = BlockSRHT(Layout.of(module).n, 24)
        counts = torch.randint(2, 12, (batches,)).tolist()
        data = [make(even=i == 0, count=count) for i, count in enumerate(counts)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = sketch_gradients(module, data, sketch, loss, engine=engine)
        pairs = zip(data, counts, strict=True)
        truth = torch.cat([truth_of(module, loss, batch, sketch, count) for batch, count in pairs])
        off = (rows.sketches - truth).norm(dim=1) > 1e-3 * truth.norm(dim=1) + 1e-6
        wrong += int((off & rows.scale_known).sum())
        marked += int((~rows.scale_known).sum())
        total += len(rows)
    return wrong, marked, total


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_batches_that_turn_uneven_are_right_or_marked(untyped, kind):
    wrong, marked, total = wrong_unmarked(kind, passes=2, batches=5)
    assert wrong == 0
    assert marked < total / 2


@pytest.mark.slow
def test_of_two_thousand_batches_at_most_two_rows_are_wrong_and_unmarked(untyped):
    """By chance both witnesses of a batch may have the mean weight; a batch that shows more comes soon.

    Rows that nothing can show are those of a pass whose every batch looked even to its witnesses.
    """
    found = {kind: wrong_unmarked(kind, passes=20, batches=20) for kind in KINDS}
    assert sum(wrong for wrong, _, _ in found.values()) <= 2, found
