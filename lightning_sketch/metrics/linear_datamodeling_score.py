"""The linear datamodeling score: how well scores predict the loss of a query after training on a part of the data.

    LDS = mean over queries q of Spearman over subsets s of ( sum_{i in s} score_qi , -loss_sq )

loss_sq    the query's loss in a model that was trained on subset s alone, or the mean over several such models
ceiling    mean Spearman of the losses of two models of one subset with different seeds: how well one predicts another
interval   of 95 %, over queries and subsets: LDS ± 1.96 sqrt(variance over queries / their number + jackknife
           variance over subsets)

The state is sums over queries, so that batches and processes add up; for the jackknife one sum per subset left out.

Source: Park et al. (2023), "TRAK: Attributing model behavior at scale", arXiv:2303.14186, section 2.
"""

import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef


class LinearDatamodelingScore(Metric):
    """The linear datamodeling score (LDS) of attribution scores: 1 at best, 0 for chance.

    `update` takes the queries in batches. `compute` returns a dict of scalars: "lds"; "low" and "high", the ends of its
    95 % interval; "ceiling", NaN with one model per subset; "queries", how many are in the mean; and "constant", how
    many were excluded since their losses never change and have no ranks.

    Args:
        masks: The subsets as booleans, (subsets, examples), with the examples in the order of the scores' columns; use
            50 random halves or more.
        **kwargs: Further arguments of `torchmetrics.Metric`, such as `dist_sync_on_step`.

    Raises:
        ValueError: if there are fewer than three subsets, if shapes disagree, or if a number is not finite.

    >>> masks = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> metric = LinearDatamodelingScore(masks)
    >>> scores = torch.randn(4, 20)
    >>> metric.update(scores, losses=-masks.float() @ scores.T)  # a model that is linear in the subsets
    >>> round(float(metric.compute()["lds"]), 3)
    1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    masks: Tensor
    total: Tensor
    squares: Tensor
    queries: Tensor
    constant: Tensor
    agreement: Tensor
    repeated: Tensor
    without: Tensor

    def __init__(self, masks: Bool[Tensor, "subsets examples"], **kwargs: Any):
        super().__init__(**kwargs)
        if len(masks) < 3:
            raise ValueError(f"an LDS needs three subsets at least, got {len(masks)}; use 50 or more.")
        self.register_buffer("masks", masks, persistent=False)
        for name in ("total", "squares", "queries", "constant", "agreement", "repeated"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("without", torch.zeros(len(masks), dtype=torch.float64), "sum")

    def update(
        self,
        scores: Float[Tensor, "queries examples"],
        losses: Float[Tensor, "subsets queries"] | Float[Tensor, "repeats subsets queries"],
    ) -> None:
        """Add a batch of queries.

        Args:
            scores: The scores of all training examples for each query, positive if the example helps the query.
            losses: The losses of the queries in a model of each subset, or in several models of each subset. For an
                output that is larger if the query is helped, such as a margin, pass its negative.

        Raises:
            ValueError: if shapes disagree, or a number is not finite.
        """
        losses = losses[None] if losses.ndim == 2 else losses
        self._check(scores, losses)
        predicted = self.masks.to(scores.device).double() @ scores.double().T
        true = -losses.double().mean(0)
        changes = (true != true[:1]).any(0)
        self.constant += (~changes).sum()
        predicted, true, repeats = predicted[:, changes], true[:, changes], losses.double()[:, :, changes]
        rho, without = _spearman_and_without(predicted, true)
        self.total += rho.sum()
        self.squares += rho.square().sum()
        self.queries += len(rho)
        self.without += without
        pairs = list(itertools.combinations(repeats, 2))
        if pairs:
            self.agreement += sum(_spearman(a, b).sum() for a, b in pairs) / len(pairs)
            self.repeated += len(rho)

    def compute(self) -> dict[str, Tensor]:
        """Return the LDS, its interval and the ceiling, over all queries so far."""
        n, subsets = self.queries, len(self.masks)
        mean = self.total / n
        over_queries = (self.squares / n - mean**2).clamp(min=0) / (n - 1)
        left_out = self.without / n
        over_subsets = (left_out - left_out.mean()).square().sum() * (subsets - 1) / subsets
        half = 1.96 * (over_queries + over_subsets).sqrt()
        return {
            "lds": mean,
            "low": mean - half,
            "high": mean + half,
            "ceiling": self.agreement / self.repeated,
            "queries": n.clone(),
            "constant": self.constant.clone(),
        }

    def _check(self, scores: Tensor, losses: Tensor) -> None:
        """Refuse shapes that disagree with the masks, and numbers that are not finite."""
        subsets, examples = self.masks.shape
        if scores.shape[1] != examples or losses.shape[1:] != (subsets, len(scores)):
            raise ValueError(
                f"{subsets} subsets of {examples} examples take scores (queries, {examples}) and losses ({subsets}, "
                f"queries), got {tuple(scores.shape)} and {tuple(losses.shape)}."
            )
        for name, values in (("scores", scores), ("losses", losses)):
            if not values.isfinite().all():
                raise ValueError(f"{int((~values.isfinite()).sum())} of the {name} are not finite; drop their queries.")


def _spearman_and_without(
    a: Float[Tensor, "subsets queries"], b: Float[Tensor, "subsets queries"]
) -> tuple[Float[Tensor, " queries"], Float[Tensor, " subsets"]]:
    """Return Spearman for each query, and for each subset the sum over queries of Spearman without this subset."""
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return _spearman(a, b), torch.stack([_spearman(a[rest], b[rest]).sum() for rest in others])


def _spearman(a: Float[Tensor, "subsets queries"], b: Float[Tensor, "subsets queries"]) -> Float[Tensor, " queries"]:
    """Return Spearman for each query; zero if one side is constant, since it predicts nothing."""
    if a.shape[1] < 2:  # torchmetrics expects one output to have no axis of its own
        return torch.stack([spearman_corrcoef(a[:, 0], b[:, 0])]).double() if a.numel() else a.new_zeros(0)
    return spearman_corrcoef(a, b).double()
