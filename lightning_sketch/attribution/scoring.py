"""Which training rows helped or hurt which queries.

    dot          g_q . g_i
    cosine       g_q . g_i / (|g_q| |g_i|)
    tracin       sum over checkpoints of lr g_q . g_i, each at that checkpoint
    influence    g_qᵀ (A + lambda I)⁻¹ g_i

g_i is the sketched gradient of the example's own loss (not of its share in the mean of a batch), A the curvature
averaged over examples.

Sign: positive helps the query; training on the example lowers the query's loss, and removing it raises the loss.
Scale, to first order:

    dot          lr times the score is how much one step of SGD on the example alone lowers the query's loss
    tracin       the score over the batch size is how much the example's share of the steps lowered the query's loss
    influence    the score over n is how much the query's loss rises when the example is removed from n and the model,
                 whose loss is the mean over examples plus lambda |theta|² / 2, is trained to the end again

Rows are streamed once: everything that a method multiplies by is applied to the queries. Memory beside the result:
a block of rows.

Source: Pruthi et al. (2020), "Estimating training data influence by tracing gradient descent", arXiv:2002.08484, for
tracin; Koh and Liang (2017), arXiv:1703.04730, for influence; Schioppa (2024), arXiv:2402.03994, for both from
sketches.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.attribution.example_ids import check_group, sum_by_id
from lightning_sketch.attribution.influence import Damping
from lightning_sketch.attribution.scorer import CurvatureLike, Queries, Scorer, scorers
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients


def scores(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    method: str = "dot",
    curvature: CurvatureLike | Sequence[CurvatureLike] = "ggn",
    damping: Damping = "auto",
    group: str | None = None,
    batch_rows: int = 4096,
) -> Float[Tensor, "*dampings queries columns"]:
    """One number for each query and each training row; see the module for formulas, signs and scales.

    Args:
        queries: rows of the examples that are asked about; for tracin by the step of their checkpoint,
            {step: queries}, the same queries in the same order at each. A list for a list of `train`.
        train: the rows, in memory or on disk; those that take part: see `selected`. A list of them
            (checkpoints, or models trained with other seeds) is averaged over.
        method: "dot", "cosine", "tracin" or "influence".
        curvature: for influence: "margin", "fisher" or "trak", made from the rows in another pass; what `fit_ggn` or
            `row_curvature` returned; or an `Influence`, which brings its damping. "ggn" is read from where a store
            keeps it. A list for a list of `train`.
        damping: for influence: "auto", a number, or several, which give the result a first axis.
        group: "example_id" sums over rows of equal id; columns are then the ids in rising order.
        batch_rows: how many rows to hold at a time.

    Returns:
        float32, a column for each row that takes part, in their order, or for each id.

    Raises:
        ValueError: if rows and queries were taken at different weights or by different sketches, if the method lacks
            what it needs, or members of a list have other rows.

    O(queries rows dim); influence needs O(dim³) before, for a curvature of full rank.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.tensor([[1.0, 0.0], [-2.0, 1.0]]), BlockSRHT(9, 2))
    >>> query = SketchedGradients(torch.tensor([[3.0, 0.0]]), BlockSRHT(9, 2))
    >>> scores(query, rows)
    tensor([[ 3., -6.]])
    """
    check_group(group)
    members = scorers(queries, train, method, curvature, damping)
    if group is not None:
        ids = torch.cat([member.ids for member in members])
        return sum_by_id(torch.cat([_all(member, batch_rows) for member in members], -1), ids)[0] / len(members)
    if any(not torch.equal(member.ids, members[0].ids) for member in members[1:]):
        raise ValueError("members of the list have other rows, or another order of them; use group='example_id'.")
    total = _all(members[0], batch_rows)
    for member in members[1:]:
        total += _all(member, batch_rows)
    return total.div_(len(members))


def together(queries: SketchedGradients) -> SketchedGradients:
    """One query that stands for all of a set: its scores are the sums of theirs, its loss is the sum of theirs.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> together(SketchedGradients(torch.eye(2), BlockSRHT(9, 2))).sketches
    tensor([[1., 1.]])
    """
    columns = {
        "fingerprint": torch.tensor([queries.fingerprint]),
        "loss": queries.loss.sum(0, keepdim=True),
        "finite": queries.finite.all(0, keepdim=True),
    }
    return SketchedGradients(queries.sketches.float().sum(0, keepdim=True), queries.sketch, columns)


def _all(member: Scorer, batch_rows: int) -> Float[Tensor, "*dampings queries rows"]:
    result = torch.empty(*next(iter(member.queries.values())).shape[:-1], len(member.rows))
    for place, found in member.blocks(batch_rows):
        result[..., place] = found
    return result
