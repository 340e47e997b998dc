"""The curvature made from the rows themselves, each times a number that depends on the probability of its true label.

    margin   g sqrt(p / (1 - p))        fisher   g        trak   g / (1 - p)

Since g = -(1 - p) S (gradient of the margin log p/(1-p)), "margin" is the gradient of the margin times sqrt(p (1 - p)),
which for two classes is the Gauss-Newton row, and "trak" is the gradient of the margin itself. Both hold for any loss
-log p: a document whose loss is a mean over tokens has p = exp(-loss), the geometric mean of its tokens' probabilities.

Source: Park et al. (2023), "TRAK: Attributing model behavior at scale", arXiv:2303.14186, section 3.
"""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch.attribution._selected import one_fingerprint, one_preconditioner, scorable
from lightning_sketch.attribution.curvature import Curvature, CurvatureSum, RowKind
from lightning_sketch.store.sketched_gradients import RowSource

_CERTAIN = 1 - 1e-6


def row_curvature(
    train: RowSource, kind: RowKind = "margin", *, batch_rows: int = 4096, single: bool = False
) -> Curvature:
    """Compute the curvature from the rows, in one pass over them.

    Args:
        train: The rows, one per example, all at the same weights.
        kind: "margin", the best of them; "fisher"; or "trak". The module has their formulas.
        batch_rows: Most rows in memory at a time.
        single: Whether to multiply in float32, in a third of the time, and to sum in float64: enough for the automatic
            damping, and what `scores` does for it.

    Raises:
        ValueError: if the kind is unknown, if weights differ, or if the probability of the true label, which "margin"
            and "trak" need, is unknown for a row.

    Cost: O(rows dim²) operations.

    >>> from lightning_sketch.store.sketched_gradients import SketchedGradients
    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = SketchedGradients(torch.eye(2), BlockSRHT(9, 2), {"prob_true": torch.tensor([0.5, 0.8])})
    >>> row_curvature(rows, "margin").dense()
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    if kind not in get_args(RowKind):
        raise ValueError(
            f"curvature={kind!r} cannot be made from rows; {', '.join(get_args(RowKind))} can, and 'ggn' is made "
            "by store.fit_curvature(module, batches) or fit_ggn(module, batches, sketch, layout)."
        )
    keep = scorable(train.metadata())
    rows = train if keep.all() else train.where(keep)
    fingerprint, preconditioner = one_fingerprint(rows), one_preconditioner(rows)
    _check_probabilities(rows.metadata()["prob_true"], kind)
    total = CurvatureSum(rows.sketch.dim, single)
    for block in rows.blocks(whole_number(batch_rows, "batch_rows")):
        weights = _row_weights(block.prob_true, kind)[:, None]
        narrow = single and kind == "fisher" and block.sketches.dtype.itemsize < 8
        sketches = block.sketches.to(torch.float32 if narrow else torch.float64)
        total.add((sketches if kind == "fisher" else sketches * weights)[:, None])
    return total.curvature(kind, fingerprint, preconditioner)


def _row_weights(prob_true: Float[Tensor, " rows"], kind: RowKind) -> Float[Tensor, " rows"]:
    """Return the factor that scales each row in this kind of curvature, from the probability p of its true label.

    p is clamped to 1 - 1e-6, where the factor would be infinite.
    """
    p = prob_true.double().clamp(max=_CERTAIN)
    if kind == "margin":
        return (p / (1 - p)).sqrt()
    return torch.ones_like(p) if kind == "fisher" else 1 / (1 - p)


def _check_probabilities(prob_true: Float[Tensor, " rows"], kind: RowKind) -> None:
    """Refuse probabilities that are unknown or none, where the kind needs them."""
    if kind == "fisher":
        return
    unknown, wrong = int(prob_true.isnan().sum()), int(((prob_true < 0) | (prob_true > 1)).sum())
    if unknown:
        raise ValueError(
            f"curvature={kind!r} needs the probability of the true label, which {unknown} of {len(prob_true)} rows "
            "lack; make the rows with row_fn=lambda module, batch: (loss, prob_true) per example, where prob_true is "
            "exp(-loss), for documents too if the loss is a mean over tokens; or use curvature='fisher' or 'ggn'."
        )
    if wrong:
        raise ValueError(f"prob_true is a probability; {wrong} of {len(prob_true)} rows have it outside [0, 1].")
