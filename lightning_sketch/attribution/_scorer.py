"""Computes the products of queries with the rows that are selected for them, block by block.

    score = (v . g) scale factor,    v: vector of the query, |v|_inf in [1, 2);    g: row;    factor: see `Scorer`

Products are in float32 where it holds them, else in float64 with g divided by its size, so that gradients of any norm
have right scores.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sketch.attribution._selected import Selected, Unit, identify
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.store.row_store import RowStore
from lightning_sketch.store.sketched_gradients import RowSource, say_rows

_PART = 1 << 20  # numbers of rows that are converted and multiplied at once: 4 MB in float32
_SMALL, _LARGE = 1e-12, 1e12  # float32 holds the product of three numbers in between, and their squares
_SINGLE = torch.finfo(torch.float32)


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

    def split(self, most: int) -> Iterator[tuple[Selected, Int[Tensor, " rows"]]]:
        """Yield the rows of some parts of a store or a dataset, at most so many or of one part, and their ids."""
        rows, ids, source = self.rows, self.ids, cast(Any, self.rows.source)
        start = stop = 0
        for end in [*source.parts.unique_consecutive(return_counts=True)[1].cumsum(0).tolist(), None]:
            if stop > start and (end is None or end - start > most):
                own, start = slice(start, stop), stop
                fields = (x[own].clone() for x in (rows.positions, rows.factors, rows.partners, ids))
                positions, factors, partners, own_ids = fields
                yield Selected(source.part(own), positions, factors, partners), own_ids
            stop = end

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
        try:
            there = torch.device(device)
            torch.empty(0, device=there).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device={device!r} cannot be used here: {error}; leave it out for the CPU.") from error
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
