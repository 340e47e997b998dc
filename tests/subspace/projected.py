"""Full training whose optimizer is projected: the definition of training in a subspace, by a dense D in float64.

Every hook then sees what it sees in full training: the weights, their gradients and its own Trainer.
"""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch.subspace import SubspaceModule


class Projected(torch.optim.Optimizer):
    """An optimizer of w: its steps are those of another one along D g, and move the weights by Dᵀ times the step.

    A weight that was frozen in the forward pass does not move; without a gradient, the gradient counts as zero.

    Args:
        theta: The weights, in the order of the columns of D.
        dense: The matrix D.
        inner: Makes the optimizer of w from a list of parameters.
        others: Parameters that are trained in full.
        clip: The largest norm of the gradient of w, in units of `scale`, or None.
        scale: The factor of D.
    """

    def __init__(self, theta, dense, inner, others=(), clip=None, scale=1.0):
        super().__init__([*theta, *others], {})
        self.theta, self.dense, self.clip, self.scale = list(theta), dense, clip, scale
        self.w = nn.Parameter(dense.new_zeros(len(dense)))
        self.inner = inner([self.w, *others])
        self.last = self.w.detach().clone()

    @torch.no_grad()
    def move(self, moves):
        step = self.dense.T @ (self.w - self.last)
        self.last.copy_(self.w)
        for p, part, moving in zip(self.theta, step.split([p.numel() for p in self.theta]), moves, strict=True):
            if moving:
                p.add_(part.view_as(p))

    def step(self, closure=None):
        moves = [p.requires_grad for p in self.theta]

        def inner():
            self.move(moves)
            before = [p.requires_grad for p in self.theta]
            with torch.enable_grad():
                loss = closure()
            given = [p.grad is not None for p in self.theta]
            moves[:] = [has or (p.requires_grad and was) for p, has, was in zip(self.theta, given, before, strict=True)]
            g = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.theta]
            self.w.grad = self.dense @ torch.cat([part.flatten() for part in g]) if any(given) else None
            if self.clip is not None:
                self.w.grad *= min(1.0, self.clip / float(self.w.grad.norm() / self.scale + 1e-6))  # as PyTorch does
            return loss

        loss = self.inner.step(inner)
        self.move(moves)
        return loss


class Net(pl.LightningModule):
    """A network of float64 that learns the angles of a teacher network by descent with momentum."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(5, 6), nn.Linear(6, 2)
        self.double()
        self.notes: list[float] = []

    def forward(self, x):
        return self.last(torch.tanh(self.body(x)))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def inner(self, parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def configure_optimizers(self):
        return self.inner(self.parameters())


def batches(count=48, batch_size=6):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    y = torch.stack([torch.sin(2 * x[:, 0]), x[:, 1] * x[:, 2]], 1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def both(kind, callbacks=list, steps=8, clip=None, run=None, dim=7, **options):
    """Train a kind of module in a subspace, and in full by a projected optimizer; return both modules inside.

    Args:
        kind: A class of modules, a `Net`.
        callbacks: Makes the callbacks of a run.
        steps: The number of optimizer steps.
        clip: The Trainer's threshold of the gradient's norm; the projected optimizer applies it to w.
        run: Other options of the Trainer.
        dim: The number of directions.
        options: Options of the subspace.
    """
    pl.seed_everything(7, verbose=False)
    sub = SubspaceModule(kind(), dim, **options)
    pl.seed_everything(7, verbose=False)
    plain = kind()
    theta = [dict(plain.named_parameters())[name] for name in sub.weights.layout.names]
    ids, dense = set(map(id, theta)), sub.directions.as_matrix(dtype=torch.float64)
    others = [p for p in plain.parameters() if id(p) not in ids] if "others" in options or "head" in options else []
    arguments = {"max_steps": steps, **(run or {})}
    made = Projected(theta, dense, plain.inner, others, clip, sub.directions.scale)
    plain.configure_optimizers = lambda: made
    trainer(*callbacks(), **arguments).fit(plain, batches())
    trainer(*callbacks(), gradient_clip_val=clip, **arguments).fit(sub, batches())
    return sub, plain


def assert_same(sub, plain, rtol=1e-9):
    """Check that all weights and notes are those of the projected optimizer, and that something has moved."""
    for (name, one), other in zip(sub.module.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=rtol, atol=rtol), name
    assert len(sub.module.notes) == len(plain.notes)
    assert torch.allclose(torch.tensor(sub.module.notes), torch.tensor(plain.notes), rtol=1e-5)


def moved(sub):
    """Return how far the weights have moved from their start."""
    pairs = zip(sub.weights.parameters(), sub.theta0().values(), strict=True)
    return float(torch.cat([(p - start).detach().flatten() for p, start in pairs]).norm())
