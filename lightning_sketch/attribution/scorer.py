"""A question made ready: queries multiplied by all that a method needs, so that rows are streamed once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.attribution.curvature import Curvature
from lightning_sketch.attribution.example_ids import example_ids
from lightning_sketch.attribution.influence import Damping, Influence
from lightning_sketch.attribution.row_curvature import row_curvature
from lightning_sketch.attribution.selected import AtCheckpoints, Selected, select
from lightning_sketch.operators.precision import full_precision
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients

METHODS = ("dot", "cosine", "tracin", "influence")
FOLDER = "curvature"
"""Where a store keeps its curvatures."""

PART = 1 << 20
"""Numbers of rows that are widened and multiplied at once: 4 MB in float32."""

Queries = SketchedGradients | AtCheckpoints
CurvatureLike = str | Curvature | Influence


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of the rows of one source, block by block.

    rows      those that take part
    ids       what they are known by
    queries   by partner: what rows are multiplied with
    cosine    whether to divide by the rows' lengths
    """

    rows: Selected
    train: RowSource
    queries: Mapping[int, Float[Tensor, "*dampings queries dim"]]
    cosine: bool = False

    @property
    def ids(self) -> Int[Tensor, " rows"]:
        """Of the rows, as `example_ids` gives them."""
        return example_ids(self.train.metadata(), self.rows.positions)

    def blocks(self, batch_rows: int = 4096) -> Iterator[tuple[slice, Float[Tensor, "*dampings queries rows"]]]:
        """Places among the rows, and their scores, in order."""
        start = 0
        for block in self.rows.source.blocks(batch_rows):
            place = slice(start, start := start + len(block))
            yield place, self._scores(block.sketches, self.rows.weights[place], self.rows.partners[place])

    def _scores(
        self, sketches: Float[Tensor, "rows dim"], weights: Float[Tensor, " rows"], partners: Int[Tensor, " rows"]
    ) -> Float[Tensor, "*dampings queries rows"]:
        """Rows are widened a part at a time, each in the same place: memory never used before is slow."""
        part = max(1, PART // sketches.shape[1])
        room = torch.empty(min(part, len(sketches)), sketches.shape[1], dtype=torch.float32, device=sketches.device)
        found = []
        with full_precision(sketches.device):
            for rows, steps in zip(sketches.split(part), partners.split(part), strict=True):
                wide = rows if rows.dtype == room.dtype else room[: len(rows)].copy_(rows)
                found.append(self._products(wide, steps))
        result = torch.cat(found, -1)
        return result if (weights == 1).all() else result * weights

    def _products(
        self, rows: Float[Tensor, "rows dim"], partners: Int[Tensor, " rows"]
    ) -> Float[Tensor, "*dampings queries rows"]:
        met = list(self.queries) if len(self.queries) == 1 else partners.unique().tolist()
        if len(met) == 1:
            found = self.queries[met[0]] @ rows.T
        else:
            found = torch.empty(*self.queries[met[0]].shape[:-1], len(rows))
            for step in met:
                own = partners == step
                found[..., own] = self.queries[step] @ rows[own].T
        return found / rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny) if self.cosine else found


def scorers(
    queries: Queries | Sequence[Queries],
    train: RowSource | Sequence[RowSource],
    method: str,
    curvature: CurvatureLike | Sequence[CurvatureLike],
    damping: Damping,
) -> list[Scorer]:
    """One for each source of a list, or the only one.

    Raises:
        ValueError: if lists differ in length, the method is unknown or lacks what it needs, or rows do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}.")
    if isinstance(train, RowSource):
        return [_scorer(queries, train, method, curvature, damping)]
    sources = list(train)
    asked = list(queries) if isinstance(queries, list | tuple) else []
    curvatures = list(curvature) if isinstance(curvature, list | tuple) else [curvature] * len(sources)
    if not sources or len(asked) != len(sources) or len(curvatures) != len(sources):
        raise ValueError(
            f"{len(sources)} sources of rows need as many queries and curvatures, in lists: each member's queries are "
            f"taken at its own weights; got {len(asked)} queries and {len(curvatures)} curvatures."
        )
    return [_scorer(q, t, method, c, damping) for q, t, c in zip(asked, sources, curvatures, strict=True)]


def inverse_of(curvature: CurvatureLike, damping: Damping, rows: RowSource, fingerprint: int) -> Influence:
    """The damped inverse that is meant, its damping said; `rows` are what it is made from, or where it is kept.

    Raises:
        ValueError: if it has another dim or other weights than the rows.
        FileNotFoundError: if it is to be read and is not there.
    """
    if isinstance(curvature, Influence):
        if not isinstance(damping, str):
            raise ValueError("damping is given twice: an Influence brings its own; pass its .curvature instead.")
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
    inverse.say()
    return inverse


def curvature_of(curvature: str | Curvature, rows: RowSource, fingerprint: int) -> Curvature:
    """The curvature that is meant; errors as in `inverse_of`."""
    if isinstance(curvature, Curvature):
        return curvature
    if curvature != "ggn":
        return row_curvature(rows, curvature)
    path = getattr(rows, "path", None)
    if not isinstance(path, Path):
        raise ValueError(
            "curvature='ggn' needs the model's outputs, rows do not have them; pass curvature=fit_ggn(module, batches, "
            "sketch, layout), or 'margin', which needs the rows alone."
        )
    return Curvature.load(path / FOLDER, "ggn", fingerprint)


def _scorer(queries: Queries, train: RowSource, method: str, curvature: CurvatureLike, damping: Damping) -> Scorer:
    if isinstance(queries, Mapping) != (method == "tracin"):
        wanted = "{step of the checkpoint: queries}" if method == "tracin" else "queries taken at the rows' weights"
        raise ValueError(f"method={method!r} takes {wanted}, got a {type(queries).__name__}.")
    rows = select(queries, train)
    if isinstance(queries, Mapping):
        return Scorer(rows, train, {step: at.sketches.float() for step, at in queries.items()})
    asked = queries.sketches
    if method == "influence":
        asked = inverse_of(curvature, damping, rows.source, queries.fingerprint)(asked)
    elif method == "cosine":
        asked = torch.nn.functional.normalize(asked.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    return Scorer(rows, train, {0: asked.float()}, cosine=method == "cosine")
