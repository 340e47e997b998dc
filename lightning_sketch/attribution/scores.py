"""Influence scores: how much each training row helps or hurts each query, and the rows that help or hurt it most.

    dot          g_q . g_i
    cosine       g_q . g_i / (|g_q| |g_i|)
    tracin       sum over checkpoints of lr g_q . g_i, each at that checkpoint
    influence    g_qᵀ A⁻¹ g_i,    A: the curvature averaged over examples, plus lambda I
    normalize    influence / sqrt(g_qᵀ A⁻¹ g_q  g_iᵀ A⁻¹ g_i), relative influence; dot becomes cosine
    weighted     each times w_i / mean w, w_i: the example's tokens or class weight, in a mean of these

g_i is the sketched gradient of the example's own loss (not of its share in the mean of a batch). Without `normalize`
outliers of large gradients are in the lists of all queries.

Sign: a positive score helps the query: training on the example lowers the query's loss, and removing the example raises
the loss. Scale, to first order:

    dot          lr times the score is how much one step of SGD on the example alone lowers the query's loss
    tracin       the score over the batch size is how much the example's share of the steps lowered the query's loss
    influence    the score over n is how much the query's loss rises when the example is removed from n and the model,
                 whose loss is the mean over examples plus lambda |theta|² / 2, is trained to convergence again

For a set of examples that are removed together, the sum of their scores has the sign of the change but not its size:
with 20 of 300 digits it was 3 to 22 times too small, since a model that is trained again without them also forgets what
they have in common.

The rows are read once, block by block, since everything that a method multiplies by is applied to the queries. Memory
beside the result: one block of rows, and for `top_k` k results per query, or one number per query and example where
rows of one example are summed.

Source: Pruthi et al. (2020), "Estimating training data influence by tracing gradient descent", arXiv:2002.08484, for
tracin; Koh and Liang (2017), arXiv:1703.04730, for influence; Schioppa (2024), arXiv:2402.03994, for both from
sketches; Barshan et al. (2020), "RelatIF", arXiv:2003.11630, for relative influence.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch.attribution._scorer import Scorer, Vectors, narrowed, split, whole
from lightning_sketch.attribution._selected import Queries, Unit, check_scale, one_preconditioner, select
from lightning_sketch.attribution.curvature import Curvature, Damping, Influence, Kind
from lightning_sketch.attribution.row_curvature import row_curvature
from lightning_sketch.attribution.split_half import HALVES, SplitHalf
from lightning_sketch.autodiff.fingerprint import short
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients, Strings

Method = Literal["dot", "cosine", "tracin", "influence"]
Group = Literal["example_id"]  # the column by which scores are summed
CurvatureLike = Kind | Curvature | Influence

FOLDER = "curvature"  # the folder of a store that has its curvatures
_LOOKED_FOR = 4  # rows that an index is asked for, for each of the k best: it knows products in part
_SHOWN = 5  # queries in a repr, and examples of each


def scores(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    *,
    method: Method = "dot",
    curvature: CurvatureLike | Sequence[CurvatureLike] = "ggn",
    damping: Damping = "auto",
    normalize: bool = False,
    weighted: bool = False,
    group: Group | None = None,
    batch_rows: int = 4096,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*dampings queries columns"]:
    """Compute the influence of each training row on each query.

    A positive score helps the query. "dot" times a learning rate is how much a step of SGD on the example lowers the
    query's loss, "tracin" over the batch size how much its share of all steps did, "influence" over the number of
    examples how much the loss rises without the example; the head of the file `attribution/scores.py` has the formulas.

    Args:
        queries: The rows of the queries; for tracin by the step of their checkpoint, {step: queries}, with the same
            queries in the same order at each. A list if `train` is a list.
        train: The rows of the training examples, in memory or on disk. Those that were taken at the weights of the
            queries are scored, see `scored_rows`. Over a list (checkpoints, or models trained with other seeds) the
            mean is taken.
        method: "dot", "cosine", "tracin" or "influence".
        curvature: The curvature for influence. "margin", "fisher" or "trak" is made from the rows in another pass,
            "ggn" is read from the store, see `GradientStore.fit_curvature`; or what `fit_ggn` or `row_curvature`
            returned; or an `Influence`, which has a damping of its own. A list for a list of `train`, if they differ.
        damping: The damping for influence: "auto", a number, or several, which give the result a first axis.
        normalize: Whether to divide by the lengths of row and query in the metric of the method: relative influence.
        weighted: Whether to multiply by the column `weight` over its mean, as examples act on training under a mean
            over tokens.
        group: "example_id" sums over rows of equal id; the columns are then the ids in rising order, names by letter.
        batch_rows: Most rows in memory at a time.
        device: Where rows are multiplied, such as "cuda", to which they are copied block by block; their own if None.

    Returns:
        (queries, rows), a column for each row of `scored_rows`, in their order; with `group` (queries, ids); with
        several dampings (dampings, queries, rows). In float32; float64 if the largest score of a query is beyond its
        range. A row that has no finite gradient, and says that it has one, scores NaN.

    Raises:
        ValueError: if rows and queries were taken at different weights or by different sketches, if the method is
            unknown or lacks what it needs, or if members of a list have other rows.
        FileNotFoundError: if `curvature="ggn"` was not fitted at these weights.

    Warns:
        UserWarning: if rows or queries are zero, rows repeat an example, or their scale is not known.

    Cost: O(queries rows dim); influence needs O(dim³) before, for a curvature of full rank, and with `normalize`
    O(rows dim²).

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.tensor([[1.0, 0.0], [-2.0, 1.0]]), BlockSRHT(9, 2))
    >>> query = SketchedGradients(torch.tensor([[3.0, 0.0]]), BlockSRHT(9, 2))
    >>> scores(query, rows)
    tensor([[ 3., -6.]])
    """
    check_group(group)  # before a curvature is made
    batch_rows = whole_number(batch_rows, "batch_rows")
    members = [s.on(device) for s in scorers(queries, train, method, curvature, damping, normalize, weighted)]
    return scores_of(members, group, batch_rows)


def scores_of(members: list[Scorer], group: Group | None, batch_rows: int) -> Float[Tensor, "*dampings queries rows"]:
    """Return what `scores` does."""
    check_group(group)
    batch_rows = whole_number(batch_rows, "batch_rows")
    ids, agreement = [member.ids for member in members], _agreement(members)
    if group is not None:
        parts, unique = _sums(members, torch.cat(ids), batch_rows)
        agreement.add(parts)
        total, named = whole(parts), as_given(unique, (member.train for member in members))
        if isinstance(named, list):
            total = total[..., sorted(range(len(named)), key=named.__getitem__)]
    else:
        _check_order(ids)
        total = torch.empty(members[0].shape)
        for place, parts in _means(members, batch_rows):
            agreement.add(parts)
            total = total.to(torch.promote_types(total.dtype, parts.dtype))
            total[..., place] = whole(parts)
    agreement.warn()
    return narrowed(total)


def reliability(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    *,
    method: Literal["dot", "cosine", "tracin"] = "dot",
    weighted: bool = False,
    group: Group | None = None,
    batch_rows: int = 4096,
) -> Float[Tensor, " queries"]:
    """Estimate how near the scores of each query are to those of gradients that were never sketched.

    See the module `attribution.split_half` for the formula. `top_k` returns the same with its scores.

    Args:
        queries: The rows of the queries, as in `scores`.
        train: The rows of the training examples, or a list of such rows, as in `scores`.
        method: "dot", "cosine" or "tracin".
        weighted: Whether the scores are multiplied by the weights of the rows, as in `scores`.
        group: "example_id" for scores that are summed over rows of equal id.
        batch_rows: Most rows in memory at a time.

    Returns:
        (queries,), the estimated correlation, over the rows, of the scores with those without a sketch, from 0 to 1;
        NaN for a query whose scores are all the same.

    Raises:
        ValueError: as in `scores`; for "influence", for fewer than 30 rows, and for a kind of sketch whose halves are
            not sketches.

    Cost: that of `scores`, with a few numbers per query in memory.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> sketch, rows = BlockSRHT(n=5000, dim=256), torch.randn(5, 5000)  # 40 examples of 5 gradients and some noise
    >>> gradients = rows.repeat(8, 1) + 0.1 * torch.randn(40, 5000)
    >>> train = SketchedGradients(sketch.matvec(gradients), sketch)
    >>> bool(reliability(SketchedGradients(sketch.matvec(rows), sketch), train).mean() > 0.9)
    True
    """
    check_group(group)
    batch_rows = whole_number(batch_rows, "batch_rows")
    members = scorers(queries, train, method, "ggn", normalize=False, weighted=weighted)
    agreement = _agreement(members)
    if group is not None:
        agreement.add(_sums(members, torch.cat([member.ids for member in members]), batch_rows)[0])
    else:
        _check_order([member.ids for member in members])
        for _, parts in _means(members, batch_rows):
            agreement.add(parts)
    return agreement.known()


def scored_rows(queries: Queries, train: RowSource) -> Int[Tensor, " columns"]:
    """Return the positions in `train` of the rows that `scores` has columns for.

    These are the rows at the weights of the queries that are finite, no duplicates of a distributed sampler, and no
    stored queries; of rows of one example at the same weights, the last.

    Args:
        queries: The queries; for tracin by the step of their checkpoint.
        train: The rows.

    Raises:
        ValueError: as in `scores`.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.eye(2), BlockSRHT(9, 2), {"finite": [False, True]})
    >>> scored_rows(rows.where(finite=True), rows)
    tensor([1])
    """
    _check_tables(queries, "tracin" if isinstance(queries, Mapping) else "dot")
    return select(queries, train).positions


def together(queries: SketchedGradients) -> SketchedGradients:
    """Sum queries into one, whose scores are the sums of their scores, and whose loss is the sum of their losses.

    A set of training examples that is removed has another effect than the sum over them, see `attribution.scores`.

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
        "preconditioner": torch.tensor([one_preconditioner(queries)]),
        "loss": queries.loss.sum(0, keepdim=True),
        "finite": queries.finite.all(0, keepdim=True),
    }
    wide = queries.sketches.float() if queries.sketches.dtype.itemsize < 4 else queries.sketches
    return SketchedGradients(wide.sum(0, keepdim=True), queries.sketch, columns)


