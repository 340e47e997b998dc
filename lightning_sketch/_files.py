"""Files that are complete or absent after an interruption, that say if they were changed, and locks between processes.

    temporary file in the same folder -> write -> fsync -> rename -> fsync of the folder

Once the folder is synced, the file survives a power cut with all its bytes; before the rename it does not exist.
The temporary name is random and must be new (O_EXCL), so that two writers never share it, nor does one reuse the
leftover of a writer that was killed. Systems that cannot fsync a folder (Windows, some network mounts) skip that step.

A document is a JSON file of one object with a checksum of its fields. A tensor file is a safetensors file with one
checksum of its header, and one of its contents, which is compared when `TensorFile.check` reads all of it:

    header     spec, kind, ... (strings that the caller chooses), columns: the shapes, as JSON
               header_crc32: checksum of all of these,   crc32: checksum of the tensors' names, types and bytes
"""

import contextlib
import errno
import json
import os
import secrets
import stat
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

TEMPORARY = ".tmp"

# Errors of file systems without hard links, or whose folders cannot be opened or synced: exFAT, FUSE, Windows.
_UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EPERM", "EACCES", "EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "EXDEV", "EBADF")
}


_LARGEST_DOCUMENT = 1 << 26  # bytes
_LARGEST_NUMBER = 1 << 62  # of a document; sums of two still fit into int64
_SMALL = 1 << 20  # bytes of a file that is read as a whole, which is faster than mapping each of its tensors
_CHECKSUMS = ("header_crc32", "crc32")
_TRIES, _PAUSE = 5, 0.02  # of a replacement that Windows refuses while a reader has the file open; seconds


class CorruptFile(ValueError):
    """Raised if a file is not what was written: truncated, changed, exchanged, missing, or a link."""


class Busy(RuntimeError):
    """Raised if another process holds a lock."""


def commit(path: Path, data: bytes, *, new_folders: bool = True) -> None:
    """Write or replace a file atomically, creating the folders above it.

    Args:
        path: The path of the file.
        data: Its contents.
        new_folders: Whether to create missing folders; else a missing folder is an error.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an existing file is then unchanged.
    """
    if new_folders:
        make_folder(path.parent)
    with _written(path, data) as temporary:
        for left in reversed(range(_TRIES)):
            try:
                os.replace(temporary, path)
                break
            except PermissionError:
                if not left:
                    raise
                time.sleep(_PAUSE)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes, *, new_folders: bool = True) -> bool:
    """Write a file atomically unless one of this name exists, and return whether it was written.

    Exactly one of several concurrent writers succeeds. Where there are no hard links, a lock file beside the file
    serializes the writers.

    Args:
        path: The path of the file.
        data: Its contents.
        new_folders: Whether to create missing folders; else a missing folder is an error.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    if new_folders:
        make_folder(path.parent)
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename, fails if the name is taken
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            with FileLock(f"{path}.lock"):
                if path.exists():
                    return False
                os.replace(temporary, path)
    sync_folder(path.parent)
    return True


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and sync them, so that they survive a power cut."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make created and removed names in a folder durable, where the system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """Write these bytes to a temporary file on the disk, and remove it when the context ends."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:  # O_EXCL
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def check_own(path: Path) -> None:
    """Refuse a file that is a link, a pipe or a device, which may be outside or without end.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFile: If it is not a regular file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise CorruptFile(f"{path} is a link, pipe or folder, where a file is expected; put the file itself there.")


def check_folder(path: Path) -> None:
    """Refuse a folder that is a link or no folder; it may be missing.

    Raises:
        CorruptFile: If it is one of these.
    """
    if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
        raise CorruptFile(f"{path} is a link or a file, where a folder is expected; put the folder itself there.")


def write_document(path: Path, fields: Mapping[str, Any], *, once: bool = False, new_folders: bool = True) -> bool:
    """Write a document atomically; with `once` only if there is none of this name. Return whether it was written.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode()
    if once:
        return write_once(path, text, new_folders=new_folders)
    commit(path, text, new_folders=new_folders)
    return True


