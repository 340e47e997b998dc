"""Selects the rows that queries are compared with: those that were taken at the weights of the queries.

    dot, cosine, influence   rows of validate, test and predict: those with the queries' fingerprint
                             rows of fit, if there are no others: all of them must have it
    tracin                   rows of validate, test and predict: those at a step that has queries
                             rows of fit: all of them, each with the latest queries at or before its weights

Duplicates that a sampler added (padded), rows that are not finite, and stored queries are never scored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sketch.store.sketched_gradients import STAGES, UNKNOWN_ID, RowSource, SketchedGradients, Strings, keys_of

# Queries by the optimizer step of the weights at which they were taken.
AtCheckpoints = Mapping[int, SketchedGradients]

# The column by which scores are summed.
Group = Literal["example_id"]

_FIT, _QUERIES = STAGES.index("fit"), STAGES.index("queries")


@dataclass(frozen=True, eq=False)
class Selected:
    """The rows that are scored.

    Args:
        source: The rows themselves.
        positions: The position of each row in the source that was passed.
        weights: The learning rate of each row for tracin, else ones.
        partners: The step of the queries that each row is compared with for tracin, else zeros.
    """

    source: RowSource
    positions: Int[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    partners: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.positions)


def scorable(columns: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
    """Return a mask of the rows that are finite, no duplicates, and no stored queries.

    Raises:
        ValueError: if there are none.
    """
    keep = columns["finite"] & ~columns["padded"] & (columns["stage"] != _QUERIES)
    if not len(keep):
        raise ValueError("there are no rows to score: the selection is empty, or nothing was written.")
    if not keep.any():
        raise ValueError(
            f"none of the {len(keep)} rows can be scored: all are non-finite, duplicates or stored queries; check the "
            "columns 'finite', 'padded' and 'stage' of .metadata()."
        )
    return keep


def select(queries: SketchedGradients | AtCheckpoints, train: RowSource) -> Selected:
    """Select the rows that the queries can be compared with; for queries by checkpoint those of tracin.

    Raises:
        ValueError: if there are none, if sketches or weights differ, or if it is not clear which rows are meant.
    """
    if isinstance(queries, Mapping):
        return _select_by_step(queries, train)
    check_queries(queries, train)
    return _selected(train, _at_weights(queries.fingerprint, train.metadata()))


def select_all(train: RowSource, rates: bool) -> Selected:
    """Select all rows that can be scored, at any weights, with their learning rates if `rates`, else with ones.

    Raises:
        ValueError: if there are none, or a learning rate is unknown.
    """
    columns = train.metadata()
    keep = scorable(columns)
    if not rates:
        return _selected(train, keep)
    _check_one_kind(columns["stage"][keep])
    _check_lr(columns["lr"][keep])
    return _selected(train, keep, columns["lr"][keep])


def one_fingerprint(columns: Mapping[str, Any]) -> int:
    """Return the fingerprint of the weights at which all rows were taken.

    Raises:
        ValueError: if they were taken at different weights.
    """
    found = columns["fingerprint"][scorable(columns)].unique().tolist()
    if len(found) != 1:
        raise ValueError(
            f"the rows were taken at {len(found)} different weights; choose with "
            ".where(stage=...) or .where(fingerprint=...)."
        )
    return int(found[0])


def check_queries(queries: SketchedGradients, train: RowSource) -> None:
    """Refuse queries of another sketch, queries that are not finite, and an empty table of queries.

    Raises:
        ValueError: if they are one of these.
    """
    if queries.sketch != train.sketch:
        raise ValueError(
            f"queries were made by {queries.sketch}, rows by {train.sketch}; make the queries with the rows' own "
            "sketch: sketch_gradients(module, batches, train.sketch)."
        )
    bad = int((~queries.finite).sum())
    if bad:
        raise ValueError(f"{bad} of {len(queries)} queries are not finite; drop them: queries.where(finite=True).")
    if not len(queries):
        raise ValueError("there are no queries; pass at least one row.")


def _at_weights(fingerprint: int, columns: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
    """Return a mask of the scorable rows at the queries' weights: of checkpoints, or else of training steps."""
    there = scorable(columns)
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


