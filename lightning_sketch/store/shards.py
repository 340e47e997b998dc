"""A file of rows (a shard): columns of equal length in safetensors, with a checksum, written atomically.

    rows/r00003/a00000001/00000017.safetensors        rank 3, run 1, the 18th file

Each row in float16 has a scale, its largest magnitude, so that gradients of any size fit. Rounding: 2^-9 of a number in
bfloat16, 2^-11 of the largest number of the row in float16.
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
from lightning_sketch.store.spec import DTYPES, Dtype, StoreSpec

_SKETCHES, _SCALE = "sketches", "scale"
_NAME = re.compile(r"r(\d{5})/a(\d{8})/(\d{8})\.safetensors")


class CorruptShard(ValueError):
    """Raised if a file of a store is not what was written."""


@dataclass(frozen=True, order=True)
class ShardName:
    """The name of a file of rows: which process of which run wrote it, and as which of its files.

    Args:
        run: Number of the run.
        rank: Rank of the process.
        sequence: 0, 1, ... in the order of writing.
    """

    run: int
    rank: int
    sequence: int

    @property
    def path(self) -> Path:
        """The path of the file, relative to the folder of the rows."""
        return Path(f"r{self.rank:05d}", f"a{self.run:08d}", f"{self.sequence:08d}.safetensors")

    @classmethod
    def of(cls, path: Path) -> "ShardName":
        """Parse a path; the inverse of the property `path`.

        Raises:
            CorruptShard: if no store names a file so.
        """
        found = _NAME.fullmatch("/".join(path.parts[-3:]))
        if found is None:
            raise CorruptShard(f"{path} is not a file of a store; move it away.")
        rank, run, sequence = map(int, found.groups())
        return cls(run, rank, sequence)


def write_shard(folder: Path, name: ShardName, spec: StoreSpec, rows: SketchedGradients) -> None:
    """Write rows, which are on the CPU and in the spec's type, as one file, atomically.

    Raises:
        OSError: if the disk is full or the folder cannot be written; no file is left then.
    """
    tensors = {key: column.contiguous() for key, column in {_SKETCHES: rows.sketches, **rows.columns}.items()}
    header = {
        "spec": spec.id,
        "attempt": str(name.run),
        "rank": str(name.rank),
        "sequence": str(name.sequence),
        "rows": str(len(rows)),
        "columns": json.dumps({key: list(tensor.shape) for key, tensor in sorted(tensors.items())}),
    }
    header |= {"header_crc32": _header_checksum(header), "crc32": _checksum(tensors)}
    path = folder / name.path
    make_folder(path.parent)
    commit(path, save(tensors, header))


def narrowed(rows: SketchedGradients, dtype: Dtype) -> SketchedGradients:
    """Copy rows to the CPU in a stored type; a row that is not finite becomes zero, with the column `finite` False.

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
        columns[_SCALE] = largest.where(largest > 0, 1.0)
        sketches = sketches / columns[_SCALE][:, None]
    return SketchedGradients(sketches.to(DTYPES[dtype]), rows.sketch, columns)


class Shard:
    """An open file of rows, read lazily: opening it reads the header only.

    Args:
        folder: The folder of the rows.
        name: The name of the file.
        spec: The spec of the store.

    Raises:
        CorruptShard: if the file is truncated, not safetensors, or belongs to another store or place.
    """

    def __init__(self, folder: Path, name: ShardName, spec: StoreSpec):
        self.file, self.name, self.spec = folder / name.path, name, spec
        try:
            self._open = safe_open(self.file, framework="pt")
            self.header = self._open.metadata() or {}
            shapes = {key: self._open.get_slice(key).get_shape() for key in sorted(self._open.keys())}
        except (SafetensorError, OSError) as error:
            raise CorruptShard(
                f"{self.file} cannot be read: {error}. It may be truncated; store.verify() lists all such files."
            ) from error
        self.keys = list(shapes)
        expected = {"spec": spec.id, "attempt": name.run, "rank": name.rank, "sequence": name.sequence}
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
        """Read all columns but the sketches and their scale."""
        return {key: self._open.get_tensor(key) for key in self.keys if key not in (_SKETCHES, _SCALE)}

    def scale(self) -> Tensor | None:
        """Read the scale of each row; None if the sketches are not float16."""
        return self._open.get_tensor(_SCALE) if _SCALE in self.keys else None

    def sketches(self, start: int, stop: int, scale: Tensor | None = None) -> Tensor:
        """Read the sketches of rows `start` to `stop`: without a copy, or with a scale as float32 times the scale."""
        stored = self._open.get_slice(_SKETCHES)[start:stop]
        return stored if scale is None else stored.float().mul_(scale[start:stop, None])

    def rows(self, places: Tensor) -> SketchedGradients:
        """Read the rows at these positions of the file."""
        sketches = self.sketches(0, len(self), self.scale())
        columns = {key: column[places] for key, column in self.columns().items()}
        return SketchedGradients(sketches[places], self.spec.operator, columns)

    def verify(self) -> None:
        """Read the whole file and compare it with its checksum.

        Raises:
            CorruptShard: if a bit has changed.
        """
        tensors = {key: self._open.get_tensor(key) for key in self.keys}
        if self.header.get("crc32") != _checksum(tensors):
            raise CorruptShard(
                f"{self.file}: its contents do not match its checksum; restore it from a copy, or delete it."
            )


def _header_checksum(header: Mapping[str, str]) -> str:
    return str(zlib.crc32(json.dumps(dict(sorted(header.items()))).encode()))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of the names, types and bytes of all columns."""
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(f"{key} {tensors[key].dtype}".encode(), crc)
        crc = zlib.crc32(tensors[key].view(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)
