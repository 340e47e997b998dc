"""An index over the sketches of a Lance dataset (IVF), which finds the largest products without all of them.

Sketches of gradients hardly form clusters, which such an index lives on: what share of the true neighbors it finds is
measured when it is built. Without it products are exact.
"""

import time
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch.store.export import SKETCH
from lightning_sketch.store.lance import FEW, LanceRows
from lightning_sketch.store.lance_format import COMPLETE, SCALE, import_lance
from lightning_sketch.store.lance_recall import recall_of
from lightning_sketch.store.sketched_gradients import SketchedGradients

Metric = Literal["dot", "cosine"]
Index = Literal["IVF_FLAT", "IVF_PQ", "IVF_RQ"]

_GOOD = 0.9  # the recall from which on an index is worth its errors


def build_index(
    rows: LanceRows,
    *,
    metric: Metric = "dot",
    index: Index = "IVF_RQ",
    partitions: int | None = None,
    queries: SketchedGradients | None = None,
    k: int = 10,
) -> tuple[LanceRows, float]:
    """Build the index of a dataset, in place of the one it had, and print what share of the k best rows it finds.

    Args:
        rows: All rows of a dataset.
        metric: "dot", for the methods dot and influence, or "cosine".
        index: The kind of Lance's index: whole sketches, product quantization, or one bit a number, which found 98 %
            where product quantization found 81 % (`benchmarks/index_recall.py`, 5,000 rows).
        partitions: The number of cells, of which a query visits a part; the root of the number of rows if None.
        queries: What the index is tried with, best queries that you will ask; 64 of the rows if None.
        k: How many of the best rows are looked for.

    Returns:
        The rows with the index, which `top_k(..., approximate=True)` uses, and the recall, from 0 to 1.

    Raises:
        ValueError: if these are some of the rows of a dataset, an export has not been completed, or the sketches are
            in float16, whose scales a product would miss.
    """
    if not isinstance(rows, LanceRows):
        raise ValueError(f"an index is of LanceRows, got a {type(rows).__name__}; store.export('lance', uri) first.")
    if metric not in get_args(Metric) or index not in get_args(Index):
        raise ValueError(f"metric={metric!r}, index={index!r}: use one of {get_args(Metric)} and of {get_args(Index)}.")
    if index == "IVF_RQ" and rows.sketch.dim % 8:
        raise ValueError(f"IVF_RQ takes a dim that is a multiple of 8, rows have {rows.sketch.dim}; use 'IVF_FLAT'.")
    if index == "IVF_PQ" and len(rows) < 256:
        raise ValueError(f"IVF_PQ takes 256 rows or more, got {len(rows)}; use 'IVF_FLAT'.")
    k = whole_number(k, "k")
    if rows.condition is not None or len(rows) < rows.dataset.count_rows():
        raise ValueError("an index is of all rows of a dataset; build it of LanceRows(uri), without where().")
    names = rows.dataset.schema.names
    if SCALE in names and metric == "dot":
        raise ValueError("products need the scale of rows in float16; export with dtype='float32', or metric='cosine'.")
    dataset = import_lance().dataset(str(rows.uri), storage_options=rows.storage_options)
    if dataset.version != rows.version:
        raise ValueError(f"{rows.uri} has changed since its last complete export; export again, then build the index.")
    default = max(1, round(len(rows) ** 0.5))
    cells, dim = default if partitions is None else whole_number(partitions, "partitions"), rows.sketch.dim
    options: dict[str, Any] = {} if index != "IVF_PQ" else {"num_sub_vectors": max(1, dim // 8)}
    start = time.perf_counter()
    dataset.create_index(
        SKETCH, index, name=_name(metric), metric=metric, num_partitions=cells, replace=True, **options
    )
    for other in dataset.describe_indices():  # Lance takes the first index of a column, of whatever metric
        if other.name != _name(metric):
            dataset.drop_index(other.name)
    built = time.perf_counter() - start
    dataset.tags.update(COMPLETE, dataset.version)
    indexed = LanceRows(rows.uri, storage_options=rows.storage_options)
    recall, by_index, exact = recall_of(
        indexed, lambda vector, k: _ids(indexed, vector, k, metric), queries, min(k, len(rows)), metric == "cosine"
    )
    advice = "" if recall >= _GOOD else "; index='IVF_FLAT', or exact products without an index, find more"
    print(
        f"{index} of {len(rows):,} rows, {cells} cells, built in {built:.0f} s: finds {recall:.0%} of the {k} best, in "
        f"{by_index:.1f} ms a query; exact products of all queries at once take {exact:.1f} ms each{advice}"
    )
    return indexed, recall


def nearest(
    rows: LanceRows, metric: Metric, vectors: Float[Tensor, "queries dim"], k: int
) -> Int[Tensor, " candidates"]:
    """Return the positions of rows that an index finds for some vector, in rising order.

    Args:
        rows: The rows, of which only those are found that Lance selects.
        metric: The metric of the index.
        vectors: The vectors, on the scale of 1.
        k: How many rows to look for, for each vector.

    Raises:
        ValueError: if there is no such index.
    """
    if _name(metric) not in {found.name for found in rows.dataset.describe_indices()}:
        raise ValueError(f"{rows.uri} has no index for {metric!r}; build one: build_index(rows, metric={metric!r}).")
    ids = rows.rows[1].numpy()
    there = rows.dataset.count_rows()
    k = min(there, k if len(ids) <= FEW else k * there // len(ids))  # more, where some that are found are not chosen
    found = np.concatenate([_ids(rows, vector, k, metric) for vector in vectors.float().numpy()])
    keep = np.isin(ids, found)
    if not keep.any():
        raise ValueError("the index finds none of the rows that were selected; leave approximate=True out.")
    return torch.from_numpy(np.flatnonzero(keep))


def _ids(rows: LanceRows, vector: np.ndarray, k: int, metric: Metric) -> np.ndarray:
    """Return Lance's ids of the k rows with the largest products with a vector."""
    asked: dict[str, Any] = {"column": SKETCH, "q": vector, "k": k, "metric": metric}
    table = rows.dataset.to_table(
        columns=["_distance"], filter=rows.lance_filter, nearest=asked, prefilter=True, with_row_id=True
    )
    return table["_rowid"].to_numpy().astype(np.int64)


def _name(metric: Metric) -> str:
    return f"{SKETCH}_{metric}"
