"""Atomic, durable writing of files: after an interruption a file is complete or absent.

    temporary file in the same folder -> write -> fsync -> rename -> fsync of the folder

Once the folder is synced, the file survives a power cut with all its bytes; before the rename it does not exist.
The temporary name is random and must be new (O_EXCL), so that two writers never share it, nor does one reuse the
leftover of a writer that was killed. Systems that cannot fsync a folder (Windows, some network mounts) skip that step.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

TEMPORARY = ".tmp"

# Errors of file systems without hard links, or whose folders cannot be opened or synced: exFAT, FUSE, Windows.
_UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EPERM", "EACCES", "EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "EXDEV", "EBADF")
}


def commit(path: Path, data: bytes) -> None:
    """Write or replace a file atomically, creating the folders above it.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an existing file is then unchanged.
    """
    make_folder(path.parent)
    with _written(path, data) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes) -> bool:
    """Write a file atomically unless one of this name exists, and return whether it was written.

    Exactly one of several concurrent writers succeeds. Where there are no hard links, a lock file beside the file
    serializes the writers.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
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
