"""What share of the best rows an index finds, measured against exact products."""

import time
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sketch.store.lance import LanceRows
from lightning_sketch.store.sketched_gradients import SketchedGradients

_DRAWN = 64  # queries, if none are given


def recall_of(
    rows: LanceRows,
    find: Callable[[np.ndarray, int], np.ndarray],
    queries: SketchedGradients | None,
    k: int,
    cosine: bool,
) -> tuple[float, float, float]:
    """Return the recall of an index, and milliseconds of a query, by it and by exact products of all queries at once.

    Args:
        rows: All rows of the dataset.
        find: (vector, k) -> Lance's ids of the rows that the index finds.
        queries: What it is tried with; 64 of the rows if None, which do not find themselves.
        k: How many rows are looked for.
        cosine: Whether rows are divided by their lengths.
    """
    own = queries is None
    vectors = (rows.where(_drawn(len(rows))).read() if queries is None else queries).sketches.float().cpu()
    start = time.perf_counter()
    found = [find(vector, k + own) for vector in vectors.numpy()]
    middle = time.perf_counter()
    places = _best(rows, vectors.double(), k + own, cosine)
    end, right = time.perf_counter(), rows.rows[1][places].numpy()
    if own:  # a row is the best of itself, by any index
        found = [np.setdiff1d(ids, its[:1]) for ids, its in zip(found, right, strict=True)]
        right = right[:, 1:]
    shares = [np.isin(its, ids).mean() for ids, its in zip(found, right, strict=True)]
    by_index, exact = (1e3 * seconds / len(vectors) for seconds in (middle - start, end - middle))
    return float(np.mean(shares)), by_index, exact


def _drawn(count: int) -> Tensor:
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_DRAWN]] = True
    return keep


def _best(rows: LanceRows, vectors: Float[Tensor, "queries dim"], k: int, cosine: bool) -> Tensor:
    """Return the positions of the best rows of each query, by products in float64.

    Lance's own distances are differences from 1 in float32, in which small products are all alike.
    """
    best, places, seen = vectors.new_empty(len(vectors), 0), torch.empty(len(vectors), 0, dtype=torch.long), 0
    for block in rows.blocks():
        sketches = block.sketches.double()
        scores = vectors @ (normalize(sketches) if cosine else sketches).T
        here = torch.arange(seen, seen := seen + len(block)).expand(len(vectors), -1)
        best, order = torch.cat([best, scores], 1).topk(min(k, best.shape[1] + len(block)))
        places = torch.cat([places, here], 1).gather(1, order)
    return places
