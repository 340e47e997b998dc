"""Small data sets without a download, and networks trained on many subsets of them at once, as one tensor program.

    theta_s = argmin over a fixed number of full-batch Adam steps of mean_{i in s} loss_i + decay / 2 |theta|²

All members of a stack have their own weights along a first axis; s and the seed of the initial weights are per member.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A data set, network and training; the truth is the mean of `repeats` trainings with other seeds."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    hidden: tuple[int, ...] = (64,)
    decay: float = 1e-3
    steps: int = 300
    lr: float = 1e-2
    repeats: int = 2

    @property
    def outputs(self) -> int:
        return 1 if self.y.is_floating_point() else int(self.y.max()) + 1

    def network(self, seed: int = 0) -> nn.Sequential:
        """Return an untrained network."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (self.x.shape[1], *self.hidden, self.outputs)
            layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each example."""
        if y.is_floating_point():
            return (output[..., 0] - y).square()
        return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)

    def train(
        self, subsets: Tensor, seeds: list[int], start: nn.Module | None = None, steps: int | None = None, keep: int = 0
    ) -> list[list[Tensor]]:
        """Train one member on each row of example indices, and return the weights by parameter, stacked.

        `start` goes on from there; with `keep` the weights at so many evenly spaced steps, else the last only.
        """
        networks = [start or self.network(seed) for seed in seeds]
        stacked = [torch.stack(same).detach() for same in zip(*(list(n.parameters()) for n in networks), strict=True)]
        stacked = [p.clone().requires_grad_() for p in stacked]
        optimizer = torch.optim.Adam(stacked, lr=self.lr)
        x, y, steps, kept = self.x[subsets], self.y[subsets], steps or self.steps, []
        for step in range(1, steps + 1):
            decay = self.decay / 2 * sum(p.square().sum() for p in stacked)
            optimizer.zero_grad()
            (self.loss(forward(stacked, x), y).mean(1).sum() + decay).backward()
            optimizer.step()
            if (keep and step % (steps // keep) == 0) or step == steps:
                kept.append([p.detach().clone() for p in stacked])
        return kept

    @torch.no_grad()
    def test_losses(self, stacked: list[Tensor]) -> Tensor:
        """Return the test losses, (members, tests)."""
        count = len(stacked[0])
        return self.loss(forward(stacked, self.x_test.expand(count, -1, -1)), self.y_test.expand(count, -1))

    def member(self, stacked: list[Tensor], index: int = 0) -> nn.Sequential:
        """Return one member of a stack as a module."""
        module = self.network()
        with torch.no_grad():
            for parameter, same in zip(module.parameters(), stacked, strict=True):
                parameter.copy_(same[index])
        return module

    def ground_truth(self, subsets: Tensor, at_once: int = 25) -> Tensor:
        """Return test losses (repeats, subsets, tests) of models trained on each subset, several times."""
        losses = [
            torch.cat(
                [
                    self.test_losses(self.train(part, [1000 + repeat * 500 + i for i in range(len(part))])[-1])
                    for part in subsets.split(at_once)
                ]
            )
            for repeat in range(self.repeats)
        ]
        return torch.stack(losses)


def forward(stacked: list[Tensor], x: Tensor) -> Tensor:
    """Map (members, examples, inputs) to (members, examples, outputs)."""
    for layer, (weight, bias) in enumerate(zip(stacked[::2], stacked[1::2], strict=True)):
        x = torch.baddbmm(bias[:, None], x.relu() if layer else x, weight.mT)
    return x


def halves(examples: int, count: int = 50, seed: int = 0) -> Tensor:
    """Return the example indices of random halves, (count, examples // 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(examples, generator=generator)[: examples // 2] for _ in range(count)])


def masks_of(subsets: Tensor, examples: int) -> Tensor:
    """Return the same as booleans (count, examples)."""
    return torch.zeros(len(subsets), examples, dtype=torch.bool).scatter_(1, subsets, True)


def _split(x, y, train: int, test: int, **options) -> Problem:
    """Return data in random order; whole-number labels are classes, real ones are standardized by the training part."""
    order = torch.tensor(np.random.default_rng(0).permutation(len(x)))
    x, y = torch.as_tensor(x, dtype=torch.float32)[order], torch.as_tensor(y)[order]
    y = (y.float() - y[:train].float().mean()) / y[:train].float().std() if y.is_floating_point() else y.long()
    return Problem(x[:train], y[:train], x[train : train + test], y[train : train + test], **options)


def _standardized(x, y, train: int, test: int, **options) -> Problem:
    given = _split(x, y, train, test, **options)
    mean, std = given.x.mean(0), given.x.std(0).clamp(min=1e-6)
    return replace(given, x=(given.x - mean) / std, x_test=(given.x_test - mean) / std)


def _digits(train: int = 1000, **options) -> Problem:
    x, y = datasets.load_digits(return_X_y=True)
    return _split(x / 16, y, train, 200, **options)


def _odd_or_even() -> Problem:
    given = _digits()
    return replace(given, y=given.y % 2, y_test=given.y_test % 2)


def flipped(given: Problem, share: float, seed: int = 1) -> Problem:
    """Return wrong labels for the first ones of the training examples."""
    count, classes = int(share * len(given.y)), given.outputs
    shift = torch.randint(1, classes, (count,), generator=torch.Generator().manual_seed(seed))
    y = given.y.clone()
    y[:count] = (y[:count] + shift) % classes
    return replace(given, y=y)


def _cancer(**options) -> Problem:
    return _standardized(*datasets.load_breast_cancer(return_X_y=True), 400, 169, repeats=5, **options)


def _made(train: int, **options) -> Problem:
    x, y = datasets.make_classification(
        train + 200, 20, n_informative=8, n_classes=3, flip_y=0.05, class_sep=1.0, random_state=0
    )
    return _standardized(x, y, train, 200, **options)


def _moons(**options) -> Problem:
    return _standardized(*datasets.make_moons(700, noise=0.25, random_state=0), 500, 200, **options)


LINEAR = {"hidden": (), "decay": 2e-3, "repeats": 1, "lr": 3e-2}

# The first five have target values in the tables; the others test the damping rule.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "digits LR": lambda: _digits(steps=800, **LINEAR),
    "digits": _digits,
    "breast_cancer": _cancer,
    "wine": lambda: _standardized(*datasets.load_wine(return_X_y=True), 120, 58, repeats=3),
    "diabetes": lambda: _standardized(*datasets.load_diabetes(return_X_y=True), 300, 142),
    "mclass": lambda: _made(500),
    "digits, 20 % noise": lambda: flipped(_digits(500), 0.2),
    "digits, two hidden": lambda: _digits(500, hidden=(64, 64)),
    "digits 300": lambda: _digits(300),
    "moons": _moons,
    "breast_cancer LR": lambda: replace(_cancer(), **LINEAR, steps=800),
    "breast_cancer, no decay": lambda: _cancer(decay=0.0),
    "digits 300, no decay": lambda: _digits(300, decay=0.0),
    "moons, no decay": lambda: _moons(decay=0.0),
    "digits odd/even": _odd_or_even,
    "Friedman": lambda: _standardized(*datasets.make_friedman1(700, noise=1.0, random_state=0), 500, 200),
    "Gaussian quantiles": lambda: _standardized(
        *datasets.make_gaussian_quantiles(n_samples=700, n_features=10, n_classes=4, random_state=0), 500, 200
    ),
    "mclass 4000": lambda: _made(4000),
}
