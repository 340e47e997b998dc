"""One file of rows: columns of equal length in safetensors, with a checksum, written whole or not at all.

    rows/r00003/a00000001/00000017.safetensors        rank 3, attempt 1, the 17th file

Rows in float16 carry a scale each, the largest magnitude in the row, so that no gradient is too large or too small
for it. Rounding: 2^-9 of a number in bfloat16, 2^-11 of the row's largest in float16.
"""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_sketch._files import commit, make_folder
from lightning_sketch.store.sketched_gradients import SketchedGradients
from lightning_sketch.store.spec import DTYPES, StoreSpec

SKETCHES, SCALE = "sketches", "scale"
_NAME = re.compile(r"r(\d{5})/a(\d{8})/(\d{8})\.safetensors")


class CorruptShard(ValueError):
    """A file of a store that is not what was written."""


@dataclass(frozen=True, order=True)
class ShardName:
    """Where a file of rows lies."""

    attempt: int
    rank: int
    sequence: int

    @property
    def path(self) -> Path:
        """Below the folder of the rows."""
        return Path(f"r{self.rank:05d}", f"a{self.attempt:08d}", f"{self.sequence:08d}.safetensors")

    @classmethod
    def of(cls, path: Path) -> "ShardName":
        """The inverse of `path`.

        Raises:
            CorruptShard: if a store has no file of that name.
        """
        found = _NAME.fullmatch("/".join(path.parts[-3:]))
        if found is None:
            raise CorruptShard(f"{path} is not a file of a store; move it away.")
        rank, attempt, sequence = map(int, found.groups())
        return cls(attempt, rank, sequence)


def write_shard(folder: Path, name: ShardName, spec: StoreSpec, rows: SketchedGradients) -> None:
    """Commit rows, on the CPU and in the spec's type already, as one file.

    Raises:
        OSError: if the disk is full or the folder cannot be written; nothing is there then.
    """
    tensors = {key: column.contiguous() for key, column in {SKETCHES: rows.sketches, **rows.columns}.items()}
    header = {
        "spec": spec.id,
        "attempt": str(name.attempt),
        "rank": str(name.rank),
        "sequence": str(name.sequence),
        "rows": str(len(rows)),
        "columns": json.dumps({key: list(tensor.shape) for key, tensor in sorted(tensors.items())}),
    }
    header |= {"header_crc32": _header_checksum(header), "crc32": _checksum(tensors)}
    path = folder / name.path
    make_folder(path.parent)
    commit(path, save(tensors, header))


def narrowed(rows: SketchedGradients, dtype: str) -> SketchedGradients:
    """A copy of the rows on the CPU in a stored type; what is not finite is zero and marked.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = narrowed(SketchedGradients(torch.tensor([[1e9, 5e8]]), BlockSRHT(9, 2)), "float16")
    >>> rows.sketches, rows.scale
    (tensor([[1.0000, 0.5000]], dtype=torch.float16), tensor([1.0000e+09]))
    """
    columns = {key: column.detach().to("cpu", copy=True) for key, column in rows.columns.items()}
    sketches = rows.sketches.detach().to("cpu", copy=True)
    limit = torch.finfo(torch.float32 if dtype == "float16" else DTYPES[dtype]).max
    finite = (sketches.abs() <= limit).all(1)
    if not finite.all():
        sketches = sketches.where(finite[:, None], 0)
        columns["finite"] = columns["finite"] & finite
    if dtype == "float16":
        largest = sketches.abs().amax(1).float()
        columns[SCALE] = largest.where(largest > 0, 1.0)
        sketches = sketches / columns[SCALE][:, None]
    return SketchedGradients(sketches.to(DTYPES[dtype]), rows.sketch, columns)


class Shard:
    """An open file of rows, read lazily: nothing but the header until it is asked for.

    Raises:
        CorruptShard: if it is cut, not safetensors, or belongs to another store or place.
    """

    def __init__(self, folder: Path, name: ShardName, spec: StoreSpec):
        self.file, self.name, self.spec = folder / name.path, name, spec
        try:
            self._open = safe_open(self.file, framework="pt")
            self.header = self._open.metadata() or {}
            shapes = {key: self._open.get_slice(key).get_shape() for key in sorted(self._open.keys())}
        except (SafetensorError, OSError) as error:
            raise CorruptShard(
                f"{self.file} cannot be read: {error}. It may be cut; store.verify() lists all."
            ) from error
        self.keys = list(shapes)
        expected = {"spec": spec.id, "attempt": name.attempt, "rank": name.rank, "sequence": name.sequence}
        for key, value in expected.items():
            if self.header.get(key) != str(value):
                raise CorruptShard(
                    f"{self.file} belongs elsewhere: its {key} is {self.header.get(key)}, here it is {value}; "
                    "move it away, or put it back where it came from."
                )
        plain = {key: value for key, value in self.header.items() if key not in ("header_crc32", "crc32")}
        as_written = self.header.get("header_crc32") == _header_checksum(plain)
        if not as_written or json.loads(self.header["columns"]) != shapes:
            raise CorruptShard(
                f"{self.file}: its header is not what was written; restore it from a copy, or delete it."
            )

    def __len__(self) -> int:
        return int(self.header["rows"])

    def columns(self) -> dict[str, Tensor]:
        """All columns but the sketches and their scale."""
        return {key: self._open.get_tensor(key) for key in self.keys if key not in (SKETCHES, SCALE)}

    def scale(self) -> Tensor | None:
        """Of each row, where they are float16."""
        return self._open.get_tensor(SCALE) if SCALE in self.keys else None

    def sketches(self, start: int, stop: int, scale: Tensor | None = None) -> Tensor:
        """Rows of numbers, from the file's pages as they are; float16 becomes float32 by its scale."""
        stored = self._open.get_slice(SKETCHES)[start:stop]
        return stored if scale is None else stored.float().mul_(scale[start:stop, None])

    def rows(self, places: Tensor) -> SketchedGradients:
        """Some of the rows, in memory."""
        sketches = self.sketches(0, len(self), self.scale())
        columns = {key: column[places] for key, column in self.columns().items()}
        return SketchedGradients(sketches[places], self.spec.operator, columns)

    def verify(self) -> None:
        """Read everything and compare with the checksum.

        Raises:
            CorruptShard: if a bit has changed.
        """
        tensors = {key: self._open.get_tensor(key) for key in self.keys}
        if self.header.get("crc32") != _checksum(tensors):
            raise CorruptShard(
                f"{self.file}: its contents do not fit its checksum; restore it from a copy, or delete it."
            )


def _header_checksum(header: Mapping[str, str]) -> str:
    return str(zlib.crc32(json.dumps(dict(sorted(header.items()))).encode()))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types and bytes of all columns."""
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(f"{key} {tensors[key].dtype}".encode(), crc)
        crc = zlib.crc32(tensors[key].view(-1).view(torch.uint8).numpy(), crc)
    return str(crc)
