"""Batches of five kinds, the first even and the others uneven, with their losses, and the rows that are right."""

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, WIDTH, TOKENS = 5, 4, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def draw(*shape):
    return torch.randn(*shape, WIDTH)


def class_weights(even, count):
    """Weights 1, 2 and 5 of the classes: the mean is over weights, which no entry of the batch shows."""
    labels = torch.zeros(count, dtype=torch.long) if even else torch.randint(CLASSES, (count,))
    return draw(count), labels


def weighted(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0]))


def padded(even, count):
    """Labels of -100 on padding, with a mean over the others, in all of the batch."""
    lengths = torch.full((count,), TOKENS) if even else torch.randint(1, TOKENS + 1, (count,))
    labels = torch.randint(CLASSES, (count, TOKENS))
    return {"x": draw(count, TOKENS), "labels": labels.where(torch.arange(TOKENS) < lengths[:, None], -100)}


def over_labels(module, batch):
    return F.cross_entropy(module(batch["x"]).flatten(0, 1), batch["labels"].flatten())


def masked(even, count):
    """A mask of examples, written by hand, where those that are masked have no gradient."""
    mask = torch.ones(count) if even else (torch.rand(count) < 0.6).float()
    mask[0] = 1
    return draw(count), draw(count)[:, 0], mask


def over_mask(module, batch):
    x, y, mask = batch
    return ((module(x)[:, 0] - y).square() * mask).sum() / mask.sum().clamp(min=1)


def unseen(even, count):
    """Lengths that the loss computes itself, from zeros in the input: a mean over tokens that nothing else shows."""
    lengths = torch.full((count,), TOKENS) if even else torch.randint(1, TOKENS + 1, (count,))
    return draw(count, TOKENS) * (torch.arange(TOKENS) < lengths[:, None])[..., None], torch.randn(count)


def over_tokens(module, batch):
    x, y = batch
    kept = x.abs().sum(-1) > 0
    return ((module(x)[..., 0] - y[:, None]).square() * kept).sum() / kept.sum()


def summed(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


KINDS = {
    "class weights": (class_weights, weighted),
    "padding": (padded, over_labels),
    "masks": (masked, over_mask),
    "token means": (unseen, over_tokens),
    "sums": (class_weights, summed),
}


def truth_of(module, loss, batch, sketch, count):
    """Return the sketches of the gradients of the examples of a batch, each alone."""
    rows = []
    for i in range(count):
        pairs = batch.items() if isinstance(batch, dict) else enumerate(batch)
        own = {key: value[i : i + 1] for key, value in pairs}
        example = own if isinstance(batch, dict) else tuple(own.values())
        gradients = torch.autograd.grad(loss(module, example), list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return sketch.matvec(torch.stack(rows))
