"""Damping from a few short trainings, where an automatic one would be a guess.

    for random halves s_1 ... s_m of the examples: losses of the queries after training on s_j alone
    lambda = the damping whose summed scores of s_j foretell these losses best (mean Spearman over queries)

among automatic damping times 10^-1 ... 10^1/2, by quarters of a decade. Training goes on from the final weights, for a
tenth of the steps and 20 at least: it shows how far examples move a trained model, at a small part of what training
anew costs. The narrow range keeps a few halves from picking a wild value.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.attribution._row_selection import select
from lightning_sketch.attribution.curvature import Curvature
from lightning_sketch.attribution.influence import Influence, automatic
from lightning_sketch.attribution.scores import curvature_of, scorers
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients

FACTORS = tuple(10 ** (quarter / 4) for quarter in range(-4, 3))


@dataclass(frozen=True)
class Calibration:
    """What was tried and how it did.

    damping    the best, for `scores(..., damping=...)`
    automatic  what "auto" would have been
    tried      all of them
    lds        mean Spearman over queries of each
    """

    damping: float
    automatic: float
    tried: tuple[float, ...]
    lds: tuple[float, ...]

    def __str__(self) -> str:
        best, default = max(self.lds), self.lds[self.tried.index(self.automatic)]
        return (
            f"damping {self.damping:.3g}, {self.damping / self.automatic:.2g} times the automatic one: LDS {best:.3f} "
            f"against {default:.3f} on the halves that it was chosen by"
        )


def calibrate(
    trained: Callable[[Tensor], Tensor],
    queries: SketchedGradients,
    train: RowSource,
    curvature: str | Curvature = "margin",
    subsets: int = 8,
    seed: int = 0,
    batch_rows: int = 4096,
) -> Calibration:
    """The damping that foretells short trainings best.

    Args:
        trained: ids of examples -> losses of the queries, in their order, after training on these examples alone.
            Start from a copy of the final weights with the optimizer's settings as they were, and make
            max(20, a tenth of the training's) steps; fewer say nothing. Training anew is better still, and dearer.
        queries: what is asked about, a hundred or more.
        train: the rows.
        curvature: as in `scores`.
        subsets: m, how many halves are trained on.
        seed: of the halves.
        batch_rows: how many rows to hold at a time.

    Raises:
        ValueError: as in `scores`; if the losses are not one finite number per query.

    Example::

        def trained(ids):
            module = copy.deepcopy(final)
            fit(module, train_set[ids], steps=max(20, steps // 10))
            return losses(module, test_set)

        damping = calibrate(trained, queries, store).damping
    """
    found = curvature_of(curvature, select(queries, train).source, queries.fingerprint)
    default = automatic(found)
    tried = tuple(default if factor == 1 else factor * default for factor in FACTORS)
    (scorer,) = scorers(queries, train, "influence", Influence(found, tried), "auto")
    ids, inverse = scorer.ids.unique(return_inverse=True)
    halves = _halves(len(ids), subsets, seed)
    losses = torch.stack([_checked(trained(ids[half.bool()]), len(queries)) for half in halves])
    foretold = torch.zeros(len(tried), len(queries), subsets)
    for place, scores in scorer.blocks(batch_rows):
        foretold += scores @ halves[:, inverse[place]].T
    lds = tuple(_lds(own.T, -losses) for own in foretold)
    return Calibration(tried[lds.index(max(lds))], default, tried, lds)


def _halves(count: int, subsets: int, seed: int) -> Float[Tensor, "subsets examples"]:
    generator = torch.Generator().manual_seed(seed)
    halves = torch.zeros(subsets, count)
    for half in halves:
        half[torch.randperm(count, generator=generator)[: count // 2]] = 1
    return halves


def _checked(losses: Tensor, queries: int) -> Float[Tensor, " queries"]:
    if losses.shape != (queries,) or not losses.isfinite().all():
        raise ValueError(
            f"trained(ids) gives the losses of the {queries} queries, finite numbers, got shape {tuple(losses.shape)} "
            f"with {int((~losses.isfinite()).sum())} that are not finite."
        )
    return losses.detach().cpu().float()


def _lds(foretold: Float[Tensor, "subsets queries"], true: Float[Tensor, "subsets queries"]) -> float:
    from torchmetrics.functional import spearman_corrcoef  # a second to import

    return float(spearman_corrcoef(foretold, true).mean())
