"""The rows that helped or hurt most, found in one pass.

    scores -> for each query the k best so far, merged with those of the next block

Without groups the memory is that of k results per query and a block, however many rows there are; to sum over rows of
one example, there is a number for each query and example.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.attribution._row_selection import check_group
from lightning_sketch.attribution.influence import Damping
from lightning_sketch.attribution.scores import CurvatureLike, Queries, Scorer, scorers
from lightning_sketch.store.sketched_gradients import RowSource

_SHOWN = 5
"""Queries, and examples of each, in a repr."""


class TopK(NamedTuple):
    """For each query, best first: scores, and what the rows are known by."""

    scores: Float[Tensor, "queries k"]
    example_ids: Int[Tensor, "queries k"]

    def __repr__(self) -> str:
        queries, k = self.scores.shape
        lines = [f"TopK of {queries} queries, k={k}: example (score)"]
        for i in range(min(queries, _SHOWN)):
            pairs = zip(self.example_ids[i, :_SHOWN].tolist(), self.scores[i, :_SHOWN].tolist(), strict=True)
            best = ", ".join(f"{example} ({score:.3g})" for example, score in pairs)
            lines.append(f"    query {i}: {best}{', ...' if k > _SHOWN else ''}")
        return "\n".join(lines + (["    ..."] if queries > _SHOWN else []))


def top_k(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    k: int = 10,
    largest: bool = True,
    method: str = "dot",
    curvature: CurvatureLike | Sequence[CurvatureLike] = "ggn",
    damping: Damping = "auto",
    group: str | None = "example_id",
    batch_rows: int = 4096,
) -> TopK:
    """The proponents of each query, or with `largest=False` its opponents; all else as in `scores`.

    Args:
        queries: what is asked about.
        train: the rows, or a list of them.
        k: how many; fewer come back if there are fewer.
        largest: True for what helped most, False for what hurt most.
        method: "dot", "cosine", "tracin" or "influence".
        curvature: for influence.
        damping: for influence, "auto" or one number.
        group: "example_id" sums over rows of one example (several epochs or checkpoints); None ranks rows. Rows
            without ids are known by their place in `train`, those of training steps by their step.
        batch_rows: how many rows to hold at a time.

    Returns:
        `TopK(scores, example_ids)`, both (queries, k).

    Raises:
        ValueError: as in `scores`; if k is not positive; for several dampings.

    >>> from lightning_sketch.store.sketched_gradients import SketchedGradients
    >>> from lightning_sketch.operators import BlockSRHT
    >>> sketch = BlockSRHT(9, 2)
    >>> rows = SketchedGradients(torch.tensor([[1.0, 0.0], [3.0, 0.0], [-2.0, 1.0]]), sketch)
    >>> top_k(SketchedGradients(torch.tensor([[3.0, 0.0]]), sketch), rows, k=2)
    TopK of 1 queries, k=2: example (score)
        query 0: 1 (9), 0 (3)
    """
    check_group(group)
    if k < 1:
        raise ValueError(f"k={k} rows were asked for; ask for at least one.")
    members = scorers(queries, train, method, curvature, damping)
    if any(asked.ndim > 2 for member in members for asked in member.queries.values()):
        raise ValueError("top_k takes one damping; for several use scores(...).")
    ids = [member.ids for member in members]
    if group is not None and not _each_once(ids):
        best = _Best(k, largest)
        best.add(*_sums(members, torch.cat(ids), batch_rows))
        return best.found()
    if any(not torch.equal(own, ids[0]) for own in ids[1:]):
        raise ValueError("members of the list have other rows, or another order of them; use group='example_id'.")
    best = _Best(k, largest)
    for place, found in _means(members, batch_rows):
        best.add(found, ids[0][place])
    return best.found()


class _Best:
    """The k best of each query so far."""

    def __init__(self, k: int, largest: bool):
        self.k, self.largest = k, largest
        self.held: tuple[Tensor, Tensor] | None = None

    def add(self, scores: Float[Tensor, "queries columns"], ids: Int[Tensor, " columns"]) -> None:
        best, place = scores.topk(min(self.k, scores.shape[1]), largest=self.largest)
        chosen = ids[place]
        if self.held is not None:
            best, chosen = torch.cat([self.held[0], best], 1), torch.cat([self.held[1], chosen], 1)
            best, place = best.topk(min(self.k, best.shape[1]), largest=self.largest)
            chosen = chosen.gather(1, place)
        self.held = best, chosen

    def found(self) -> TopK:
        return TopK(*self.held)


def _means(members: list[Scorer], batch_rows: int) -> Iterator[tuple[slice, Float[Tensor, "queries rows"]]]:
    """Places among the rows, and their scores; each member's blocks may end elsewhere, as its files do."""
    streams = [member.blocks(batch_rows) for member in members]
    waiting = [next(stream)[1] for stream in streams]
    start, count = 0, len(members[0].rows)
    while True:
        size = min(found.shape[1] for found in waiting)
        yield slice(start, start + size), sum(found[:, :size] for found in waiting) / len(members)
        start += size
        if start == count:
            return
        waiting = [found[:, size:] for found in waiting]
        pairs = zip(waiting, streams, strict=True)
        waiting = [found if found.shape[1] else next(stream)[1] for found, stream in pairs]


def _each_once(ids: list[Int[Tensor, " _"]]) -> bool:
    """Whether no id comes twice, and all members have the same ones in the same order: then there is nothing to sum."""
    return all(torch.equal(own, ids[0]) for own in ids[1:]) and len(ids[0].unique()) == len(ids[0])


def _sums(
    members: list[Scorer], ids: Int[Tensor, " rows"], batch_rows: int
) -> tuple[Float[Tensor, "queries ids"], Int[Tensor, " ids"]]:
    unique, inverse = ids.unique(return_inverse=True)
    queries = len(next(iter(members[0].queries.values())))
    total, start = torch.zeros(queries, len(unique)), 0
    for member in members:
        for place, found in member.blocks(batch_rows):
            total.index_add_(1, inverse[start + place.start : start + place.stop], found)
        start += len(member.rows)
    return total / len(members), unique
