"""Influence scores: how much each training row helps or hurts each query.

    dot          g_q . g_i
    cosine       g_q . g_i / (|g_q| |g_i|)
    tracin       sum over checkpoints of lr g_q . g_i, each at that checkpoint
    influence    g_qᵀ (A + lambda I)⁻¹ g_i

g_i is the sketched gradient of the example's own loss (not of its share in the mean of a batch), A the curvature
averaged over examples.

Sign: a positive score helps the query: training on the example lowers the query's loss, and removing the example raises
the loss. Scale, to first order:

    dot          lr times the score is how much one step of SGD on the example alone lowers the query's loss
    tracin       the score over the batch size is how much the example's share of the steps lowered the query's loss
    influence    the score over n is how much the query's loss rises when the example is removed from n and the model,
                 whose loss is the mean over examples plus lambda |theta|² / 2, is trained to convergence again

The rows are read once, block by block, since everything that a method multiplies by is applied to the queries. Memory
beside the result: one block of rows.

Source: Pruthi et al. (2020), "Estimating training data influence by tracing gradient descent", arXiv:2002.08484, for
tracin; Koh and Liang (2017), arXiv:1703.04730, for influence; Schioppa (2024), arXiv:2402.03994, for both from
sketches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.attribution._row_selection import (
    AtCheckpoints,
    Group,
    Selected,
    as_given,
    check_group,
    example_ids,
    select,
    sum_by_id,
)
from lightning_sketch.attribution.curvature import Curvature, Kind
from lightning_sketch.attribution.influence import Damping, Influence
from lightning_sketch.attribution.row_curvature import row_curvature
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients

Method = Literal["dot", "cosine", "tracin", "influence"]
Queries = SketchedGradients | AtCheckpoints
CurvatureLike = Kind | Curvature | Influence

FOLDER = "curvature"  # the folder of a store that has its curvatures
_PART = 1 << 20  # numbers of rows that are converted and multiplied at once: 4 MB in float32


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of the rows of one source, block by block.

    Args:
        rows: The rows that are scored.
        train: The source that they were selected from.
        queries: The vectors that rows are multiplied by, for each value of `rows.partners`.
        cosine: Whether to divide by the norms of the rows.
    """

    rows: Selected
    train: RowSource
    queries: Mapping[int, Float[Tensor, "*dampings queries dim"]]
    cosine: bool = False

    @property
    def ids(self) -> Int[Tensor, " rows"]:
        """The ids of the rows, see `example_ids`."""
        return example_ids(self.train.metadata(), self.rows.positions)

    def blocks(self, batch_rows: int = 4096) -> Iterator[tuple[slice, Float[Tensor, "*dampings queries rows"]]]:
        """Yield the scores of the rows in order, each block with its positions among the rows."""
        start = 0
        for block in self.rows.source.blocks(batch_rows):
            place = slice(start, start := start + len(block))
            yield place, self._scores(block.sketches, self.rows.weights[place], self.rows.partners[place])

    def _scores(
        self, sketches: Float[Tensor, "rows dim"], weights: Float[Tensor, " rows"], partners: Int[Tensor, " rows"]
    ) -> Float[Tensor, "*dampings queries rows"]:
        """Return the scores of a block of rows, converted to float32 a part at a time.

        All parts are converted in the same memory, since memory that was never used before is slow.
        """
        part = max(1, _PART // sketches.shape[1])
        buffer = torch.empty(min(part, len(sketches)), sketches.shape[1], dtype=torch.float32, device=sketches.device)
        found = []
        with full_precision(sketches.device):
            for rows, steps in zip(sketches.split(part), partners.split(part), strict=True):
                wide = rows if rows.dtype == buffer.dtype else buffer[: len(rows)].copy_(rows)
                found.append(self._products(wide, steps))
        result = torch.cat(found, -1)
        return result if (weights == 1).all() else result * weights

    def _products(
        self, rows: Float[Tensor, "rows dim"], partners: Int[Tensor, " rows"]
    ) -> Float[Tensor, "*dampings queries rows"]:
        """Return the products of the rows with the queries of their partners."""
        steps = list(self.queries) if len(self.queries) == 1 else partners.unique().tolist()
        if len(steps) == 1:
            found = self.queries[steps[0]] @ rows.T
        else:
            found = torch.empty(*self.queries[steps[0]].shape[:-1], len(rows))
            for step in steps:
                own = partners == step
                found[..., own] = self.queries[step] @ rows[own].T
        return found / rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny) if self.cosine else found


