"""How near the scores of a sketch are to those without one, from the two halves of its numbers.

Half of the numbers of a sketch are, times √2, a sketch of half the dim, with the same products in expectation. With a
and b the parts of a score over either half, s = a + b and d = a - b,

    reliability = sqrt(1 - f Var d / Var s),    f = 1 - 1 / C,    variances over the rows, for each query

estimates the correlation of s with the scores t without a sketch: a and b have errors of the same size, independent of
each other, so that Var d is what the errors add to Var s. If r is the correlation of a and b, 1 - Var d / Var s is
2 r / (1 + r), the formula of Spearman and Brown, and its root the correlation with the truth. It is 0 where the halves
contradict each other.

C is the number of chunks of a Block SRHT whose dim is a power of two: products within a chunk have no error in s, as
a rotation keeps them, but opposite ones in a and b; these are 1 / C of all errors if chunks have the same energy, and
more, so that the estimate is low, if a few have most of it. Other sketches have f = 1.

It is the correlation with exact *scores*, which is no promise about what scores are good for. On a GPT of 90,432
parameters it says .86 and .96 for dim 1024 and 4096 of plain gradients, .55 and .80 of gradients whitened by EK-FAC,
whose products are spread over more directions and predict retraining better all the same. An example that is both query
and row has a product with itself that outweighs all others and raises the estimate.

Other kinds are refused, since their halves are not such sketches: half of the numbers of a CountSketch see half of the
parameters (measured: the estimate is up to .08 too low), the numbers of QK, FFD and AFFD have errors in common (up to
.2 too high), those of AFJL opposite ones (up to .12 too low). So is a Block SRHT of two chunks or fewer whose dim is no
power of two. Under `influence` each half would have a curvature of its own.

Source: Brown (1910) and Spearman (1910), British Journal of Psychology 3, for halves; Rulon (1939), "A simplified
procedure for determining the reliability of a test by split-halves", Harvard Educational Review 9, for the difference.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.attribution._scorer import split
from lightning_sketch.attribution._selected import scorable
from lightning_sketch.attribution.curvature import log_once
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store.sketched_gradients import STAGES, RowSource

HALVES = ("block_srht", "fjl", "gaussian")  # kinds whose halves are two sketches with errors of their own
_LEAST = 30  # rows; the correlation over fewer tells little
_LOW, _GOOD = 0.8, 0.9
_QUERIES, _ROWS = 200, 2000  # how many of the rows `suggest_dim` takes
_AT_ONCE = 1 << 16  # scores that are compared at once: they stay in the cache


class SplitHalf:
    """Accumulates the two parts of scores into their reliability.

    Args:
        sketches: The sketches of the rows, those of several members if the scores are means over these; none if the
            parts are not halves.
    """

    def __init__(self, sketches: Sequence[Sketch]):
        self.sketches = sketches if all(map(_has_halves, sketches)) else ()
        self._rows, self._moments, self._center = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, parts: Float[Tensor, "parts *queries rows"]) -> None:
        """Add the parts of the scores of more rows; those that are not finite are left out."""
        if not self.sketches:
            return
        if not self._center.ndim:  # near the mean, so that float32 holds what is squared
            first = parts.double().nan_to_num(0, 0, 0).mean(-1)
            self._center = torch.stack([first.sum(0), first[0] - first[1]])
        at_once = max(1, _AT_ONCE // parts.shape[-1])
        pieces = zip(parts.split(at_once, 1), self._center.split(at_once, 1), strict=True)
        found = [_moments(piece[0], piece[1], center) for piece, center in pieces]
        rows, moments = zip(*found, strict=True)
        self._rows, self._moments = self._rows + torch.cat(rows), self._moments + torch.cat(moments, -1)

    def merge(self, other: "SplitHalf") -> None:
        """Add the rows of another one, whose sums are about another center."""
        if not self._center.ndim:
            self._rows, self._moments, self._center = other._rows, other._moments, other._center
        elif other._center.ndim:
            moved = other._center - self._center
            sums, squares = other._moments
            squares = squares + 2 * moved * sums + other._rows * moved.square()
            self._moments = self._moments + torch.stack([sums + other._rows * moved, squares])
            self._rows = self._rows + other._rows

    def reliability(self) -> Float[Tensor, " queries"] | None:
        """Return the reliability of each query's scores, NaN if these do not vary; None if it cannot be estimated."""
        if not self._center.ndim or not (self._rows >= _LEAST).all():
            return None
        kept = min(map(_kept, self.sketches))
        return (1 - (1 - kept) * self.ratio).clamp(min=0).sqrt().float()

    @property
    def ratio(self) -> Float[Tensor, " queries"]:
        """Var d / Var s for each query, NaN if its scores do not vary."""
        mean, square = self._moments / self._rows
        whole, difference = (square - mean.square()).clamp(min=0)
        return difference / whole

    def known(self) -> Float[Tensor, " queries"]:
        """Return the reliability.

        Raises:
            ValueError: if it cannot be estimated.
        """
        found = self.reliability()
        if found is not None:
            return found
        if not self.sketches:
            raise ValueError(
                "reliability compares the halves of the numbers of a sketch, which are two sketches for the kinds "
                f"{', '.join(HALVES)}, and for the methods dot, cosine and tracin; it is not known for these rows. "
                "Compare scores with those of a larger dim on some of the rows."
            )
        raise ValueError(f"reliability needs {_LEAST} rows with finite scores, got {int(self._rows.min())}.")

    def __str__(self) -> str:
        found = self.reliability()
        known = torch.zeros(0) if found is None else found[found.isfinite()]
        if not len(known):
            return ""
        mean, sketch = float(known.mean()), self.sketches[0]
        said = f"scores at dim {sketch.dim} are {mean:.2f} of exact"
        if mean >= _LOW:
            return said
        dim = _dim_for(self.ratio, sketch, _GOOD)
        advice = "write rows of a larger dim" if dim is None else f"use dim >= {dim} for {_GOOD}"
        return f"{said} (correlation, by the halves of the sketch): {advice}"

    def warn(self) -> None:
        """Log, once, that the reliability is low: it is an estimate, and no reason to stop a program."""
        said = str(self)
        if ":" in said:
            log_once(said, logging.WARNING)


