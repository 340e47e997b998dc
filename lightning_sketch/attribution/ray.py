"""Scores by the workers of a Ray cluster, each of which reads a part of the rows: a file of a store, or of a dataset.

Queries are made ready once, with a curvature folded in, and sent to all; what comes back are scores, or the k best of
each part. The columns of all rows are held where `ray_top_k` is called, no sketches. Workers must see the files.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.attribution._ray_parts import by_workers
from lightning_sketch.attribution._scorer import Scorer
from lightning_sketch.attribution._selected import Queries
from lightning_sketch.attribution.curvature import Damping
from lightning_sketch.attribution.gradient_store import GradientStore
from lightning_sketch.attribution.scores import CurvatureLike, Group, Method, TopK, ranked, scorers, scores_of, top_k_of
from lightning_sketch.store.lance import LanceRows
from lightning_sketch.store.row_store import RowStore

Rows = str | Path | RowStore | LanceRows


def ray_scores(
    queries: Queries,
    train: Rows,
    *,
    method: Method = "dot",
    curvature: CurvatureLike = "ggn",
    damping: Damping = "auto",
    normalize: bool = False,
    weighted: bool = False,
    group: Group | None = None,
    batch_rows: int = 4096,
) -> Float[Tensor, "*dampings queries columns"]:
    """Compute the influence of each row on each query as `scores` does, by the workers of a Ray cluster.

    Args:
        queries: The rows of the queries.
        train: The rows: a store, `LanceRows`, or where one of them is.
        method: As in `scores`, like all that follow.
        curvature: One that is made of the rows is made before workers begin.
        damping: The damping for influence.
        normalize: Whether to divide by lengths.
        weighted: Whether to multiply by the weights of the rows.
        group: "example_id" sums over rows of equal id.
        batch_rows: Most rows in memory of a worker at a time.

    Raises:
        ImportError: if Ray is missing.
        ValueError: as `scores`.
    """
    member = _scorer(queries, train, method, curvature, damping, normalize, weighted)
    return scores_of([member], group, batch_rows)


def ray_top_k(
    queries: Queries,
    train: Rows,
    k: int = 10,
    *,
    largest: bool = True,
    method: Method = "dot",
    curvature: CurvatureLike = "ggn",
    damping: Damping = "auto",
    normalize: bool = False,
    weighted: bool = False,
    group: Group | None = "example_id",
    batch_rows: int = 4096,
) -> TopK:
    """Find the training examples that help each query most as `top_k` does, by the workers of a Ray cluster.

    Each worker sends the k best of its part, unless examples have several rows, whose scores are summed here.

    Args:
        queries: The rows of the queries.
        train: The rows: a store, `LanceRows`, or where one of them is.
        k: How many examples to return.
        largest: True for the examples that help most, False for those that hurt most.
        method: As in `top_k`, like all that follow.
        curvature: One that is made of the rows is made before workers begin.
        damping: The damping for influence, "auto" or one number.
        normalize: Whether to rank by relative influence.
        weighted: Whether to multiply by the weights of the rows.
        group: "example_id" sums over rows of one example; None ranks single rows.
        batch_rows: Most rows in memory of a worker at a time.

    Raises:
        ImportError: if Ray is missing.
        ValueError: as `top_k`.
    """
    member = _scorer(queries, train, method, curvature, damping, normalize, weighted)
    return top_k_of([member], k, largest, group, batch_rows, _ranked_by_workers)


class _RayScorer(Scorer):
    """A scorer whose rows are read and multiplied by workers."""

    def parts(self, batch_rows: int = 4096) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for found in by_workers(self, _parts, batch_rows):
            yield slice(start, start := start + found.shape[-1]), found


def _scorer(queries: Queries, train: Rows, *options: Any) -> _RayScorer:
    if isinstance(train, str | Path):
        train = GradientStore.open(train) if (Path(train) / "spec.json").exists() else LanceRows(train)
    if not isinstance(train, RowStore | LanceRows):
        raise ValueError(f"workers read files: pass a store, LanceRows or its path, got a {type(train).__name__}.")
    (found,) = scorers(queries, train, *options)
    return _RayScorer(**vars(found))


def _parts(members: list[Scorer], ids: Tensor, batch_rows: int) -> Tensor:
    return torch.cat([found for _, found in members[0].parts(batch_rows)], -1)


def _ranked_by_workers(members: list[Scorer], ids: Tensor, *arguments: Any) -> Any:
    found = by_workers(members[0], ranked, *arguments)
    best, agreement = next(found)
    for own, halves in found:
        best.merge(own)
        agreement.merge(halves)
    return best, agreement