class _TopK(NamedTuple):
    scores: Float[Tensor, "queries k"]
    example_ids: Any


class TopK(_TopK):
    """The k best examples of each query, best first.

    Attributes:
        scores: The scores, (queries, k).
        example_ids: The ids of the examples, int64, (queries, k), or lists of names; of rows without ids the step of a
            training step, else the position in `train`.
        unit: What the ids are of: "example", "step" or "row".
        reliability: The estimated correlation of each query's scores, over all rows, with those without a sketch,
            (queries,), from 0 to 1; see the module `attribution.split_half`. None for influence, whose curvature is
            made of the same sketches; for kinds of sketches other than "block_srht", "fjl" and "gaussian"; and for
            fewer than 30 rows.
    """

    unit: Unit = "example"
    reliability: Float[Tensor, " queries"] | None = None
    _said: str = ""

    def __repr__(self) -> str:
        queries, k = self.scores.shape
        lines = [f"TopK of {queries} queries, k={k}: {self.unit} (score)"]
        for i in range(min(queries, _SHOWN)):
            ids = list(self.example_ids[i][:_SHOWN])
            pairs = zip(map(_plain, ids), self.scores[i, :_SHOWN].tolist(), strict=True)
            best = ", ".join(f"{example} ({score:.3g})" for example, score in pairs)
            lines.append(f"    query {i}: {best}{', ...' if k > _SHOWN else ''}")
        lines += ["    ..."] * (queries > _SHOWN) + [f"    {self._said}"] * bool(self._said)
        return "\n".join(lines)


