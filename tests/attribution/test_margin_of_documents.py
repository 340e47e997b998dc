"""The curvatures "margin" and "trak" of documents are those of the margin of p = exp(-mean loss of the tokens)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.attribution import row_curvature, sketch_gradients
from lightning_sketch.operators import BlockSRHT

DATA = torch.Generator().manual_seed(3)
WORDS = torch.randint(0, 9, (7, 6), generator=DATA)
with torch.random.fork_rng():
    torch.manual_seed(0)
    MODULE = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9)).double()


def loss_of_documents(module, batch):
    """The mean loss of the next token, one number a document."""
    return F.cross_entropy(module(batch[:, :-1]).mT, batch[:, 1:], reduction="none").mean(1)


def row_fn(module, batch):
    losses = loss_of_documents(module, batch)
    return losses, (-losses).exp()


def rows(**options):
    sketch = BlockSRHT(sum(p.numel() for p in MODULE.parameters()), 16)
    return sketch_gradients(MODULE, [WORDS], sketch, lambda m, b: loss_of_documents(m, b).mean(), **options)


def test_they_are_made_of_gradients_of_the_margin():
    """Within the rounding of prob_true, a float32 column."""
    made, margins, spread = rows(row_fn=row_fn), [], []
    for document in WORDS:
        p = (-loss_of_documents(MODULE, document[None])[0]).exp()
        gradients = torch.autograd.grad((p / (1 - p)).log(), list(MODULE.parameters()))
        margins.append(made.sketch.matvec(torch.cat([gradient.flatten() for gradient in gradients])))
        spread.append((p * (1 - p)).detach())
    margins, spread = torch.stack(margins), torch.stack(spread)
    for kind, true in (("trak", margins), ("margin", margins * spread.sqrt()[:, None])):
        torch.testing.assert_close(row_curvature(made, kind).dense(), true.T @ true / 7, rtol=1e-5, atol=1e-7)


def test_without_probabilities_they_say_what_to_give():
    with pytest.raises(ValueError, match=r"row_fn=.*exp\(-loss\), for documents too"):
        row_curvature(rows(), "margin")
