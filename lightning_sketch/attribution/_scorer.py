"""Selects the rows that queries are compared with, and computes their products, block by block.

    dot, cosine, influence   rows of validate, test and predict: those with the queries' fingerprint
                             rows of fit, if there are no others: all of them must have it
    tracin                   rows of validate, test and predict: those at a step that has queries
                             rows of fit: all of them, each with the latest queries at or before its weights

Duplicates that a sampler added (padded), rows that are not finite, and stored queries are never scored. Of several rows
of one example at a checkpoint (same id, loader, stage and known fingerprint) the last is scored.

    score = (v . g) scale factor,    v: vector of the query, |v|_inf in [1, 2);    g: row;    factor: see `Scorer`

Products are in float32 where it holds them, else in float64 with g divided by its size, so that gradients of any norm
have right scores.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sketch.operators._precision import full_precision
from lightning_sketch.store.index import equal_rows
from lightning_sketch.store.row_store import RowStore
from lightning_sketch.store.sketched_gradients import (
    NONE,
    OF_STEP,
    STAGES,
    UNKNOWN_ID,
    RowSource,
    SketchedGradients,
    keys_of,
    say_rows,
)

AtCheckpoints = Mapping[int, SketchedGradients]  # queries by the optimizer step of their weights
Queries = SketchedGradients | AtCheckpoints
Unit = Literal["example", "step", "row"]

_FIT, _QUERIES = STAGES.index("fit"), STAGES.index("queries")
_PART = 1 << 20  # numbers of rows that are converted and multiplied at once: 4 MB in float32
_SMALL, _LARGE = 1e-12, 1e12  # float32 holds the product of three numbers in between, and their squares
_SINGLE = torch.finfo(torch.float32)


@dataclass(frozen=True, eq=False)
class Selected:
    """The rows that are scored.

    Args:
        source: The rows themselves.
        positions: The position of each row in the source that was passed.
        factors: What the score of each row is multiplied by, float64: for tracin its learning rate.
        partners: The step of the queries that each row is compared with for tracin, else zeros.
    """

    source: RowSource
    positions: Int[Tensor, " rows"]
    factors: Float[Tensor, " rows"]
    partners: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.positions)


def select(queries: Queries, train: RowSource, weighted: bool = False) -> Selected:
    """Select the rows that the queries can be compared with; for queries by checkpoint those of tracin.

    Raises:
        ValueError: if there are none, if sketches or weights differ, if it is not clear which rows are meant, or if a
            factor is unknown.
    """
    columns = train.metadata()
    keep = scorable(columns)
    if isinstance(queries, Mapping):
        return _select_by_step(queries, train, keep, weighted)
    _check_queries(queries, train)
    there = _at_weights(queries.fingerprint, columns, keep)
    _check_preconditioner(queries, columns["preconditioner"][there])
    return _selected(train, there, weighted=weighted)


def select_all(train: RowSource, rates: bool) -> Selected:
    """Select all rows that can be scored, at any weights, with their learning rates as factors if `rates`.

    Raises:
        ValueError: if there are none, or a learning rate is unknown.
    """
    columns = train.metadata()
    keep = scorable(columns)
    if (columns["preconditioner"][keep] == OF_STEP).any():
        raise ValueError(
            "rows of training that went through the optimizer's preconditioner have no self-influence, which takes the "
            "gradient on one side without it; use rows at a checkpoint: trainer.validate(model, train_loader)."
        )
    if rates:
        _check_one_kind(columns["stage"][keep])
    return _selected(train, keep, rates=rates)


def scorable(columns: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
    """Return a mask of the rows that are finite, no duplicates, and no stored queries.

    Raises:
        ValueError: if there are none.

    Warns:
        UserWarning: if an example has several rows at the same weights, of which the last is scored.
    """
    keep = columns["finite"] & ~columns["padded"] & (columns["stage"] != _QUERIES)
    if not len(keep):
        raise ValueError("there are no rows to score: the selection is empty, or nothing was written.")
    if not keep.any():
        raise ValueError(
            f"none of the {len(keep)} rows can be scored: all are non-finite, duplicates or stored queries; check the "
            "columns 'finite', 'padded' and 'stage' of .metadata()."
        )
    ids = keys_of(columns["example_id"])
    once = keep & (columns["stage"] != _FIT) & (columns["fingerprint"] != 0) & (ids != UNKNOWN_ID)
    (there,) = once.nonzero(as_tuple=True)
    if len(ids[there].unique()) == len(there):
        return keep
    of_example = ids, columns["fingerprint"], columns["stage"]
    more = (keys_of(columns[name]) for name in ("dataloader", "part", "token") if name in columns)
    alike = equal_rows(*(column[there] for column in (*of_example, *more)))
    last = torch.zeros_like(there).scatter_reduce(0, alike, there, "amax")[alike] == there
    keep[there[~last]] = False
    if not last.all():
        warnings.warn(
            f"{int((~last).sum())} of {len(there)} rows repeat an example at the same weights, as a sampler with "
            "replacement draws them; each example counts once, by its last row.",
            stacklevel=2,
        )
    return keep


def one_preconditioner(rows: RowSource) -> int:
    """Return the id of the preconditioner that all rows went through, `NONE` if none.

    Raises:
        ValueError: if they went through different ones.
    """
    found = rows.metadata()["preconditioner"].unique().tolist()
    if len(found) != 1:
        raise ValueError(
            f"the rows went through {len(found)} different preconditioners ({_few(torch.tensor(found))}, 0 is none); "
            "choose with .where(preconditioner=...)."
        )
    return int(found[0])


def one_fingerprint(rows: RowSource) -> int:
    """Return the fingerprint of the weights at which all rows were taken.

    Raises:
        ValueError: if they were taken at different weights.
    """
    found = rows.metadata()["fingerprint"].unique().tolist()
    if len(found) != 1:
        raise ValueError(
            f"the rows were taken at {len(found)} different weights; choose with "
            ".where(stage=...) or .where(fingerprint=...)."
        )
    return int(found[0])


def identify(columns: Mapping[str, Any], positions: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], Unit]:
    """Return what tells the rows at these positions apart, and what that is.

    Returns:
        The ids of their examples, hashes if they are strings; of rows without ids the steps of training steps, else
        the positions.

    Raises:
        ValueError: if some rows have ids and others do not.
    """
    ids = keys_of(columns["example_id"])[positions]
    unknown = ids == UNKNOWN_ID
    if not unknown.any():
        return ids, "example"
    if not unknown.all():
        raise ValueError(
            f"{int(unknown.sum())} of {len(ids)} rows have no example_id, the others have one; select rows "
            "with .where(mask), or write them with an index_key."
        )
    if (columns["stage"][positions] == _FIT).all():
        return columns["step"][positions].long(), "step"
    return positions, "row"


def _check_queries(queries: SketchedGradients, train: RowSource) -> None:
    """Refuse queries of another sketch, queries that are not finite, and an empty table of queries."""
    if queries.sketch != train.sketch:
        raise ValueError(
            f"queries were made by {queries.sketch}, rows by {train.sketch}; make the queries with the rows' own "
            "sketch: sketch_gradients(module, batches, train.sketch)."
        )
    bad = int((~(queries.finite & queries.sketches.isfinite().all(1).cpu())).sum())
    if bad:
        raise ValueError(f"{bad} of {len(queries)} queries are not finite; drop them: queries.where(finite=True).")
    if not len(queries):
        raise ValueError("there are no queries; pass at least one row.")


def _at_weights(fingerprint: int, columns: Mapping[str, Any], there: Bool[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """Return a mask of the scorable rows at the queries' weights: of checkpoints, or else of training steps."""
    fit = columns["stage"] == _FIT
    at_checkpoint, equal = there & ~fit, columns["fingerprint"] == fingerprint
    if fingerprint == 0 and (columns["fingerprint"][there] != 0).any():
        raise ValueError(
            "the weights at which the queries were taken are unknown (fingerprint 0), those of the rows are known; "
            "make the queries with sketch_gradients, which records them."
        )
    if at_checkpoint.any():
        if not (at_checkpoint & equal).any():
            found = columns["fingerprint"][at_checkpoint].unique()
            raise ValueError(
                f"the queries were taken at weights {fingerprint}, the rows at {_few(found)}; load the checkpoint that "
                "the rows were taken at, or write rows at these weights with trainer.validate(model, train_loader)."
            )
        return at_checkpoint & equal
    if not equal[there].all():
        found = columns["fingerprint"][there & ~equal].unique()
        raise ValueError(
            f"the queries were taken at weights {fingerprint}, the rows of training steps each at their own "
            f"({_few(found)}): use method='tracin' with queries at checkpoints, or write rows at one checkpoint with "
            "trainer.validate(model, train_loader)."
        )
    return there


