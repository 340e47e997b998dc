"""What the rows of a store are, written once and compared ever after."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_sketch._files import write_once
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.operators.sketch import Sketch

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_VERSIONS = ("torch", "pytorch-lightning", "safetensors", "lightning-sketch")


@dataclass(frozen=True)
class StoreSpec:
    """The map, the parameters, and the form of the numbers; two stores fit together if these are equal.

    Args:
        sketch: `sketch.spec()`.
        layout: [name, shape] of each parameter, in the order of the flat vector.
        dtype: of the stored sketches: "bfloat16", "float16" (with a scale per row) or "float32".
        normalization: in words, what a row is the gradient of.
        left_out: trainable parameters that the rows do not cover, by name, with the reason.
        contribution: whether batch statistics couple the examples, so that a row is an example's share in the gradient
            of its batch, and not the gradient of a loss of its own.

    Raises:
        ValueError: if the type is unknown, or sketch and layout disagree on the number of parameters.
    """

    sketch: Mapping[str, Any]
    layout: list[list[Any]]
    dtype: str = "bfloat16"
    normalization: str = "gradient of the mean loss"
    left_out: Mapping[str, str] = field(default_factory=dict)
    contribution: bool = False
    format: int = FORMAT

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; use {', '.join(map(repr, DTYPES))}.")
        if self.format != FORMAT:
            raise ValueError(
                f"the store has format {self.format}, this version of lightning_sketch reads {FORMAT}; install the "
                "version that wrote it."
            )
        n = sum(torch.Size(shape).numel() for _, shape in self.layout)
        if n != self.sketch["n"]:
            raise ValueError(f"the layout has {n} numbers, the sketch takes n={self.sketch['n']}.")

    @classmethod
    def of(cls, sketch: Sketch, layout: Layout, **options: Any) -> "StoreSpec":
        """The spec of rows that this sketch makes of this layout."""
        pairs = zip(layout.names, layout.shapes, strict=True)
        return cls(sketch.spec(), [[name, list(shape)] for name, shape in pairs], **options)

    @property
    def operator(self) -> Sketch:
        """The sketch itself."""
        return make_sketch(**self.sketch)

    @property
    def parameters(self) -> Layout:
        """The layout itself."""
        return Layout(*zip(*((name, torch.Size(shape)) for name, shape in self.layout), strict=True))

    @property
    def id(self) -> str:
        """A hash of what is compared; each shard carries it."""
        return hashlib.sha256(json.dumps(self._compared(), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `spec.json` into the folder, with the versions of the libraries, unless there is one.

        Raises:
            ValueError: if there is one that differs.
        """
        text = json.dumps({**asdict(self), "versions": {name: _version(name) for name in _VERSIONS}}, indent=1)
        if not write_once(folder / "spec.json", text.encode()):
            self.check_equal(StoreSpec.read(folder), folder)

    @classmethod
    def read(cls, folder: Path) -> "StoreSpec":
        """From the folder's `spec.json`.

        Raises:
            FileNotFoundError: if the folder holds no store.
        """
        path = folder / "spec.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no store: there is no spec.json in it; pass the writer's dirpath.")
        stored = json.loads(path.read_text())
        del stored["versions"]
        return cls(**stored)

    def check_equal(self, other: "StoreSpec", folder: Path) -> None:
        """Refuse another spec: mixing rows of two maps would give plausible, wrong numbers.

        Raises:
            ValueError: with both specs, where they differ.
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
                f"the store in {folder} has another spec:{both}\nUse another folder, or the same settings."
            )

    def _compared(self) -> dict[str, Any]:
        """All fields; of what is left out the names, since reasons may speak of a batch's size."""
        return {**asdict(self), "left_out": sorted(self.left_out)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _short(value: Any, other: Any) -> str:
    """The value in words; of a long list only where it differs."""
    if isinstance(value, list) and isinstance(other, list) and len(value) > 4:
        only = [item for item in value if item not in other]
        return f"{len(value)} parameters, of which not in the other: {only[:5]}"
    return str(value)