def _moments(
    one: Float[Tensor, "queries rows"], other: Float[Tensor, "queries rows"], center: Float[Tensor, "2 queries"]
) -> tuple[Float[Tensor, " queries"], Float[Tensor, "2 2 queries"]]:
    """Return the number of finite scores, and the sums of s, d and their squares, about a center."""
    centered = torch.stack([one + other, one - other]).sub_(center[..., None])
    rows, sums = torch.full_like(one[:, 0], one.shape[1]), torch.stack([centered.sum(-1), centered.square().sum(-1)])
    if not sums.isfinite().all():
        known = centered.isfinite().all(0)
        centered = centered.double().where(known, 0)
        rows, sums = known.sum(-1), torch.stack([centered.sum(-1), centered.square().sum(-1)])
    return rows.double(), sums.double()


def suggest_dim(rows: RowSource, *, reliability: float = _GOOD) -> int:
    """Suggest the dim at which dot products of gradients like these are near to exact.

    The rows are compared among themselves, without the product of a row with itself. With `reliability² = T / (T + N)`
    at their dim, the part N, the error of the sketch, falls as 1 / dim.

    Args:
        rows: Sketched gradients of 30 rows or more, of a small dim: a store, or what `sketch_gradients` returns. Of a
            store with several checkpoints the rows of the last are taken; of many rows 2,000.
        reliability: The wanted correlation of scores with those without a sketch, between 0 and 1.

    Returns:
        The smallest power of two that reaches it, at most the number of parameters.

    Raises:
        ValueError: if `reliability` is not between 0 and 1, there are fewer than 30 rows, the kind of sketch is none
            whose halves are sketches, or the dim is so small that its scores are all error.

    Cost: the products of 200 rows with 2,000.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> from lightning_sketch.store.sketched_gradients import SketchedGradients
    >>> sketch = BlockSRHT(n=100_000, dim=1024)
    >>> gradients = torch.randn(100, 40) @ torch.randn(40, 100_000)  # of 40 dimensions
    >>> suggest_dim(SketchedGradients(sketch.matvec(gradients), sketch), reliability=0.95)
    512
    """
    if not 0 < reliability < 1:
        raise ValueError(f"reliability is a correlation between 0 and 1, got {reliability}; 0.9 is usual.")
    sketch, some = rows.sketch, _some(rows)
    places = torch.arange(0, len(some), math.ceil(len(some) / _QUERIES))
    pairs = zip(some[places].tensor_split(2, 1), some.tensor_split(2, 1), strict=True)
    parts = torch.stack([queries @ half.T for queries, half in pairs])
    parts[:, torch.arange(len(places)), places] = float("nan")
    halves = SplitHalf([sketch] if sketch.kind in HALVES else [])
    halves.add(parts)
    halves.known()
    dim = _dim_for(halves.ratio, sketch, reliability)
    if dim is None:
        raise ValueError(
            f"scores of these rows at dim {sketch.dim} are all error, so that nothing can be said about larger dims; "
            f"take the gradients of some examples at dim {4 * sketch.dim}, and ask again."
        )
    return dim


def _some(rows: RowSource) -> Float[Tensor, "rows dim"]:
    """Return evenly spaced rows of the last checkpoint, or of the training steps, each at a moderate scale."""
    columns = rows.metadata()
    keep = scorable(columns)
    at_checkpoint = keep & (columns["stage"] != STAGES.index("fit"))
    if at_checkpoint.any():
        keep = at_checkpoint & (columns["fingerprint"] == columns["fingerprint"][at_checkpoint][-1])
    (there,) = keep.nonzero(as_tuple=True)
    chosen = torch.zeros_like(keep)
    chosen[there[:: math.ceil(len(there) / _ROWS)]] = True
    found = torch.cat([block.sketches.cpu() for block in rows.where(chosen).blocks()])
    _, size = split(found)
    return found.double() / size.max()


def _has_halves(sketch: Sketch) -> bool:
    """Return whether the halves of a sketch are sketches: not those of few chunks of a dim that is no power of two."""
    return sketch.kind != "block_srht" or sketch.dim.bit_count() == 1 or sketch.n > 2 * sketch.dim


def _kept(sketch: Sketch) -> float:
    """Return the share of products that lie within a chunk and have no error, 1 / C."""
    rotates = sketch.kind == "block_srht" and sketch.dim == sketch.width
    return 1 / math.ceil(sketch.n / sketch.dim) if rotates else 0.0


def _dim_for(ratio: Float[Tensor, " queries"], sketch: Sketch, reliability: float) -> int | None:
    """Return the dim that has a reliability, by Var d / Var s at the dim of a sketch; None if there is no signal."""
    error = float(ratio[ratio.isfinite()].mean())
    signal = 1 - (1 - _kept(sketch)) * error
    for dim in (1 << power for power in range(sketch.n.bit_length())):
        noise = error * (1 - _kept(replace(sketch, dim=dim))) * sketch.dim / dim
        if signal > 0 and signal / (signal + noise) >= reliability**2:
            return dim
    return sketch.n if signal > 0 else None