def _select_by_step(queries: AtCheckpoints, train: RowSource) -> Selected:
    """Select the rows of tracin and the step of the queries that each is compared with."""
    if not queries:
        raise ValueError("there are no queries; tracin takes {step of the checkpoint: queries}.")
    for at in queries.values():
        check_queries(at, train)
    counts = {step: len(at) for step, at in queries.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every checkpoint needs the same queries in the same order; got {counts} by step.")
    columns = train.metadata()
    keep = scorable(columns)
    _check_one_kind(columns["stage"][keep])
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
            _check_same_weights(at, columns["fingerprint"][keep & (partners == step)], step)
    lr = columns["lr"][keep]
    _check_lr(lr)
    return _selected(train, keep, lr, partners[keep])


def _check_same_weights(queries: SketchedGradients, found: Tensor, step: int) -> None:
    """Refuse rows at a step whose known weights differ from those of the queries at this step."""
    other = found[(found != queries.fingerprint) & (found != 0)].unique()
    if queries.fingerprint and len(other):
        raise ValueError(
            f"at step {step} the queries were taken at weights {queries.fingerprint}, rows at {_few(other)}; use rows "
            "and queries of one run."
        )


def _check_one_kind(stages: Tensor) -> None:
    """Refuse rows of training steps together with rows at checkpoints."""
    if (stages == _FIT).any() and (stages != _FIT).any():
        raise ValueError(
            "there are rows of training steps and of checkpoints; tracin sums over one kind: select them with "
            ".where(stage='fit'), or with another stage."
        )


def _check_lr(lr: Tensor) -> None:
    """Refuse learning rates that are unknown."""
    unknown = int(lr.isnan().sum())
    if unknown:
        raise ValueError(
            f"tracin weights rows by their learning rate, which is not known for {unknown} of {len(lr)} rows; rows "
            "that a GradientSketchWriter writes have it, others need a column 'lr'."
        )


def _selected(
    train: RowSource, keep: Tensor, weights: Tensor | None = None, partners: Tensor | None = None
) -> Selected:
    """Return the rows of a mask with their weights, ones if None, and partners, zeros if None."""
    count = int(keep.sum())
    return Selected(
        train if keep.all() else train.where(keep),
        keep.nonzero()[:, 0],
        torch.ones(count) if weights is None else weights.float(),
        torch.zeros(count, dtype=torch.long) if partners is None else partners,
    )


def _few(values: Tensor) -> str:
    """Return the first five values as text."""
    listed = ", ".join(map(str, values[:5].tolist()))
    return listed + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def as_given(ids: Tensor, sources: Iterable[RowSource]) -> Any:
    """Return ids as they were given: those of strings as strings, in lists of the same shape."""
    given = [source.metadata()["example_id"] for source in sources]
    tables = [table for column in given if isinstance(column, Strings) for table in column.tables]
    named = Strings(ids, tables)
    return named.tolist() if tables and named.names.keys() >= set(ids.flatten().tolist()) else ids  # else steps


def example_ids(columns: Mapping[str, Any], positions: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Return the ids of the rows at these positions, hashes if they are strings; of rows without, the step or position.

    Raises:
        ValueError: if some rows have ids and others do not.
    """
    ids = keys_of(columns["example_id"])[positions].long()
    unknown = ids == UNKNOWN_ID
    if not unknown.any():
        return ids
    if not unknown.all():
        raise ValueError(
            f"{int(unknown.sum())} of {len(ids)} rows have no example_id, the others have one; select rows "
            "with .where(mask), or write them with an index_key."
        )
    steps = (columns["stage"][positions] == STAGES.index("fit")).all()
    return columns["step"][positions].long() if steps else positions


def sum_by_id(
    values: Float[Tensor, "*leading rows"], ids: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "*leading ids"], Int[Tensor, " ids"]]:
    """Sum values of equal id along the last axis; return the sums and the ids, in rising order.

    >>> import torch
    >>> sum_by_id(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 5, 7]))
    (tensor([2., 4.]), tensor([5, 7]))
    """
    unique, inverse = ids.unique(return_inverse=True)
    return values.new_zeros(*values.shape[:-1], len(unique)).index_add_(-1, inverse, values), unique


def check_group(group: Group | None) -> None:
    """Refuse an unknown group."""
    if group not in (None, *get_args(Group)):
        raise ValueError(f"group={group!r} is not known; 'example_id' sums over rows of one example, None does not.")
