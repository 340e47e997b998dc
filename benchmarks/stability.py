"""Measure what the stability ratio and the critical learning rate say before training diverges (4 minutes of CPU time).

Six trainings, each at a ladder of learning rates up to those at which it diverges: an MLP and a CNN on scikit-learn's
digits, and a small GPT on the characters of a Python file; SGD with momentum 0.9 and AdamW, 160 steps, batches of 64,
no warmup. One thread. On 128 kept examples, after steps 1, 2, 4, 8 and then each 16th:

ratio     lambda_max of the preconditioned Hessian over the optimizer's edge of stability
factor    the largest step along the last one that does not raise the loss of the kept examples, over the step itself

A run diverges at the first step at which the loss of a training batch is not finite, or above twice that of the initial
weights. The table has both numbers at the last measurement before that, and for runs that do not diverge their medians
and their worst (the largest ratio, the smallest factor) from step 16 on. "quality" is the loss of the kept examples at
the end.

What was expected before the first run: runs that train stay near the edge, SGD at ratios of 0.3 to 1.2 and AdamW at 0.1
to 2, with factors of 0.7 to 5; diverging runs are above 2 at the last measurement, with a factor below 0.5, in four of
five; ratios above 1 alone do not mean divergence, above all in the first ten steps of AdamW, whose P is still small.

What was found (torch 2.13, one thread of a shared CPU):

- All 10 runs that diverged had a ratio above 2 (3.5 to 10^6) and a factor below 0.5 at the last measurement before.
  They diverged within five steps, so that only a measurement in the first steps warns of it; none diverged late.
- Of runs that did not diverge, SGD's were above 1 in 6 of 140 measurements and AdamW's in 22 of 120, all at the best
  rate of their training or above. The three runs with a median ratio above 1 ended with 1.5 to 10 times its loss.
- A ratio below 1 does not mean that the rate is good: rates that were too low had 0.002 to 0.2, the best ones 0.06 to
  0.4, and two runs of the CNN that SGD broke, with 18 and 36 times the loss, had 0.3 and 0.03: where units have died
  the loss is flat. At batches of 64 the noise keeps SGD below its edge.
- The factor is noisy on single steps: 58 of 260 late measurements of runs that did not diverge were below 1, since a
  step on 64 examples may raise the loss of 128 others. Its median falls with the rate, from 18 to 130 at the lowest
  rates to 0.9 to 2.5 at the highest that did not diverge.
- A bias in front of batch normalization had made the ratio of AdamW 500 to 10,000 at good rates: it has no gradient in
  training, and curvature in evaluation. Hence bias=False here, and the warning of `Preconditioned.from_optimizer`.
"""

import argparse
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_sketch.curvature import (
    Hessian,
    Preconditioned,
    copy_weights,
    critical_learning_rate,
    spectrum,
    stability_edge,
)

STEPS = 160
MEASURED = {1, 2, 4, 8, *range(16, STEPS + 1, 16)}
BATCH, KEPT, CONTEXT = 64, 128, 32

Batch = tuple[Tensor, Tensor]


class GPT(nn.Module):
    """A causal transformer of two blocks, before layer normalization."""

    def __init__(self, vocabulary: int, width: int = 32):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token, (examples, vocabulary, context)."""
        x = self.token(tokens) + self.place.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x).mT


def digits() -> Batch:
    """Return images of handwritten digits and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)


def characters() -> Batch:
    """Return pieces of a Python file as numbers of its characters, and the same, one further."""
    text = inspect.getsource(argparse)
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[character] for character in text])
    pieces = tokens.unfold(0, CONTEXT + 1, 17)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def mlp() -> nn.Module:
    """Return a network of three layers, 5,418 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    """Return a network of two convolutions with batch normalization."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


def gpt() -> nn.Module:
    """Return a small GPT for the characters of the file."""
    return GPT(int(characters()[0].max()) + 1)