def top_k(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    k: int = 10,
    *,
    largest: bool = True,
    method: Method = "dot",
    curvature: CurvatureLike | Sequence[CurvatureLike] = "ggn",
    damping: Damping = "auto",
    normalize: bool = False,
    weighted: bool = False,
    group: Group | None = "example_id",
    batch_rows: int = 4096,
    device: torch.device | str | None = None,
    approximate: bool = False,
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
        normalize: Whether to rank by relative influence, as in `scores`, so that outliers do not win every list.
        weighted: Whether to multiply by the weights of the rows, as in `scores`.
        group: "example_id" sums over rows of one example (several epochs or checkpoints); None ranks single rows.
        batch_rows: Most rows in memory at a time.
        device: Where rows are multiplied, such as "cuda", to which they are copied block by block; their own if None.
        approximate: Whether to score only rows that an index finds, see `store.build_index`: `train` is `LanceRows`,
            and the method dot or influence, or cosine. Scores are exact; examples may be missing.

    Returns:
        `TopK(scores, example_ids)`, both (queries, k), with `reliability`, (queries,): how near the scores are to those
        of gradients that were never sketched. The id of a row without id is the step of a training step, else the row's
        position in `train`. NaN is last.

    Raises:
        ValueError: as in `scores`; if k is not positive; for several dampings.

    Cost: that of `scores`, with k results per query in memory.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> sketch, ids = BlockSRHT(9, 2), {"example_id": [5, 6, 7]}
    >>> rows = SketchedGradients(torch.tensor([[1.0, 0.0], [3.0, 0.0], [-2.0, 1.0]]), sketch, ids)
    >>> top_k(SketchedGradients(torch.tensor([[3.0, 0.0]]), sketch), rows, k=2)
    TopK of 1 queries, k=2: example (score)
        query 0: 6 (9), 5 (3)
    """
    check_group(group)  # before a curvature is made
    k, batch_rows = whole_number(k, "k"), whole_number(batch_rows, "batch_rows")
    members = [s.on(device) for s in scorers(queries, train, method, curvature, damping, normalize, weighted)]
    if approximate:
        if weighted:
            raise ValueError("an index knows no weights of rows; leave approximate=True out with weighted=True.")
        members = [_candidates(members, method, normalize, whole_number(k, "k"), largest, group)]
    return top_k_of(members, k, largest, group, batch_rows)


def ranked(
    members: list[Scorer], ids: Int[Tensor, " rows"], batch_rows: int, k: int, largest: bool
) -> "tuple[_Best, SplitHalf]":
    """Return the best rows of members, one score for each, and how the halves of all scores agree."""
    best, agreement = _Best(k, largest), _agreement(members)
    for place, parts in _means(members, batch_rows):
        agreement.add(parts)
        best.add(whole(parts), ids[place])
    return best, agreement


def top_k_of(
    members: list[Scorer], k: int, largest: bool, group: Group | None, batch_rows: int, rank: Any = ranked
) -> TopK:
    """Return what `top_k` does, with the best rows by `ranked` or a function like it."""
    check_group(group)
    batch_rows, k = whole_number(batch_rows, "batch_rows"), whole_number(k, "k")
    if len(members[0].shape) > 2:
        raise ValueError("top_k takes one damping, got several; use scores(...) for these.")
    ids = [member.ids for member in members]
    same = all(torch.equal(own, ids[0]) for own in ids[1:])
    if group is not None and not (same and len(ids[0].unique()) == len(ids[0])):
        best, agreement = _Best(k, largest), _agreement(members)
        parts, unique = _sums(members, torch.cat(ids), batch_rows)
        agreement.add(parts)
        best.add(whole(parts), unique)
    else:
        _check_order(ids)
        best, agreement = rank(members, ids[0], batch_rows, k, largest)
    return best.found(members, agreement)


def _candidates(
    members: list[Scorer], method: Method, normalize: bool, k: int, largest: bool, group: Group | None
) -> Scorer:
    """Return the scorer of the rows that an index finds for the queries, and of all others of their examples."""
    from lightning_sketch.store import lance, lance_index  # which need not be installed

    train = members[0].train
    if len(members) > 1 or not isinstance(train, lance.LanceRows):
        raise ValueError(
            "approximate=True takes rows in one Lance dataset: store.export('lance', uri), then LanceRows(uri)."
        )
    cosine = method == "cosine" or (normalize and method == "dot")
    if method == "tracin" or (normalize and not cosine):
        raise ValueError("an index finds the largest products or cosines; leave approximate=True out for this method.")
    vectors = members[0].queries[0].exact if largest else -members[0].queries[0].exact
    own = cast(lance.LanceRows, members[0].rows.source)  # those at the weights of the queries
    found = lance_index.nearest(own, "cosine" if cosine else "dot", vectors, _LOOKED_FOR * k)
    keep = torch.zeros(len(own), dtype=torch.bool)
    keep[found] = True
    if group is not None:
        keep |= torch.isin(members[0].ids, members[0].ids[keep])
    return replace(members[0].only(keep), halves=False)


class _Best:
    """The k best scores of each query so far, with their ids."""

    def __init__(self, k: int, largest: bool):
        self.k, self.largest = k, largest
        self.best: tuple[Tensor, Tensor] | None = None

    def add(self, scores: Float[Tensor, "queries columns"], ids: Int[Tensor, "*#queries columns"]) -> None:
        """Merge the scores of more columns; ids may differ from query to query."""
        ids = ids.expand(scores.shape)
        if self.best is not None:
            scores, ids = torch.cat([self.best[0], scores], 1), torch.cat([self.best[1], ids], 1)
        worst = float("-inf" if self.largest else "inf")
        place = scores.nan_to_num(worst, float("inf"), float("-inf")).topk(
            min(self.k, scores.shape[1]), largest=self.largest
        )[1]
        self.best = scores.gather(1, place), ids.gather(1, place)

    def merge(self, other: "_Best") -> None:
        """Add the columns of another one."""
        if other.best is not None:
            self.add(*other.best)

    def found(self, members: list[Scorer], agreement: SplitHalf) -> TopK:
        """Return the best of all columns that were added, which are one at least."""
        scores, ids = cast(tuple[Tensor, Tensor], self.best)
        result = TopK(narrowed(scores), as_given(ids, (member.train for member in members)))
        result.unit = members[0].unit
        result.reliability, result._said = agreement.reliability(), str(agreement)
        return result


def _agreement(members: list[Scorer]) -> SplitHalf:
    """Return what compares the halves of the scores of members."""
    return SplitHalf([member.train.sketch for member in members] if members[0].halves else [])


def _plain(example: Any) -> Any:
    """Return the id of an example as a number or a name."""
    return example.item() if isinstance(example, Tensor) else example


def _means(
    members: list[Scorer], batch_rows: int
) -> Iterator[tuple[slice, Float[Tensor, "parts *dampings queries rows"]]]:
    """Yield parts of the mean scores of all members with their positions; blocks of members may differ in size."""
    streams = [member.parts(batch_rows) for member in members]
    waiting = [next(stream)[1] for stream in streams]
    start, count = 0, len(members[0].rows)
    while True:
        size = min(found.shape[-1] for found in waiting)
        total = waiting[0][..., :size]
        for found in waiting[1:]:
            total = total + found[..., :size]
        yield slice(start, start + size), total if len(members) == 1 else total / len(members)
        start += size
        waiting = [found[..., size:] for found in waiting]
        pairs = zip(waiting, streams, strict=True)
        ends = start == count
        waiting = [found if found.shape[-1] else next(stream, (None, found))[1] for found, stream in pairs]
        if ends:
            return


def _sums(
    members: list[Scorer], ids: Int[Tensor, " rows"], batch_rows: int
) -> tuple[Float[Tensor, "parts *dampings queries ids"], Int[Tensor, " ids"]]:
    """Return parts of the scores summed by id, as a mean over members, and the ids."""
    unique, inverse = ids.unique(return_inverse=True)
    total, start = torch.zeros(1 + members[0].halves, *members[0].shape[:-1], len(unique)), 0
    for member in members:
        for place, found in member.parts(batch_rows):
            total = total.to(torch.promote_types(total.dtype, found.dtype))
            total.index_add_(-1, inverse[start + place.start : start + place.stop], found.to(total.dtype))
        start += len(member.rows)
    return total / len(members), unique


def as_given(ids: Tensor, sources: Iterable[RowSource]) -> Any:
    """Return ids as they were given: those of strings as strings, in lists of the same shape."""
    given = [source.metadata()["example_id"] for source in sources]
    tables = [table for column in given if isinstance(column, Strings) for table in column.tables]
    named = Strings(ids, tables)
    return named.tolist() if tables and named.names.keys() >= set(ids.flatten().tolist()) else ids  # else steps


def sum_by_id(
    values: Float[Tensor, "*leading rows"], ids: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "*leading ids"], Int[Tensor, " ids"]]:
    """Sum values of equal id along the last axis; return the sums and the ids, in rising order.

    >>> sum_by_id(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 5, 7]))
    (tensor([2., 4.]), tensor([5, 7]))
    """
    unique, inverse = ids.unique(return_inverse=True)
    return values.new_zeros(*values.shape[:-1], len(unique)).index_add_(-1, inverse, values), unique


def check_group(group: Group | None) -> None:
    """Refuse an unknown group."""
    if group not in (None, *get_args(Group)):
        raise ValueError(f"group={group!r} is not known; 'example_id' sums over rows of one example, None does not.")


def _check_order(ids: Sequence[Tensor]) -> None:
    """Refuse members whose rows are others, or in another order."""
    if any(not torch.equal(own, ids[0]) for own in ids[1:]):
        raise ValueError("members of the list have other rows, or in another order; use group='example_id'.")


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
        inverse = Influence(curvature_of(curvature, rows, fingerprint, single=damping == "auto"), damping)
    found = inverse.curvature
    if found.dim != rows.sketch.dim:
        raise ValueError(f"the curvature has dim={found.dim}, rows have {rows.sketch.dim}; fit it with their sketch.")
    if found.preconditioner != one_preconditioner(rows):
        what = ["no preconditioner" if id == 0 else str(id) for id in (found.preconditioner, one_preconditioner(rows))]
        raise ValueError(
            f"the curvature is of gradients that went through {what[0]}, the rows through {what[1]}; fit it with "
            "store.fit_curvature(module, batches), or fit_ggn(..., preconditioner=...)."
        )
    if found.fingerprint and fingerprint and found.fingerprint != fingerprint:
        raise ValueError(
            f"the curvature was taken at weights {short(found.fingerprint)}, rows and queries at {short(fingerprint)}; "
            "fit it at the same checkpoint."
        )
    inverse.log()
    return inverse


def curvature_of(curvature: Kind | Curvature, rows: RowSource, fingerprint: int, single: bool = False) -> Curvature:
    """Return the curvature of this kind: made from the rows, or read from the store; errors as in `inverse_of`."""
    if isinstance(curvature, Curvature):
        return curvature
    if curvature != "ggn":
        return row_curvature(rows, curvature, single=single)
    path = getattr(rows, "path", None)
    if not isinstance(path, Path):
        raise ValueError(
            "curvature='ggn' needs the model's outputs, which rows do not have; pass curvature=fit_ggn(module, "
            "batches, sketch, layout), or 'margin', which needs the rows alone."
        )
    return Curvature.load(path / FOLDER, "ggn", fingerprint=fingerprint, preconditioner=one_preconditioner(rows))


def scorers(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    method: Method,
    curvature: CurvatureLike | Sequence[CurvatureLike],
    damping: Damping = "auto",
    normalize: bool = False,
    weighted: bool = False,
) -> list[Scorer]:
    """Make a scorer for each source of rows, or for the only one; arguments as in `scores`.

    Raises:
        ValueError: if lists differ in length, the method is unknown or lacks what it needs, or rows do not fit.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(get_args(Method))}.")
    if normalize and method == "tracin":
        raise ValueError("normalize=True takes one checkpoint, tracin sums over several; use 'dot' or 'influence'.")
    options = damping, "cosine" if normalize and method == "dot" else method, normalize, weighted
    one_curvature = cast(CurvatureLike, curvature)  # unless it is a list
    if isinstance(train, RowSource):
        return _halved([_scorer(cast(Queries, queries), train, one_curvature, *options)], method)
    for source in train if isinstance(train, list | tuple) else [train]:
        check_train(source)
    members = list(queries) if isinstance(queries, list | tuple) else []
    curvatures = list(curvature) if isinstance(curvature, list | tuple) else [one_curvature] * len(train)
    if not train or len(members) != len(train) or len(curvatures) != len(train):
        raise ValueError(
            f"{len(train)} sources of rows need as many queries and curvatures, in lists: each member's queries are "
            f"taken at its own weights; got {len(members)} queries and {len(curvatures)} curvatures."
        )
    return _halved([_scorer(q, t, c, *options) for q, t, c in zip(members, train, curvatures, strict=True)], method)


