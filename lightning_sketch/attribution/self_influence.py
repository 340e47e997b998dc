"""Self-influence: how much training on an example lowers its own loss. It is large for examples with a wrong label.

dot          |g|²
tracin       sum over an example's rows of lr |g|²
influence    gᵀ (A + lambda I)⁻¹ g
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.attribution._row_selection import as_given, example_ids, one_fingerprint, select_all, sum_by_id
from lightning_sketch.attribution.influence import Damping
from lightning_sketch.attribution.scores import CurvatureLike, inverse_of
from lightning_sketch.store.sketched_gradients import RowSource

SelfMethod = Literal["dot", "tracin", "influence"]


class SelfInfluence(NamedTuple):
    """The self-influence of each row, or for tracin of each example.

    Attributes:
        scores: The self-influence, float32, (rows,).
        example_ids: The ids, int64, (rows,), or a list of names; of rows without ids the step of a training step, else
            the position.
    """

    scores: Float[Tensor, " rows"]
    example_ids: Any

    def __repr__(self) -> str:
        largest = self.scores.argsort(descending=True)[:5]
        named = isinstance(self.example_ids, list)
        ids = [self.example_ids[i] if named else int(self.example_ids[i]) for i in largest.tolist()]
        pairs = zip(ids, self.scores[largest].tolist(), strict=True)
        listed = ", ".join(f"{example} ({score:.3g})" for example, score in pairs)
        return f"SelfInfluence of {len(self.scores)}, largest: {listed}"


def self_influence(
    train: RowSource,
    *,
    method: SelfMethod = "tracin",
    curvature: CurvatureLike = "ggn",
    damping: Damping = "auto",
    batch_rows: int = 4096,
) -> SelfInfluence:
    """Compute the influence of each example on its own loss.

    Args:
        train: The rows; for tracin at several checkpoints or steps, with their learning rates.
        method: "tracin", "influence" or "dot".
        curvature: The curvature for influence, as in `scores`.
        damping: The damping for influence, "auto" or one number.
        batch_rows: Most rows in memory at a time.

    Returns:
        `SelfInfluence(scores, example_ids)`, both (rows,); for tracin the ids are in rising order, each once.

    Raises:
        ValueError: if the method is unknown, or the rows lack what it needs: learning rates for tracin, else one
            set of weights.

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
    columns = train.metadata()
    rows = select_all(train, rates=method == "tracin")
    inverse = None
    if method != "tracin":
        fingerprint = one_fingerprint(columns)
    if method == "influence":
        inverse = inverse_of(curvature, damping, rows.source, fingerprint)
        if isinstance(inverse.damping, tuple):
            raise ValueError("self_influence takes one damping, got several; call it for each.")
    parts = []
    for block in rows.source.blocks(batch_rows):
        g = block.sketches.double()
        parts.append((g * (g if inverse is None else inverse(g))).sum(1).float())
    found, ids = torch.cat(parts) * rows.weights, example_ids(columns, rows.positions)
    if method == "tracin":
        found, ids = sum_by_id(found, ids)
    return SelfInfluence(found, as_given(ids, [train]))