def sgd(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return SGD with momentum."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return AdamW with its defaults."""
    return torch.optim.AdamW(parameters, lr=lr)


class Training(NamedTuple):
    """A training whose learning rate is raised.

    Attributes:
        name: What the table calls it.
        make: Makes the model.
        data: Makes the inputs and targets.
        optimizer: Makes the optimizer of parameters at a rate.
        lowest: The lowest rate; each further one is four times as high.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Batch]
    optimizer: Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer]
    lowest: float


TRAININGS = [
    Training("MLP, SGD", mlp, digits, sgd, 0.003),
    Training("MLP, AdamW", mlp, digits, adamw, 0.001),
    Training("CNN, SGD", cnn, digits, sgd, 0.003),
    Training("CNN, AdamW", cnn, digits, adamw, 0.001),
    Training("GPT, SGD", gpt, characters, sgd, 0.01),
    Training("GPT, AdamW", gpt, characters, adamw, 0.001),
]
RATES = 6


class Measured(NamedTuple):
    """Both numbers after a step."""

    step: int
    ratio: float
    factor: float


class Run(NamedTuple):
    """A training at one rate: what was measured, the step at which it diverged, if it did, and the last loss."""

    rate: float
    measured: list[Measured]
    diverged: int | None
    loss: float


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


def run(training: Training, rate: float) -> Run:
    """Train at one rate, to the end or until it diverges."""
    torch.manual_seed(0)
    module, (inputs, targets) = training.make(), training.data()
    order = torch.randperm(len(inputs))
    kept, rest = order[:KEPT], order[KEPT:]
    hessian = Hessian(loss_fn, module, [(inputs[kept], targets[kept])])
    optimizer = training.optimizer(module.parameters(), rate)
    measured: list[Measured] = []
    first = math.nan
    for step in range(1, STEPS + 1):
        chosen = rest[torch.randint(len(rest), (BATCH,))]
        before = copy_weights(module) if step in MEASURED else {}
        loss = loss_fn(module.train(), (inputs[chosen], targets[chosen]))
        first = float(loss.detach()) if step == 1 else first
        if not float(loss.detach()) <= 2 * first:
            return Run(rate, measured, step, math.nan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not all(p.isfinite().all() for p in module.parameters()):
            return Run(rate, measured, step, math.nan)
        if step in MEASURED:
            try:
                top = spectrum(Preconditioned.from_optimizer(hessian, optimizer), num_matvecs=24, top_k=1, bottom_k=0)
                factor = critical_learning_rate(hessian, before, rate).factor
            except ValueError:  # the loss of the kept examples is not finite
                return Run(rate, measured, step, math.nan)
            measured.append(Measured(step, top.lambda_max / stability_edge(optimizer).edge, factor))
    return Run(rate, measured, None, hessian.loss())


def line(run: Run) -> str:
    """Return a line of the table."""
    if run.diverged is None:
        late = [m for m in run.measured if m.step >= 16]
        ratios, factors = [m.ratio for m in late], [m.factor for m in late]
        numbers = (
            f"{statistics.median(ratios):9.2g} {max(ratios):9.2g} {statistics.median(factors):9.2g} {min(factors):9.2g}"
        )
        return f"{run.rate:9.3g}         -  {run.loss:7.3f}  {numbers}"
    last = run.measured[-1] if run.measured else Measured(0, math.nan, math.nan)
    return (
        f"{run.rate:9.3g} {run.diverged:9}        -  {last.ratio:9.2g} {'':9} {last.factor:9.2g}   (step {last.step})"
    )


def median_ratio(run: Run) -> float:
    """Return the median ratio from step 16 on."""
    return statistics.median(m.ratio for m in run.measured if m.step >= 16)


def worse(run: Run, runs: "list[tuple[Training, Run]]") -> str:
    """Return the last loss over the lowest of all rates of the same training."""
    (training,) = (training for training, other in runs if other is run)
    return f"{run.loss / min(r.loss for t, r in runs if t is training and r.diverged is None):.3g}"


def share(found: list[bool]) -> str:
    """Return how many of how many."""
    return f"{sum(found)} of {len(found)}"


def main() -> None:
    """Print the table of all runs, and what both numbers predict."""
    torch.set_num_threads(1)
    began, runs = time.perf_counter(), []
    for training in TRAININGS:
        print(f"\n{training.name}\n     rate  diverged  quality      ratio     worst    factor     worst")
        for k in range(RATES):
            runs.append((training, run(training, training.lowest * 4**k)))
            print(line(runs[-1][1]), flush=True)
    for name, some in (
        ("SGD", [r for training, r in runs if training.optimizer is sgd]),
        ("AdamW", [r for training, r in runs if training.optimizer is adamw]),
    ):
        bad = [r.measured[-1] for r in some if r.diverged is not None and r.measured]
        good = [r for r in some if r.diverged is None]
        late = [m for r in good for m in r.measured if m.step >= 16]
        print(f"\n{name}: {len(bad)} runs diverged, {len(good)} did not")
        for high in (True, False):
            times = [worse(r, runs) for r in good if (median_ratio(r) > 1) == high]
            print(f"  median ratio {'above' if high else 'below'} 1: loss over the best of its training", *times)
        for most in (1.0, 2.0, 5.0):
            print(
                f"  ratio above {most:g}: {share([m.ratio > most for m in bad])} runs at the last measurement before "
                f"divergence; {share([m.ratio > most for m in late])} measurements of the others"
            )
        for least in (1.0, 0.5, 0.1):
            print(
                f"  factor below {least:g}: {share([m.factor < least for m in bad])} runs at the last measurement "
                f"before divergence; {share([m.factor < least for m in late])} measurements of the others"
            )
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