def _halved(members: list[Scorer], method: Method) -> list[Scorer]:
    """Return scorers that yield the halves of their scores, where these are scores of two sketches."""
    if method == "influence" or any(member.train.sketch.kind not in HALVES for member in members):
        return members
    return [replace(member, halves=True) for member in members]


def check_train(train: Any) -> None:
    """Refuse training rows that are no rows."""
    if not isinstance(train, RowSource):
        raise ValueError(
            f"train takes rows, as SketchedGradients or a store, got a {type(train).__name__}; open a store by "
            "GradientStore.open(path), or make rows of a tensor by SketchedGradients(tensor, sketch)."
        )


def _check_tables(queries: Any, method: Method) -> None:
    """Refuse queries that are no rows, or not by checkpoint as tracin takes them."""
    by_step = isinstance(queries, Mapping)
    tables = list(queries.values()) if by_step else [queries]
    if by_step == (method == "tracin") and all(isinstance(table, SketchedGradients) for table in tables):
        return
    wanted = "{step of the checkpoint: queries}" if method == "tracin" else "queries taken at the rows' weights"
    kind = type(queries if by_step != (method == "tracin") else tables[0]).__name__
    advice = "sketch_gradients(...) or store.sketch_gradients(...) makes them, store.queries() has stored ones"
    if method == "tracin" and isinstance(queries, SketchedGradients):
        advice = "pass {int(rows.step[0]): queries} for one checkpoint, or store.queries(), see queries='val'"
    elif isinstance(queries, RowSource):
        advice = "read the rows of a store into memory with .read()"
    elif isinstance(queries, list | tuple):
        advice = "a list needs a list of train, one for each; SketchedGradients.cat(list) makes one table"
    raise ValueError(f"method={method!r} takes {wanted}, as SketchedGradients, got a {kind}; {advice}.")


