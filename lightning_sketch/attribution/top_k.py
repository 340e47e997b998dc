"""Finds the training examples that help or hurt each query most, in one pass over the rows.

    scores of a block -> merged into the k best of each query so far

Memory: k results per query and one block of rows; if rows of one example are summed, one number per query and example.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.attribution._row_selection import Group, as_given, check_group
from lightning_sketch.attribution.influence import Damping
from lightning_sketch.attribution.scores import CurvatureLike, Method, Queries, Scorer, scorers
from lightning_sketch.store.sketched_gradients import RowSource

_SHOWN = 5  # queries in a repr, and examples of each


class TopK(NamedTuple):
    """The k best examples of each query, best first.

    Attributes:
        scores: The scores, float32, (queries, k).
        example_ids: The ids of the examples, int64, (queries, k), or lists of names; of rows without ids the step of a
            training step, else the position in `train`.
    """

    scores: Float[Tensor, "queries k"]
    example_ids: Any

    def __repr__(self) -> str:
        queries, k = self.scores.shape
        lines = [f"TopK of {queries} queries, k={k}: example (score)"]
        for i in range(min(queries, _SHOWN)):
            ids = list(self.example_ids[i][:_SHOWN])
            pairs = zip(map(_plain, ids), self.scores[i, :_SHOWN].tolist(), strict=True)
            best = ", ".join(f"{example} ({score:.3g})" for example, score in pairs)
            lines.append(f"    query {i}: {best}{', ...' if k > _SHOWN else ''}")
        return "\n".join(lines + (["    ..."] if queries > _SHOWN else []))


def top_k(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    k: int = 10,
    *,
    largest: bool = True,
    method: Method = "dot",
    curvature: CurvatureLike | Sequence[CurvatureLike] = "ggn",
    damping: Damping = "auto",
    group: Group | None = "example_id",
    batch_rows: int = 4096,
) -> TopK:
    """Find the training examples that help each query most, or with `largest=False` hurt it most.

    Args:
        queries: The rows of the queries, as in `scores`.
        train: The rows of the training examples, or a list of such rows, as in `scores`.
        k: How many examples to return; fewer if there are fewer.
        largest: True for the examples that help most, False for those that hurt most.
        method: "dot", "cosine", "tracin" or "influence".
        curvature: The curvature for influence, as in `scores`.
        damping: The damping for influence, "auto" or one number.
        group: "example_id" sums over rows of one example (several epochs or checkpoints); None ranks single rows.
        batch_rows: Most rows in memory at a time.

    Returns:
        `TopK(scores, example_ids)`, both (queries, k). The id of a row without id is the step of a training step, else
        the row's position in `train`.

    Raises:
        ValueError: as in `scores`; if k is not positive; for several dampings.

    Cost: that of `scores`, with k results per query in memory.

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
        raise ValueError(f"need k >= 1, got {k}; ask for at least one example.")
    members = scorers(queries, train, method=method, curvature=curvature, damping=damping)
    if any(vectors.ndim > 2 for member in members for vectors in member.queries.values()):
        raise ValueError("top_k takes one damping, got several; use scores(...) for these.")
    ids = [member.ids for member in members]
    if group is not None and not _each_once(ids):
        best = _Best(k, largest)
        best.add(*_sums(members, torch.cat(ids), batch_rows))
        return best.found(members)
    if any(not torch.equal(own, ids[0]) for own in ids[1:]):
        raise ValueError("members of the list have other rows, or in another order; use group='example_id'.")
    best = _Best(k, largest)
    for place, found in _means(members, batch_rows):
        best.add(found, ids[0][place])
    return best.found(members)


class _Best:
    """The k best scores of each query so far, with their ids."""

    def __init__(self, k: int, largest: bool):
        self.k, self.largest = k, largest
        self.best: tuple[Tensor, Tensor] | None = None

    def add(self, scores: Float[Tensor, "queries columns"], ids: Int[Tensor, " columns"]) -> None:
        """Merge the scores of more columns."""
        best, place = scores.topk(min(self.k, scores.shape[1]), largest=self.largest)
        best_ids = ids[place]
        if self.best is not None:
            best, best_ids = torch.cat([self.best[0], best], 1), torch.cat([self.best[1], best_ids], 1)
            best, place = best.topk(min(self.k, best.shape[1]), largest=self.largest)
            best_ids = best_ids.gather(1, place)
        self.best = best, best_ids

    def found(self, members: list[Scorer]) -> TopK:
        """Return the best of all columns that were added, which are one at least."""
        scores, ids = cast(tuple[Tensor, Tensor], self.best)
        return TopK(scores, as_given(ids, (member.train for member in members)))


def _plain(example: Any) -> Any:
    """Return the id of an example as a number or a name."""
    return example.item() if isinstance(example, Tensor) else example


def _means(members: list[Scorer], batch_rows: int) -> Iterator[tuple[slice, Float[Tensor, "queries rows"]]]:
    """Yield the mean scores of all members with their positions; the blocks of the members may differ in size."""
    streams = [member.blocks(batch_rows) for member in members]
    waiting = [next(stream)[1] for stream in streams]
    start, count = 0, len(members[0].rows)
    while True:
        size = min(found.shape[1] for found in waiting)
        total = sum((found[:, :size] for found in waiting), torch.zeros(()))
        yield slice(start, start + size), total / len(members)
        start += size
        if start == count:
            return
        waiting = [found[:, size:] for found in waiting]
        pairs = zip(waiting, streams, strict=True)
        waiting = [found if found.shape[1] else next(stream)[1] for found, stream in pairs]


def _each_once(ids: list[Int[Tensor, " _"]]) -> bool:
    """Return whether ids are unique and those of all members equal, in the same order: then there is nothing to sum."""
    return all(torch.equal(own, ids[0]) for own in ids[1:]) and len(ids[0].unique()) == len(ids[0])


def _sums(
    members: list[Scorer], ids: Int[Tensor, " rows"], batch_rows: int
) -> tuple[Float[Tensor, "queries ids"], Int[Tensor, " ids"]]:
    """Return the scores summed by id, as a mean over members, and the ids."""
    unique, inverse = ids.unique(return_inverse=True)
    queries = len(next(iter(members[0].queries.values())))
    total, start = torch.zeros(queries, len(unique)), 0
    for member in members:
        for place, found in member.blocks(batch_rows):
            total.index_add_(1, inverse[start + place.start : start + place.stop], found)
        start += len(member.rows)
    return total / len(members), unique
