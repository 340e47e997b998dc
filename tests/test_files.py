"""Files are complete or absent, also with several writers, without hard links, and if folders cannot be synced."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_sketch import _files
from lightning_sketch._files import commit, write_once
from lightning_sketch.curvature import load_spectrum, save_spectrum, spectrum
from lightning_sketch.operators import BlockSRHT


def no_links(monkeypatch, code=errno.ENOTSUP):
    """Fail on hard links, like exFAT, a FUSE mount or a network drive."""

    def link(source, target, **_):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


def no_folders(monkeypatch):
    """Fail to open folders, like Windows."""
    real = os.open

    def open_(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_)


SYSTEMS = {
    "linux": lambda monkeypatch: None,
    "no links": no_links,
    "no links, EPERM": lambda monkeypatch: no_links(monkeypatch, errno.EPERM),
    "no folders": no_folders,
    "neither": lambda monkeypatch: (no_links(monkeypatch), no_folders(monkeypatch)),
}


@pytest.fixture(params=SYSTEMS.values(), ids=SYSTEMS)
def system(request, monkeypatch):
    request.param(monkeypatch)


def test_a_file_is_written_and_replaced_below_new_folders(system, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for data in (b"first", b"second"):
        commit(path, data)
        assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["file"]


def test_exactly_one_of_several_writers_succeeds(system, tmp_path):
    """Of sixteen writers at once exactly one reports success, and the file has its data."""
    path = tmp_path / "new" / "file"
    data = [bytes([i]) * 10_000 for i in range(16)]
    start = threading.Barrier(16)

    def write(one):
        start.wait()
        return write_once(path, one)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, data))
    assert sum(won) == 1
    assert path.read_bytes() == data[won.index(True)]
    assert not write_once(path, b"later")
    assert path.read_bytes() == data[won.index(True)]
    assert {name.removesuffix(".lock") for name in os.listdir(path.parent)} == {"file"}


@pytest.mark.parametrize("write", [commit, write_once])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(write, tmp_path, monkeypatch):
    commit(tmp_path / "file", b"before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_error_at_the_folder_is_raised(tmp_path, monkeypatch):
    """Only errors of systems that cannot sync folders are ignored."""
    real = os.fsync

    def broken(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        commit(tmp_path / "file", b"data")


def test_temporary_names_are_new_each_time(tmp_path, monkeypatch):
    """An existing file with the temporary name, of another writer, is never overwritten."""
    monkeypatch.setattr(_files.secrets, "token_hex", lambda count: "same")
    (tmp_path / f"file.same{_files.TEMPORARY}").write_bytes(b"another writer's")
    with pytest.raises(FileExistsError):
        commit(tmp_path / "file", b"data")


def test_spectra_are_saved_atomically(system, tmp_path):
    s = BlockSRHT(n=64, dim=8)
    found = spectrum(s.T @ s, top_k=2, bottom_k=0)
    save_spectrum(found, tmp_path / "new" / "spectrum.safetensors")
    assert torch.equal(load_spectrum(tmp_path / "new" / "spectrum.safetensors").eigenvalues, found.eigenvalues)
    assert os.listdir(tmp_path / "new") == ["spectrum.safetensors"]
