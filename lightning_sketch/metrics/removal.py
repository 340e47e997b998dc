"""Retrains without some examples, to see whether scores name those that taught a model its answers.

    rise_q(R) = loss_q after training without the examples R  -  loss_q after training on all

removal_curve    R = the k examples with the highest scores for q, for each k; beside it random R of the same sizes
leave_one_out    R = {i}, for chosen examples i: what influence scores over n approximate to first order

Source: Ilyas et al. (2022), "Datamodels: Predicting predictions from training data", arXiv:2202.00622, section 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

Array = Tensor | np.ndarray
Train = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """What retraining without examples costs each query.

    Attributes:
        ks: How many examples were removed.
        losses: The loss of each query after training on all examples, (queries,).
        rises: By the name of the scores, and "random", how much the loss of each query rose, (queries, ks).
    """

    ks: tuple[int, ...]
    losses: Float[Tensor, " queries"]
    rises: dict[str, Float[Tensor, "queries ks"]]

    def summary(self) -> dict[str, tuple[list[float], list[float]]]:
        """Return by name the mean rise over queries for each k, and its standard error, NaN for a single query."""
        return {n: (r.mean(0).tolist(), (r.std(0) / len(r) ** 0.5).tolist()) for n, r in self.rises.items()}

    def __repr__(self) -> str:
        lines = [f"RemovalCurve of {len(self.losses)} queries: mean rise of the loss ± standard error"]
        for name, (means, errors) in self.summary().items():
            found = [f"{m:.3g} ± {e:.2g} without {k}" for m, e, k in zip(means, errors, self.ks, strict=True)]
            lines.append(f"    {name}: {', '.join(found)}")
        return "\n".join(lines)


def removal_curve(
    train: Train,
    scores: Real[Array, "queries examples"] | Mapping[str, Real[Array, "queries examples"]],
    ks: Sequence[int],
    *,
    example_ids: Int[Tensor, " examples"] | None = None,
    random: int = 5,
    seed: int = 0,
) -> RemovalCurve:
    """Measure how much the loss of each query rises when the examples with its highest scores are removed.

    Args:
        train: A function from ids of examples to the losses of the queries, in their order, after training on these
            examples alone. Seed it; a mean over seeds tells small rises from noise.
        scores: The scores of all examples for each query, positive if the example helps; or several such by name.
        ks: How many examples to remove, each less than all.
        example_ids: The id of each column of the scores; their positions by default.
        random: How many random sets of each size to remove for comparison; a query's rise is the mean over them.
        seed: Seed of the random sets.

    Raises:
        ValueError: if a k is not from 1 to all but one, shapes disagree, or a score or loss is not finite.

    Cost: one training; one for each k and random set; and one for each k, query and scores, those of equal sets once.

    >>> scores = torch.tensor([[3.0, 0.0, 1.0, -1.0], [0.0, 2.0, 1.0, 0.0]])
    >>> removal_curve(lambda ids: -scores[:, ids].sum(1), scores, ks=[1, 2], random=0)  # a model that is linear
    RemovalCurve of 2 queries: mean rise of the loss ± standard error
        scores: 2.5 ± 0.5 without 1, 3.5 ± 0.5 without 2
    """
    named = scores if isinstance(scores, Mapping) else {"scores": scores}
    tables = {name: torch.as_tensor(table).detach().cpu() for name, table in named.items()}
    queries, count = next(iter(tables.values())).shape
    ids = torch.arange(count) if example_ids is None else example_ids.cpu()
    if any(table.shape != (queries, len(ids)) or not table.isfinite().all() for table in tables.values()):
        shapes = ", ".join(f"{name} {tuple(table.shape)}" for name, table in tables.items())
        raise ValueError(f"scores must be finite, one column for each of {len(ids)} examples; got {shapes}.")
    if not ks or not all(0 < k < len(ids) for k in ks):
        raise ValueError(f"each k must be from 1 to {len(ids) - 1}, one less than all examples; got {list(ks)}.")
    losses, without = _retrained(train, ids, queries)
    rises, generator = {}, torch.Generator().manual_seed(seed)
    for name, table in tables.items():
        orders = table.argsort(dim=1, descending=True, stable=True)
        rises[name] = torch.tensor([[without(order[:k])[q] for k in ks] for q, order in enumerate(orders)])
    if random:
        drawn = [torch.randperm(len(ids), generator=generator) for _ in range(random)]
        rises["random"] = torch.stack([torch.stack([without(order[:k]) for k in ks], 1) for order in drawn]).mean(0)
    return RemovalCurve(tuple(ks), losses, rises)


def leave_one_out(
    train: Train, example_ids: Int[Tensor, " examples"], removed: Int[Tensor, " removed"]
) -> Float[Tensor, "queries removed"]:
    """Measure how much the loss of each query rises when one example is removed; positive if the example helps.

    Args:
        train: As in `removal_curve`; one example moves little, so that other seeds would hide it.
        example_ids: The ids of all examples.
        removed: The ids of the examples to leave out, one at a time.

    Raises:
        ValueError: if an id is unknown, or a loss is not finite.

    Cost: one training, and one for each removed example.

    >>> worth = torch.tensor([[3.0, 0.0, 1.0, -1.0]])
    >>> leave_one_out(lambda ids: -worth[:, ids].sum(1), torch.arange(4), torch.tensor([3, 0]))
    tensor([[-1.,  3.]])
    """
    unknown = removed[~torch.isin(removed, example_ids)].tolist()
    if unknown:
        raise ValueError(f"{unknown} are not among the {len(example_ids)} ids; leave out examples that are.")
    ids = example_ids.cpu()
    _, without = _retrained(train, ids)
    return torch.stack([without((ids == i).nonzero()[:, 0]) for i in removed.cpu()], 1)


def _retrained(
    train: Train, ids: Int[Tensor, " examples"], queries: int | None = None
) -> tuple[Float[Tensor, " queries"], Callable[[Tensor], Tensor]]:
    """Return the losses after training on all, and how they rise without the examples at given positions, each once."""

    def losses(ids: Tensor) -> Tensor:
        found = torch.as_tensor(train(ids)).detach().cpu().float()
        if found.ndim != 1 or len(found) != (queries or len(found)) or not found.isfinite().all():
            raise ValueError(f"train(ids) must return the losses of the queries, finite numbers; got {found}.")
        return found

    @cache
    def rises(removed: tuple[int, ...]) -> Tensor:
        kept = torch.ones(len(ids), dtype=torch.bool)
        kept[list(removed)] = False
        return losses(ids[kept]) - of_all

    of_all = losses(ids)
    return of_all, lambda removed: rises(tuple(sorted(removed.tolist())))
