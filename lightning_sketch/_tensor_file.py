"""Tensor files: safetensors with one checksum of the header and one of the contents.

    header     spec, kind, ... (strings that the caller chooses), columns: the shapes, as JSON
               header_crc32: checksum of all of these,   crc32: checksum of the tensors' names, types and bytes

Opening a file checks its header; `check` reads the whole file. A file is written atomically.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from lightning_sketch._files import CorruptFile, check_own, commit

_SMALL = 1 << 20  # bytes of a file that is read as a whole, which is faster than mapping each of its tensors
_CHECKSUMS = ("header_crc32", "crc32")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, new_folders: bool = True
) -> str:
    """Write a tensor file atomically, and return its seal, see `TensorFile.seal`.

    Args:
        path: The path of the file, which is replaced if it exists.
        tensors: The tensors, on the CPU.
        header: Strings to write into the header.
        new_folders: Whether to create missing folders.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    shapes = {key: list(tensor.shape) for key, tensor in sorted(contiguous.items())}
    plain = {**header, "columns": json.dumps(shapes)}
    full = plain | {"header_crc32": _header_checksum(plain), "crc32": checksum(contiguous)}
    commit(path, save(contiguous, full), new_folders=new_folders)
    return _seal(full)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of the names, types and bytes of tensors, which are contiguous."""
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(f"{key} {tensors[key].dtype}".encode(), crc)
        crc = zlib.crc32(tensors[key].view(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


class TensorFile:
    """An open tensor file, read lazily: opening it reads the header only.

    Args:
        path: The path of the file.
        sealed: Whether the file must have checksums; the first version wrote some kinds of files without.
        error: The exception to raise if the file is not what was written.

    Attributes:
        header: The strings of the header.
        shapes: The shape of each tensor, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFile: Or rather `error`, if the file is truncated, changed in its header, or no tensor file.
    """

    def __init__(self, path: Path, *, sealed: bool = True, error: type[CorruptFile] = CorruptFile):
        check_own(path)
        self.path, self.error = path, error
        self._loaded: dict[str, Tensor] = {}
        try:
            self._open = safe_open(path, framework="pt")
            self.header: dict[str, str] = self._open.metadata() or {}
            self.shapes = {key: list(self._open.get_slice(key).get_shape()) for key in sorted(self._open.keys())}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as reason:
            raise error(f"{path} cannot be read ({str(reason)[:200]}); it may be truncated.") from reason
        self._whole = all(0 not in shape for shape in self.shapes.values())  # else older safetensors cannot read it so
        self.sealed = sealed or any(name in self.header for name in _CHECKSUMS)
        plain = {key: value for key, value in self.header.items() if key not in _CHECKSUMS}
        if self.sealed and (
            self.header.get("header_crc32") != _header_checksum(plain)
            or json.loads(plain.get("columns", "null")) != self.shapes
        ):
            raise error(f"{path}: its header is not what was written; restore it from a copy, or delete it.")

    @property
    def seal(self) -> str:
        """A short string that is equal only for files of equal header and contents."""
        return _seal(self.header)

    def tensor(self, key: str) -> Tensor:
        """Return a tensor, which is mapped from the file unless that is small, not copied.

        Raises:
            FileNotFoundError: If the file was removed before its first tensor was read; later that does not matter.
            CorruptFile: If it cannot be read.
        """
        try:
            if not self._loaded and self._whole and self.path.stat().st_size <= _SMALL:
                self._loaded = load(self.path.read_bytes())
            return self._loaded[key] if self._loaded else self._open.get_tensor(key)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as reason:
            self.path.lstat()  # safetensors opens the file again for its first tensor; it may have been removed
            raise self.error(f"{self.path}: {key} cannot be read ({str(reason)[:200]}).") from reason

    def check(self) -> None:
        """Read the whole file and compare it with its checksum.

        Raises:
            CorruptFile: If a bit has changed.
        """
        if self.sealed and self.header.get("crc32") != checksum({key: self.tensor(key) for key in self.shapes}):
            raise self.error(
                f"{self.path}: its contents do not match its checksum; restore it from a copy, or delete it."
            )


def _seal(header: Mapping[str, str]) -> str:
    return "-".join(header.get(name, "") for name in _CHECKSUMS)


def _header_checksum(header: Mapping[str, str]) -> str:
    return str(zlib.crc32(json.dumps(dict(sorted(header.items()))).encode()))
