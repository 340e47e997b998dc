"""Selects the rows that queries are compared with.

    dot, cosine, influence   rows of validate, test and predict: those with the queries' fingerprint
                             rows of fit, if there are no others: all of them must have it
    tracin                   rows of validate, test and predict: those at a step that has queries
                             rows of fit: all of them, each with the latest queries at or before its weights

Duplicates that a sampler added (padded), rows that are not finite, and stored queries are never scored. Of several rows
of one example at a checkpoint (same id, loader, stage and known fingerprint) the last is scored.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sketch.autodiff.fingerprint import short
from lightning_sketch.store.index import equal_rows
from lightning_sketch.store.sketched_gradients import (
    NONE,
    OF_STEP,
    STAGES,
    UNKNOWN_ID,
    RowSource,
    SketchedGradients,
    keys_of,
)

AtCheckpoints = Mapping[int, SketchedGradients]  # queries by the optimizer step of their weights
Queries = SketchedGradients | AtCheckpoints
Unit = Literal["example", "step", "row"]

_FIT, _QUERIES = STAGES.index("fit"), STAGES.index("queries")


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
            f"the rows went through {len(found)} different preconditioners ({', '.join(map(str, found[:5]))}, 0 is "
            "none); choose with .where(preconditioner=...)."
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
                f"the queries were taken at weights {short(fingerprint)}, the rows at {_few(found)}; load the "
                "checkpoint that the rows were taken at, or write rows at these weights with "
                "trainer.validate(model, train_loader)."
            )
        return at_checkpoint & equal
    if not equal[there].all():
        found = columns["fingerprint"][there & ~equal].unique()
        raise ValueError(
            f"the queries were taken at weights {short(fingerprint)}, the rows of training steps each at their own "
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
        there = columns["stage"] == _FIT  # rows that are not finite have known weights too
        for step, at in queries.items():
            _check_step(at, columns["fingerprint"][there], columns["step"][there] - 1, step)
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


def _check_step(queries: SketchedGradients, found: Tensor, steps: Tensor, step: int) -> None:
    """Refuse queries at a step whose weights are those of another step, if weights are known to change between both.

    Weights that no row has prove nothing: a batch norm has seen one batch more when the row of a step is taken.
    """
    same = torch.isin(found, queries.columns["fingerprint"].unique()) & (found != 0)
    if not same.any() or (same & (steps == step)).any():
        return
    near = int(steps[same][(steps[same] - step).abs().argmin()])
    between = (steps >= min(near, step)) & (steps <= max(near, step)) & (found != 0)
    if not same[between].all():
        raise ValueError(
            f"the queries of step {step} were taken at the weights of step {near}, as rows of training show; pass "
            f"{{{near}: queries}}, or make them at the checkpoint of step {step}."
        )


def _check_same_weights(queries: SketchedGradients, found: Tensor, step: int) -> None:
    """Refuse rows at a step whose known weights differ from those of the queries at this step."""
    other = found[(found != queries.fingerprint) & (found != 0)].unique()
    if queries.fingerprint and len(other):
        raise ValueError(
            f"at step {step} the queries were taken at weights {short(queries.fingerprint)}, rows at {_few(other)}; "
            "use rows and queries of one run."
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
                "of SGD, lr times the gradient. In Lightning, rows of training by "
                "GradientSketchWriter(preconditioner='optimizer') have the scale of Adam's steps.",
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
    """Return the first five numbers or fingerprints as text."""
    listed = ", ".join(map(short, values[:5].tolist()))
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
