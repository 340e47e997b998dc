"""Files that are whole or not there, whatever interrupts the writer.

    temporary file in the same folder -> write -> fsync -> rename -> fsync of the folder

After the rename the file is there under its name with all its bytes, also after a power cut; before, it is not there.
"""

import os
from pathlib import Path

TEMPORARY = ".tmp"


def commit(path: Path, data: bytes) -> None:
    """Write a file under this name, replacing one that is there, in one step.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the file is then as it was.
    """
    temporary = _written(path, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes) -> bool:
    """Write a file unless one of this name is there; whether it was written. Of several writers one wins."""
    make_folder(path.parent)
    temporary = _written(path, data)
    try:
        os.link(temporary, path)  # fails, other than a rename, where the name is taken
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that last."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were given or taken away in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _written(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
