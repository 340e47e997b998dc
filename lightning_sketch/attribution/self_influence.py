"""Self-influence: how much training on an example lowers its own loss. It is large for examples with a wrong label.

dot          |g|²
tracin       sum over an example's rows of lr |g|²
influence    gᵀ (A + lambda I)⁻¹ g
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch.attribution._scorer import narrowed, split
from lightning_sketch.attribution._selected import Unit, check_scale, identify, one_fingerprint, select_all
from lightning_sketch.attribution.curvature import Damping
from lightning_sketch.attribution.scores import CurvatureLike, as_given, check_train, inverse_of, sum_by_id
from lightning_sketch.store.sketched_gradients import RowSource

SelfMethod = Literal["dot", "tracin", "influence"]


class _SelfInfluence(NamedTuple):
    scores: Float[Tensor, " rows"]
    example_ids: Any


class SelfInfluence(_SelfInfluence):
    """The self-influence of each row, or for tracin of each example or step.

    Attributes:
        scores: The self-influence, (rows,).
        example_ids: The ids, int64, (rows,), or a list of names; of rows without ids the step of a training step, else
            the position.
        unit: What the ids are of: "example", "step" or "row".
    """

    unit: Unit = "example"

    def __repr__(self) -> str:
        largest = self.scores.argsort(descending=True)[:5]
        named = isinstance(self.example_ids, list)
        ids = [self.example_ids[i] if named else int(self.example_ids[i]) for i in largest.tolist()]
        pairs = zip(ids, self.scores[largest].tolist(), strict=True)
        listed = ", ".join(f"{example} ({score:.3g})" for example, score in pairs)
        unit = "" if self.unit == "example" else f" {self.unit}s"
        return f"SelfInfluence of {len(self.scores)}{unit}, largest: {listed}"


def self_influence(
    train: RowSource,
    *,
    method: SelfMethod = "tracin",
    curvature: CurvatureLike = "ggn",
    damping: Damping = "auto",
    batch_rows: int = 4096,
) -> SelfInfluence:
    """Compute the influence of each example on its own loss; of rows of whole steps, that of each step.

    Args:
        train: The rows; for tracin at several checkpoints or steps, with their learning rates.
        method: "tracin", "influence" or "dot".
        curvature: The curvature for influence, as in `scores`.
        damping: The damping for influence, "auto" or one number.
        batch_rows: Most rows in memory at a time.

    Returns:
        `SelfInfluence(scores, example_ids)`, both (rows,); for tracin the ids are in rising order, each once. In
        float32; float64 if the largest score is beyond its range.

    Raises:
        ValueError: if the method is unknown, or the rows lack what it needs: learning rates for tracin, else one
            set of weights.

    Warns:
        UserWarning: as in `scores`.

    Cost: one pass over the rows, O(rows dim); O(rows dim²) for influence.

    >>> from lightning_sketch.store.sketched_gradients import SketchedGradients
    >>> from lightning_sketch.operators import BlockSRHT
    >>> columns = {"lr": torch.full((3,), 0.5), "example_id": torch.tensor([4, 5, 4])}
    >>> rows = SketchedGradients(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 4.0]]), BlockSRHT(9, 2), columns)
    >>> self_influence(rows)
    SelfInfluence of 2, largest: 4 (10), 5 (2)
    """
    if method not in get_args(SelfMethod):
        raise ValueError(f"method={method!r} has no self-influence; use one of {', '.join(get_args(SelfMethod))}.")
    check_train(train)
    batch_rows = whole_number(batch_rows, "batch_rows")
    rows = select_all(train, rates=method == "tracin")
    check_scale(rows)
    inverse = None
    if method != "tracin":
        fingerprint = one_fingerprint(rows.source)
    if method == "influence":
        inverse = inverse_of(curvature, damping, rows.source, fingerprint)
        if isinstance(inverse.damping, tuple):
            raise ValueError("self_influence takes one damping, got several; call it for each.")
    parts = []
    for block in rows.source.blocks(batch_rows):
        g, size = split(block.sketches)
        parts.append((g * (g if inverse is None else inverse(g))).sum(1) * size * size)
    (ids, unit), found = identify(train.metadata(), rows.positions), torch.cat(parts) * rows.factors
    if method == "tracin":
        found, ids = sum_by_id(found, ids)
    result = SelfInfluence(narrowed(found), as_given(ids, [train]))
    result.unit = unit
    return result