def _scorer(
    queries: Queries,
    train: RowSource,
    curvature: CurvatureLike,
    damping: Damping,
    method: Method,
    normalize: bool,
    weighted: bool,
) -> Scorer:
    """Make the scorer of one source of rows."""
    _check_tables(queries, method)
    rows = select(queries, train, weighted)
    if method != "cosine" and not normalize:
        check_scale(rows)
    if isinstance(queries, Mapping):
        return Scorer(rows, train, {step: Vectors(*split(at.sketches)) for step, at in queries.items()})
    parts, size = split(queries.sketches)
    zero = (parts == 0).all(1)
    if zero.any():
        warnings.warn(f"{int(zero.sum())} of {len(zero)} queries are zero, and so are their scores.", stacklevel=2)
    vectors, length = parts, None
    if method == "cosine":
        length = _norm
    elif method == "influence":
        inverse = inverse_of(curvature, damping, rows.source, queries.fingerprint)
        vectors, length = inverse(parts), _Metric(inverse) if normalize else None
    scale = size.expand(vectors.shape[:-1]) if length is None else (1 / length(parts)).where(~zero, 0)
    vectors, own = split(vectors)
    return Scorer(rows, train, {0: Vectors(vectors, own * scale)}, length)


def _norm(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """Return the norm of each row."""
    return rows.norm(dim=1)


@dataclass(frozen=True, eq=False)
class _Metric:
    """The length of rows in the metric of a damped inverse, sqrt(gᵀ A⁻¹ g)."""

    inverse: Influence

    def __call__(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "*dampings rows"]:
        own = rows.cpu()  # where the inverse is
        return (self.inverse(own) * own.double()).sum(-1).sqrt().to(rows.device)