def read_document(
    path: Path,
    types: Mapping[str, Any],
    expected: Mapping[str, Any] = MappingProxyType({}),
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    sealed: bool = True,
) -> dict[str, Any]:
    """Read a document.

    Args:
        path: The path of the file.
        types: The type of each field that is needed, as `isinstance` takes it. Other fields, as a later version may
            write, are ignored.
        expected: Values that fields must have in a file of this place.
        defaults: Values of fields that an earlier version did not write.
        sealed: Whether the document must have a checksum; if it has one, this must match in any case.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFile: If it is not what was written, or a field is missing or of another type.
    """
    check_own(path)
    if path.stat().st_size > _LARGEST_DOCUMENT:
        raise CorruptFile(f"{path} is too large for what it should contain; restore it from a copy.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not JSON ({str(error)[:100]}); restore it from a copy.") from error
    if not isinstance(found, dict):
        raise CorruptFile(f"{path} contains a {type(found).__name__}, not the fields of an object.")
    own = found.pop("checksum", None)
    if (sealed or own is not None) and own != _checksum(found):
        raise CorruptFile(f"{path}: its contents do not match its checksum; restore it from a copy.")
    found = {**defaults, **found}
    for name, kind in types.items():
        value = found.get(name)
        number = isinstance(value, int) and not (isinstance(value, bool) or 0 <= value < _LARGEST_NUMBER)
        if name not in found or not isinstance(value, kind) or number or (isinstance(value, bool) and kind is not bool):
            raise CorruptFile(f"{path}: its field {name!r} is {str(found.get(name, 'missing'))[:60]}, which cannot be.")
    check_place(path, found, expected)
    return {name: found[name] for name in types}


def check_place(
    path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], error: type[CorruptFile] = CorruptFile
) -> None:
    """Refuse a file that was written for another place.

    Raises:
        CorruptFile: Or rather `error`, if one of its fields is not as expected.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise error(
                f"{path} belongs elsewhere: its {key} is {found.get(key)}, here it is {value}; move it away, or put it "
                "back where it came from."
            )


def acquire(path: Path, busy: str | None = None) -> FileLock | None:
    """Acquire a lock file; the end of the process releases it, as does `release()`.

    Args:
        path: The path of the lock file, in an existing folder.
        busy: The message of the error if another process holds the lock. If None, wait for it, and say so.

    Returns:
        The lock, or None where the file system has no locks, which is said.

    Raises:
        Busy: If the lock is held and `busy` is given.
        CorruptFile: If the lock file is a link or a folder.
        PermissionError: If it belongs to another user, who excludes this one.
    """
    if os.path.lexists(path):
        check_own(path)  # a link would be opened for writing
    lock = FileLock(str(path), thread_local=False)
    try:
        try:
            lock.acquire(timeout=0 if busy else 1)
        except Timeout as error:
            if busy:
                raise Busy(busy) from error
            warnings.warn(f"waiting for {path}, which another process holds; compaction may take minutes", stacklevel=2)
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        unsupported = (_UNSUPPORTED | {errno.ENOLCK}) - {errno.EACCES, errno.EPERM}  # these: the file is another user's
        if isinstance(error, OSError) and error.errno not in unsupported:
            raise
        warnings.warn(f"{path.parent} has no file locks ({error}): nothing keeps other processes out.", stacklevel=2)
        return None
    return lock


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock file within the context; arguments and errors as in `acquire`."""
    lock = acquire(path, busy)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _checksum(fields: Mapping[str, Any]) -> int:
    """Return the checksum of the fields of a document."""
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


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
        except (SafetensorError, OSError, RuntimeError) as reason:  # the last from torch, which opens the file again
            if not path.exists():  # a compaction has deleted it in the meantime
                raise FileNotFoundError(f"{path} was deleted while it was opened.") from reason
            raise error(
                f"{path} cannot be read ({str(reason)[:200]}); it may be truncated, or no safetensors file."
            ) from reason
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
