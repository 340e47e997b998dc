"""Files that are whole or not there, whatever interrupts the writer.

    temporary file in the same folder -> write -> fsync -> rename -> fsync of the folder

After the rename the file is there under its name with all its bytes, also after a power cut; before, it is not there.
The temporary name is random and must be new (O_EXCL), so that two writers, or one that was killed, never share it.
Where a system cannot fsync a folder (Windows, some network mounts) the last step is left to it.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

TEMPORARY = ".tmp"

_UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EPERM", "EACCES", "EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "EXDEV", "EBADF")
}
"""What file systems answer that have no hard links, or cannot open or fsync a folder: exFAT, FUSE, Windows."""


def commit(path: Path, data: bytes) -> None:
    """Write a file under this name, replacing one that is there, in one step; folders above it are made.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the file is then as it was.
    """
    make_folder(path.parent)
    with _written(path, data) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes) -> bool:
    """Write a file unless one of this name is there, and return whether it was written; of several writers one wins.

    Without hard links, writers that look whether the name is taken come one after the other, by a lock beside it.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    make_folder(path.parent)
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)  # fails, other than a rename, where the name is taken
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
    """Make a folder, and those above it, that last."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were given or taken away in a folder last, where the system can do that."""
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
    """Keep a temporary file with these bytes on the disk for as long as the context lasts."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:  # O_EXCL
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