def _select_by_step(queries: AtCheckpoints, train: RowSource, keep: Tensor, weighted: bool) -> Selected:
    """Select the rows of tracin and the step of the queries that each is compared with."""
    if not queries:
        raise ValueError("there are no queries; tracin takes {step of the checkpoint: queries}.")
    for at in queries.values():
        _check_queries(at, train)
    counts = {step: len(at) for step, at in queries.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every checkpoint needs the same queries in the same order; got {counts} by step.")
    columns = train.metadata()
    _check_one_kind(columns["stage"][keep])
    for at in queries.values():
        _check_preconditioner(at, columns["preconditioner"][keep & (columns["stage"] == _FIT)])
    steps = torch.tensor(sorted(queries))
    if (columns["stage"][keep] == _FIT).any():
        before = torch.searchsorted(steps, columns["step"] - 1, right=True) - 1
        partners = steps[before.clamp(min=0)]
    else:
        partners = columns["step"].long()
        missing = steps[~torch.isin(steps, partners[keep])]
        if len(missing):
            raise ValueError(
                f"there are no rows at step {_few(missing)}, where there are queries; rows are at step "
                f"{_few(partners[keep].unique())}: pass the queries of these steps only."
            )
        keep = keep & torch.isin(partners, steps)
        for step, at in queries.items():
            own = keep & (partners == step)
            _check_same_weights(at, columns["fingerprint"][own], step)
            _check_preconditioner(at, columns["preconditioner"][own])
    return _selected(train, keep, partners[keep], rates=True, weighted=weighted)


def _check_same_weights(queries: SketchedGradients, found: Tensor, step: int) -> None:
    """Refuse rows at a step whose known weights differ from those of the queries at this step."""
    other = found[(found != queries.fingerprint) & (found != 0)].unique()
    if queries.fingerprint and len(other):
        raise ValueError(
            f"at step {step} the queries were taken at weights {queries.fingerprint}, rows at {_few(other)}; use rows "
            "and queries of one run."
        )


def _check_preconditioner(queries: SketchedGradients, found: Tensor) -> None:
    """Refuse rows, given by the ids of their preconditioners, that went through another one than the queries."""
    made = found.unique().tolist()
    if not made:
        return
    own = one_preconditioner(queries)
    if made == [own] or (made == [OF_STEP] and own == NONE):
        return
    if len(made) > 1:
        raise ValueError(
            f"the rows went through {len(made)} different preconditioners ({_few(torch.tensor(made))}; 0 is none, 1 "
            "that of the optimizer at each step); choose with .where(preconditioner=...)."
        )
    what = ["no preconditioner" if id == NONE else f"the preconditioner {id}" for id in (own, made[0])]
    raise ValueError(
        f"the queries went through {what[0]}, the rows through {what[1]}, so that their products mean nothing; make "
        "the queries with store.sketch_gradients(module, batches), which takes that of the rows at its weights (for "
        "rows of training store.where(stage='fit').sketch_gradients), or sketch_gradients(..., preconditioner=...)."
    )


def _check_one_kind(stages: Tensor) -> None:
    """Refuse rows of training steps together with rows at checkpoints."""
    if (stages == _FIT).any() and (stages != _FIT).any():
        raise ValueError(
            "there are rows of training steps and of checkpoints; tracin sums over one kind: select them with "
            ".where(stage='fit'), or with another stage."
        )


def _selected(
    train: RowSource, keep: Tensor, partners: Tensor | None = None, *, rates: bool = False, weighted: bool = False
) -> Selected:
    """Return the rows of a mask, with their learning rates and weights as factors."""
    columns, count = train.metadata(), int(keep.sum())
    factors = torch.ones(count, dtype=torch.float64)
    if rates:
        factors *= columns["lr"][keep]
        unknown = int((~factors.isfinite()).sum())
        if unknown:
            raise ValueError(
                f"tracin weights rows by their learning rate, which is not known for {unknown} of {count} rows; rows "
                "that a GradientSketchWriter writes have it, others need a column 'lr'."
            )
        others = sorted(getattr(train, "optimizers", frozenset()) - {"SGD"})
        whitened = ~torch.isin(columns["preconditioner"][keep], torch.tensor([NONE, OF_STEP]))
        if whitened.any():
            warnings.warn(
                "the rows went through a preconditioner, and their products are influence: tracin sums these, each "
                "times a learning rate, whose scale is that of no step; use method='dot' or 'cosine'.",
                stacklevel=2,
            )
        elif others and not (columns["preconditioner"][keep] == OF_STEP).all():
            warnings.warn(
                f"the rows were trained by {', '.join(others)}: tracin ranks them, but its scale is that of steps "
                "of SGD, lr times the gradient. Rows of training by GradientSketchWriter(preconditioner='optimizer') "
                "have the scale of Adam's steps.",
                stacklevel=2,
            )
    if weighted:
        weight = columns["weight"][keep].double()
        unknown = int((~(weight >= 0)).sum())
        if unknown or not weight.any():
            raise ValueError(
                "weighted=True takes the column 'weight', an example's number of labels or class weight; "
                f"{unknown or count} of {count} rows have none. Write rows with a weight_fn, or add the column, or use "
                "weighted=False."
            )
        factors *= weight / weight.mean()
    return Selected(
        train if keep.all() else train.where(keep),
        keep.nonzero()[:, 0],
        factors,
        torch.zeros(count, dtype=torch.long) if partners is None else partners,
    )


def _few(values: Tensor) -> str:
    """Return the first five values as text."""
    listed = ", ".join(map(str, values[:5].tolist()))
    return listed + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def check_scale(rows: Selected) -> None:
    """Warn if the scale of rows is not known, which scores depend on."""
    known = rows.source.metadata().get("scale_known")
    unknown = 0 if known is None else int((~known).sum())
    if unknown:
        warnings.warn(
            f"{unknown} of {len(rows)} rows were not compared with the gradient of their example alone, so that their "
            "scale, and that of their scores, is not known; use method='cosine' or normalize=True, or write the rows "
            "with the weight_fn of the loss.",
            stacklevel=2,
        )


def split(vectors: Float[Tensor, "*some dim"]) -> tuple[Float[Tensor, "*some dim"], Float[Tensor, " *some"]]:
    """Split vectors into vectors whose largest number is in [1, 2), and their sizes: powers of two; both float64."""
    largest = vectors.double().abs().amax(-1)
    power = (largest.view(torch.int64) & (0x7FF << 52)).view(torch.float64)  # without its mantissa
    size = torch.where(largest > 0, power.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    return vectors.double() / size[..., None], size


def narrowed(values: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows columns"]:
    """Return float64 values as float32, unless the largest of a row is beyond the range of float32."""
    largest = values.abs().nan_to_num(0, 0).amax(-1)
    fits = (largest == 0) | ((largest >= _SINGLE.tiny) & (largest <= _SINGLE.max))
    return values.float() if values.dtype == torch.float64 and fits.all() else values


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors that rows are multiplied by.

    Args:
        exact: Vectors whose largest number is in [1, 2), float64.
        scale: What the products with each vector are multiplied by, float64.
    """

    exact: Float[Tensor, "*dampings queries dim"]
    scale: Float[Tensor, "*dampings queries"]

    @cached_property
    def single(self) -> Float[Tensor, "*dampings queries dim"]:
        """The vectors in float32."""
        return self.exact.float()

    @cached_property
    def moderate(self) -> bool:
        """Whether float32 holds the scale."""
        return _moderate(self.scale)


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of the rows of one source, block by block.

    Args:
        rows: The rows that are scored.
        train: The source that they were selected from.
        queries: The vectors that rows are multiplied by, for each value of `rows.partners`.
        length: rows, (rows, dim) -> the lengths that their scores are divided by, (*dampings, rows), as for cosine.
        halves: Whether `parts` yields the products over the first and the second half of the numbers.
        device: Where rows are multiplied; where they are if None.
    """

    rows: Selected
    train: RowSource
    queries: Mapping[int, Vectors]
    length: Callable[[Tensor], Tensor] | None = None
    halves: bool = False
    device: torch.device | None = None

    def only(self, keep: Bool[Tensor, " rows"]) -> "Scorer":
        """Return the scorer of some of the rows, for which it needs nothing of the others."""
        rows = self.rows
        fields = rows.positions[keep], rows.factors[keep], rows.partners[keep]
        return replace(self, rows=Selected(rows.source.where(keep), *fields))

    def split(self) -> "Iterator[tuple[Scorer, Int[Tensor, ' rows']]]":
        """Yield the scorer of each file of a store or a dataset, and the ids of its rows; it needs no other file."""
        parts, ids = cast(Any, self.rows.source).parts, self.ids
        for number in parts.unique_consecutive():
            own = self.only(parts == number)
            yield Scorer(own.rows, own.rows.source, own.queries, own.length, own.halves), ids[parts == number]

    @property
    def ids(self) -> Int[Tensor, " rows"]:
        """The ids of the rows, see `identify`."""
        return identify(self.train.metadata(), self.rows.positions)[0]

    @property
    def unit(self) -> Unit:
        """What the ids are of."""
        return identify(self.train.metadata(), self.rows.positions)[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scores."""
        return *next(iter(self.queries.values())).scale.shape, len(self.rows)

    def blocks(self, batch_rows: int = 4096) -> Iterator[tuple[slice, Float[Tensor, "*dampings queries rows"]]]:
        """Yield the scores of the rows in order, each block with its positions among the rows.

        Warns:
            UserWarning: as in `parts`.
        """
        for place, found in self.parts(batch_rows):
            yield place, whole(found)

    def parts(self, batch_rows: int = 4096) -> Iterator[tuple[slice, Float[Tensor, "parts *dampings queries rows"]]]:
        """Yield two parts that add up to the scores if `halves`, else the scores as the only part; as `blocks` does.

        Warns:
            UserWarning: at the end, if there were rows of zeros, or rows that are not finite, whose scores are NaN.
        """
        start, seen = 0, Counter[str]()
        blocks = _scaled(self.rows.source, batch_rows)
        for sketches, scale in blocks if self.device is None else _moved(blocks, self.device):
            place = slice(start, start := start + len(sketches))
            factors = self.rows.factors[place]
            if scale is not None and self.length is None:  # lengths have it too
                factors = factors * scale
            yield place, self._scores(sketches, factors, self.rows.partners[place], seen).cpu()
        for what, count in seen.items():
            say_rows(count, len(self.rows), f"that were scored are {what}")

    def on(self, device: torch.device | str | None) -> "Scorer":
        """Return a scorer that multiplies on a device."""
        if device is None:
            return self
        there = torch.device(device)
        queries = {at: Vectors(v.exact.to(there), v.scale.to(there)) for at, v in self.queries.items()}
        return replace(self, queries=queries, device=there)

    def _scores(
        self, sketches: Float[Tensor, "rows dim"], factors: Tensor, partners: Tensor, seen: Counter[str]
    ) -> Tensor:
        """Return the parts of the scores of a block of rows, converted to float32 some rows at a time.

        All of them are converted in the same memory, since memory that was never used before is slow.
        """
        part = max(1, _PART // sketches.shape[1])
        buffer = torch.empty(min(part, len(sketches)), sketches.shape[1], dtype=torch.float32, device=sketches.device)
        factors, found = factors.to(sketches.device), []
        with full_precision(sketches.device):
            for rows, factor, steps in zip(
                sketches.split(part), factors.split(part), partners.split(part), strict=True
            ):
                wide = rows if rows.dtype == buffer.dtype else buffer[: len(rows)].copy_(rows)
                own = list(self.queries) if len(self.queries) == 1 else steps.unique().tolist()
                if len(own) == 1:
                    found.append(self._products(self.queries[own[0]], rows, wide, factor, seen))
                    continue
                each = torch.empty(
                    1 + self.halves, *self.shape[:-1], len(rows), dtype=torch.float64, device=rows.device
                )
                for step in own:
                    at = steps == step
                    each[..., at] = self._products(self.queries[step], rows[at], wide[at], factor[at], seen).double()
                found.append(each)
        return narrowed(torch.cat(found, -1))

    def _products(
        self, vectors: Vectors, rows: Tensor, wide: Float[Tensor, "rows dim"], factor: Tensor, seen: Counter[str]
    ) -> Float[Tensor, "parts *dampings queries rows"]:
        """Return the scores of some rows, which are also given in float32: in float32, or float64 if need be."""
        found = self._multiplied(vectors.single, wide)
        sizes = found.abs().amax(tuple(range(found.ndim - 1)))
        poor = ~((sizes > _SMALL) & (sizes < _LARGE))  # NaN too
        factors = factor if self.length is None else factor / self.length(wide)
        if vectors.moderate and _moderate(factors[..., ~poor]):
            found.mul_(vectors.scale.float()[..., None]).mul_(factors.float()[..., None, :])
        else:
            found = found.double() * (vectors.scale[..., None] * factors[..., None, :])
        if poor.any():
            found = found.double()
            found[..., poor] = self._exact(vectors, rows[poor], factor[poor], seen)
        return found

    def _exact(self, vectors: Vectors, rows: Tensor, factor: Tensor, seen: Counter[str]) -> Tensor:
        """Return the scores of rows of any size, in float64, and count the rows of zeros and those not finite."""
        parts, size = split(rows)
        zero, finite = (parts == 0).all(1), parts.isfinite().all(1)
        for what, count in (("zero", int(zero.sum())), ("not finite; their scores are NaN", int((~finite).sum()))):
            seen.update({what: count} if count else {})
        factors = factor * size if self.length is None else (factor / self.length(parts)).where(~zero, 0)
        return self._multiplied(vectors.exact, parts) * (vectors.scale[..., None] * factors[..., None, :])

    def _multiplied(
        self, vectors: Float[Tensor, "*dampings queries dim"], rows: Float[Tensor, "rows dim"]
    ) -> Float[Tensor, "parts *dampings queries rows"]:
        """Return the products of vectors and rows, or their two parts: the same operations, and one addition."""
        if not self.halves:
            return (vectors @ rows.T)[None]
        halves = zip(vectors.tensor_split(2, -1), rows.tensor_split(2, -1), strict=True)
        return torch.stack([half @ own.T for half, own in halves])


def _scaled(rows: RowSource, batch_rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the sketches of rows as they are stored, and their scales if they lack these."""
    if isinstance(rows, RowStore):
        return rows.scaled_blocks(batch_rows)
    return ((block.sketches, None) for block in rows.blocks(batch_rows))


def _moved(
    blocks: Iterator[tuple[Tensor, Tensor | None]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield sketches on a device, each block read and copied while the one before is multiplied."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch() -> tuple[Tensor, Tensor | None, Any] | None:
        block, scale = next(blocks, (None, None))
        if block is None or stream is None:
            return None if block is None else (block.to(device), scale, None)
        with torch.cuda.stream(stream):
            return block.pin_memory().to(device, non_blocking=True), scale, stream.record_event()

    with ThreadPoolExecutor(1, "copy of rows") as pool:
        following = pool.submit(fetch)
        while (found := following.result()) is not None:
            following = pool.submit(fetch)
            block, scale, copied = found
            if copied is not None:
                torch.cuda.current_stream(device).wait_event(copied)
                block.record_stream(torch.cuda.current_stream(device))
            yield block, scale


def whole(parts: Float[Tensor, "parts *leading rows"]) -> Float[Tensor, "*leading rows"]:
    """Return the sum of parts, without a copy if there is one."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _moderate(values: Tensor) -> bool:
    """Return whether values are zero or neither small nor large for float32."""
    sizes = values.abs()
    return bool(((sizes == 0) | ((sizes > _SMALL) & (sizes < _LARGE))).all())
