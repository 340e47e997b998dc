"""The specification of a store: which sketch, parameters and number type its rows have."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.operators.sketch import Sketch

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StoreSpec:
    """The sketch, the parameters and the number type of a store's rows; runs share a store only if these are equal.

    Args:
        sketch: What `sketch.spec()` returns.
        layout: [name, shape] of each parameter, in the order of the flat vector.
        dtype: Type of the stored sketches: "bfloat16", "float16" (with a scale per row) or "float32".
        normalization: What a row is the gradient of, in words.
        left_out: Trainable parameters that the rows do not cover: their names, each with the reason.
        contribution: Whether batch statistics couple the examples, so that a row is the example's share of the
            gradient of its batch rather than the gradient of the example's own loss.

    Raises:
        ValueError: if `dtype` is unknown, or sketch and layout disagree about the number of parameters.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> spec = StoreSpec(BlockSRHT(12, 4).spec(), [["weight", [3, 4]]], dtype="float32")
    >>> spec.operator
    BlockSRHT(n=12, dim=4, seed=0)
    """

    sketch: Mapping[str, Any]
    layout: list[list[Any]]
    _: KW_ONLY
    dtype: Dtype = "bfloat16"
    normalization: str = "gradient of the mean loss"
    left_out: Mapping[str, str] = field(default_factory=dict)
    contribution: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; use {', '.join(map(repr, DTYPES))}.")
        n = self.parameters.n
        if n != self.sketch["n"]:
            raise ValueError(f"the layout has {n} numbers, the sketch takes n={self.sketch['n']}.")

    def __repr__(self) -> str:
        left_out = f"; {len(self.left_out)} trainable ones left out" if self.left_out else ""
        return (
            f"StoreSpec: {self.dtype} by {self.operator}\n    {self.normalization}"
            f"{', each the share of its example' if self.contribution else ''}\n    {self.parameters}{left_out}"
        )

    @classmethod
    def of(
        cls,
        sketch: Sketch,
        layout: Layout,
        *,
        dtype: Dtype = "bfloat16",
        normalization: str = "gradient of the mean loss",
        left_out: Mapping[str, str] | None = None,
        contribution: bool = False,
    ) -> "StoreSpec":
        """Build the spec of the rows that a sketch makes of gradients in a layout; arguments as in the class."""
        pairs = [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)]
        return cls(
            sketch.spec(),
            pairs,
            dtype=dtype,
            normalization=normalization,
            left_out=left_out or {},
            contribution=contribution,
        )

    @cached_property
    def operator(self) -> Sketch:
        """The sketch as an operator, built from its spec."""
        return make_sketch(**self.sketch)

    @cached_property
    def parameters(self) -> Layout:
        """The layout of the parameters that the rows cover."""
        return Layout(*zip(*((name, torch.Size(shape)) for name, shape in self.layout), strict=True))

    @cached_property
    def id(self) -> str:
        """The hash of the compared fields, which every file of rows carries."""
        return hashlib.sha256(json.dumps(self._compared() | {"format": 1}, sort_keys=True).encode()).hexdigest()

    def check_equal(self, other: "StoreSpec", folder: Path) -> None:
        """Refuse a spec that differs: mixing rows of two sketches would give plausible but wrong scores.

        Raises:
            ValueError: if they differ; the message shows both where they do.
        """
        mine, theirs = self._compared(), other._compared()
        differ = [name for name in mine if mine[name] != theirs[name]]
        if differ:
            both = "".join(
                f"\n  {name}:\n    in the store: {_short(theirs[name], mine[name])}\n"
                f"    asked:        {_short(mine[name], theirs[name])}"
                for name in differ
            )
            raise ValueError(
                f"the store in {folder} has another spec:{both}\nUse another folder, the same settings, or "
                "overwrite=True, which deletes the rows that are there."
            )

    def _compared(self) -> dict[str, Any]:
        """Return the fields to compare; of `left_out` only the names, since a reason may mention the batch size."""
        return {**asdict(self), "left_out": sorted(self.left_out)}


def _short(value: Any, other: Any) -> str:
    """Return a value as text; of a long list only the items that are not in `other`."""
    if isinstance(value, list) and isinstance(other, list) and len(value) > 4:
        only = [item for item in value if item not in other]
        return f"{len(value)} parameters, of which not in the other: {only[:5]}"
    return str(value)
