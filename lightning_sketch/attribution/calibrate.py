"""Chooses the damping of influence scores by a few short training runs.

    for random halves s_1 ... s_m of the examples: losses of the queries after training on s_j alone
    lambda = the damping whose scores, summed over s_j, predict these losses best (mean Spearman over queries)

among the automatic damping times 10^-1 ... 10, in quarters of a decade. Training continues from the final weights, for
a tenth of the steps and at least 20: this shows how far examples move a trained model, at a small part of the cost of
training from scratch. The range is narrow so that the noise of a few halves cannot pick an extreme value, and reaches
the best damping of all problems of `benchmarks/lds_problems.py` and of a small language model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch.attribution._selected import select
from lightning_sketch.attribution.curvature import Curvature, Influence, Kind, automatic
from lightning_sketch.attribution.scores import curvature_of, scorers
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients

_FACTORS = tuple(10 ** (quarter / 4) for quarter in range(-4, 5))


@dataclass(frozen=True)
class Calibration:
    """The dampings that `calibrate` tried, and how well each predicts the short training runs.

    Attributes:
        damping: The best damping, for `scores(..., damping=...)`.
        automatic: The damping that "auto" stands for.
        tried: All dampings that were tried, in rising order.
        lds: For each, the Spearman correlation of predicted and true losses over the halves, a mean over queries.
    """

    damping: float
    automatic: float
    tried: tuple[float, ...]
    lds: tuple[float, ...]

    def __repr__(self) -> str:
        tried = ", ".join(f"{lds:.3f} at {damping:.3g}" for damping, lds in zip(self.tried, self.lds, strict=True))
        return f"Calibration: damping {self.damping:.3g} (automatic {self.automatic:.3g})\n    LDS: {tried}"

    def __str__(self) -> str:
        best, default = max(self.lds), self.lds[self.tried.index(self.automatic)]
        return (
            f"damping {self.damping:.3g}, {self.damping / self.automatic:.2g} times the automatic one: LDS {best:.3f} "
            f"against {default:.3f}, on the halves that were used to choose it"
        )


def calibrate(
    trained: Callable[[Tensor], Tensor],
    queries: SketchedGradients,
    train: RowSource,
    *,
    curvature: Kind | Curvature = "margin",
    subsets: int = 8,
    seed: int = 0,
    batch_rows: int = 4096,
) -> Calibration:
    """Find the damping whose influence scores predict short training runs best.

    Args:
        trained: A function from ids of examples to the losses of the queries, in their order, after training on these
            examples alone. Start from a copy of the final weights, keep the settings of the optimizer, and make
            max(20, a tenth of the training's) steps; fewer are not informative. Training from scratch is better still,
            and more expensive.
        queries: The rows of the queries, a hundred or more.
        train: The rows of the training examples.
        curvature: As in `scores`.
        subsets: The number of halves to train on, m.
        seed: Seed of the halves.
        batch_rows: Most rows in memory at a time.

    Raises:
        ValueError: as in `scores`; if the losses are not one finite number per query.

    Cost: `subsets` calls of `trained`, and nine dampings scored in one pass over the rows.

    Example::

        def trained(ids):
            module = copy.deepcopy(final)
            fit(module, train_set[ids], steps=max(20, steps // 10))
            return losses(module, test_set)

        damping = calibrate(trained, queries, store).damping
    """
    found = curvature_of(curvature, select(queries, train).source, queries.fingerprint)
    default = automatic(found)
    tried = tuple(default if factor == 1 else factor * default for factor in _FACTORS)
    subsets, batch_rows = whole_number(subsets, "subsets"), whole_number(batch_rows, "batch_rows")
    (scorer,) = scorers(queries, train, "influence", Influence(found, tried))
    ids, inverse = scorer.ids.unique(return_inverse=True)
    halves = _halves(len(ids), subsets, seed)
    losses = torch.stack([_checked(trained(ids[half.bool()]), len(queries)) for half in halves])
    predicted = torch.zeros(len(tried), len(queries), subsets, dtype=torch.float64)
    for place, scores in scorer.blocks(batch_rows):
        predicted += scores @ halves[:, inverse[place]].T.to(scores.dtype)
    lds = tuple(_lds(own.T, -losses) for own in predicted)
    return Calibration(tried[lds.index(max(lds))], default, tried, lds)


def _halves(count: int, subsets: int, seed: int) -> Float[Tensor, "subsets examples"]:
    """Draw random halves of `count` examples, as rows of ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.zeros(subsets, count)
    for half in halves:
        half[torch.randperm(count, generator=generator)[: count // 2]] = 1
    return halves


def _checked(losses: Tensor, queries: int) -> Float[Tensor, " queries"]:
    """Return the losses on the CPU; refuse them if they are not one finite number per query."""
    if losses.shape != (queries,) or not losses.isfinite().all():
        raise ValueError(
            f"trained(ids) must return the losses of the {queries} queries, finite numbers; got shape "
            f"{tuple(losses.shape)} with {int((~losses.isfinite()).sum())} that are not finite."
        )
    return losses.detach().cpu().float()


def _lds(predicted: Float[Tensor, "subsets queries"], true: Float[Tensor, "subsets queries"]) -> float:
    """Return the mean over queries of the Spearman correlation."""
    from torchmetrics.functional import spearman_corrcoef  # takes a second to import

    return float(spearman_corrcoef(predicted.float(), true).mean())