def scorers(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    *,
    method: Method,
    curvature: CurvatureLike | Sequence[CurvatureLike],
    damping: Damping,
) -> list[Scorer]:
    """Make a scorer for each source of rows, or for the only one; arguments as in `scores`.

    Raises:
        ValueError: if lists differ in length, the method is unknown or lacks what it needs, or rows do not fit.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(get_args(Method))}.")
    one_curvature = cast(CurvatureLike, curvature)  # unless it is a list
    if isinstance(train, RowSource):
        return [_scorer(cast(Queries, queries), train, method, one_curvature, damping)]
    sources = list(train)
    members = list(queries) if isinstance(queries, list | tuple) else []
    curvatures = list(curvature) if isinstance(curvature, list | tuple) else [one_curvature] * len(sources)
    if not sources or len(members) != len(sources) or len(curvatures) != len(sources):
        raise ValueError(
            f"{len(sources)} sources of rows need as many queries and curvatures, in lists: each member's queries are "
            f"taken at its own weights; got {len(members)} queries and {len(curvatures)} curvatures."
        )
    return [_scorer(q, t, method, c, damping) for q, t, c in zip(members, sources, curvatures, strict=True)]


def inverse_of(curvature: CurvatureLike, damping: Damping, rows: RowSource, fingerprint: int) -> Influence:
    """Return the damped inverse of a curvature, and log its damping.

    Args:
        curvature: As in `scores`.
        damping: As in `scores`.
        rows: The rows that the curvature is made from, or the store that has it.
        fingerprint: Fingerprint of the weights of the queries.

    Raises:
        ValueError: if it has another dim or other weights than the rows.
        FileNotFoundError: if the store has no such curvature.
    """
    if isinstance(curvature, Influence):
        if not isinstance(damping, str):
            raise ValueError("damping is passed twice: an Influence has one already; pass its .curvature instead.")
        inverse = curvature
    else:
        inverse = Influence(curvature_of(curvature, rows, fingerprint), damping)
    found = inverse.curvature
    if found.dim != rows.sketch.dim:
        raise ValueError(f"the curvature has dim={found.dim}, rows have {rows.sketch.dim}; fit it with their sketch.")
    if found.fingerprint and fingerprint and found.fingerprint != fingerprint:
        raise ValueError(
            f"the curvature was taken at weights {found.fingerprint}, rows and queries at {fingerprint}; fit it at the "
            "same checkpoint."
        )
    inverse.log()
    return inverse


def curvature_of(curvature: Kind | Curvature, rows: RowSource, fingerprint: int) -> Curvature:
    """Return the curvature of this kind: made from the rows, or read from the store; errors as in `inverse_of`."""
    if isinstance(curvature, Curvature):
        return curvature
    if curvature != "ggn":
        return row_curvature(rows, curvature)
    path = getattr(rows, "path", None)
    if not isinstance(path, Path):
        raise ValueError(
            "curvature='ggn' needs the model's outputs, which rows do not have; pass curvature=fit_ggn(module, "
            "batches, sketch, layout), or 'margin', which needs the rows alone."
        )
    return Curvature.load(path / FOLDER, "ggn", fingerprint=fingerprint)


def _scorer(queries: Queries, train: RowSource, method: Method, curvature: CurvatureLike, damping: Damping) -> Scorer:
    """Make the scorer of one source of rows."""
    if isinstance(queries, Mapping) != (method == "tracin"):
        wanted = "{step of the checkpoint: queries}" if method == "tracin" else "queries taken at the rows' weights"
        raise ValueError(f"method={method!r} takes {wanted}, got a {type(queries).__name__}.")
    rows = select(queries, train)
    if isinstance(queries, Mapping):
        return Scorer(rows, train, {step: at.sketches.float() for step, at in queries.items()})
    vectors = queries.sketches
    if method == "influence":
        vectors = inverse_of(curvature, damping, rows.source, queries.fingerprint)(vectors)
    elif method == "cosine":
        vectors = torch.nn.functional.normalize(vectors.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    return Scorer(rows, train, {0: vectors.float()}, cosine=method == "cosine")


def scores(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    *,
    method: Method = "dot",
    curvature: CurvatureLike | Sequence[CurvatureLike] = "ggn",
    damping: Damping = "auto",
    group: Group | None = None,
    batch_rows: int = 4096,
) -> Float[Tensor, "*dampings queries columns"]:
    """Compute the influence of each training row on each query.

    A positive score helps the query. The module `attribution.scores` has the formulas and scales of the methods.

    Args:
        queries: The rows of the queries; for tracin by the step of their checkpoint, {step: queries}, with the same
            queries in the same order at each. A list if `train` is a list.
        train: The rows of the training examples, in memory or on disk. Those that were taken at the weights of the
            queries are scored. Over a list (checkpoints, or models trained with other seeds) the mean is taken.
        method: "dot", "cosine", "tracin" or "influence".
        curvature: The curvature for influence. "margin", "fisher" or "trak" is made from the rows in another pass,
            "ggn" is read from the store, see `GradientStore.fit_curvature`; or what `fit_ggn` or `row_curvature`
            returned; or an `Influence`, which has a damping of its own. A list for a list of `train`, if they differ.
        damping: The damping for influence: "auto", a number, or several, which give the result a first axis.
        group: "example_id" sums over rows of equal id; the columns are then the ids in rising order, names by letter.
        batch_rows: Most rows in memory at a time.

    Returns:
        float32, (queries, rows): a column for each row that is scored, in their order; with `group` (queries, ids);
        with several dampings (dampings, queries, rows).

    Raises:
        ValueError: if rows and queries were taken at different weights or by different sketches, if the method is
            unknown or lacks what it needs, or if members of a list have other rows.
        FileNotFoundError: if `curvature="ggn"` was not fitted at these weights.

    Cost: O(queries rows dim); influence needs O(dim³) before, for a curvature of full rank.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.tensor([[1.0, 0.0], [-2.0, 1.0]]), BlockSRHT(9, 2))
    >>> query = SketchedGradients(torch.tensor([[3.0, 0.0]]), BlockSRHT(9, 2))
    >>> scores(query, rows)
    tensor([[ 3., -6.]])
    """
    check_group(group)
    members = scorers(queries, train, method=method, curvature=curvature, damping=damping)
    if group is not None:
        ids = torch.cat([member.ids for member in members])
        total, unique = sum_by_id(torch.cat([_all(member, batch_rows) for member in members], -1), ids)
        named = as_given(unique, (member.train for member in members))
        if isinstance(named, list):
            total = total[..., sorted(range(len(named)), key=named.__getitem__)]
        return total / len(members)
    if any(not torch.equal(member.ids, members[0].ids) for member in members[1:]):
        raise ValueError("members of the list have other rows, or in another order; use group='example_id'.")
    total = _all(members[0], batch_rows)
    for member in members[1:]:
        total += _all(member, batch_rows)
    return total.div_(len(members))


def together(queries: SketchedGradients) -> SketchedGradients:
    """Sum queries into one, whose scores are the sums of their scores, and whose loss is the sum of their losses.

    Args:
        queries: The queries, all at the same weights.

    Returns:
        A table of one row.

    Raises:
        ValueError: if the queries were taken at different weights.

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
    """Return the scores of all rows."""
    result = torch.empty(*next(iter(member.queries.values())).shape[:-1], len(member.rows))
    for place, found in member.blocks(batch_rows):
        result[..., place] = found
    return result
