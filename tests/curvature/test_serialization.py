"""What was saved is all there, and a file that was changed is refused; ratios are read off both sides."""

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from lightning_sketch import BlockSRHT
from lightning_sketch._files import CorruptFile
from lightning_sketch.curvature import load_spectrum, save_spectrum, spectrum


def test_eigenvectors_from_a_file(tmp_path, dense_operator):
    """The second pass needs the seed, the sketch, and each run's recurrence."""
    values = torch.linspace(-1, 1, 400, dtype=torch.float64)
    values[:3] = torch.tensor([9.0, 7, 5])
    a = dense_operator(torch.diag(values))
    sp = spectrum(a, num_matvecs=40, dim=128, seed=3, top_k=3, bottom_k=0, gradient=torch.ones(400).double())
    save_spectrum(sp, tmp_path / "sp.safetensors")
    loaded = load_spectrum(tmp_path / "sp.safetensors")
    assert torch.equal(loaded.eigenvalues, sp.eigenvalues)
    assert (loaded.trace, loaded.known, loaded.sketch) == (sp.trace, sp.known, sp.sketch)
    assert loaded.gradient_in_top(2) == sp.gradient_in_top(2)
    pairs = loaded.eigenvectors(a, 3)
    torch.testing.assert_close(pairs.values, values[:3])
    assert pairs.residuals.max() < 1e-3  # the run stopped at tol 1e-2; another start leaves 1 and more
    assert [path.name for path in tmp_path.iterdir()] == ["sp.safetensors"]


def test_ratios_on_both_sides(dense_operator):
    values = torch.zeros(60, dtype=torch.float64)
    values[:4] = torch.tensor([8.0, 4.0, -2.0, -1.0])
    sp = spectrum(dense_operator(torch.diag(values)), num_matvecs=20, top_k=2, bottom_k=2)
    top, bottom = sp.ratios(2)
    assert top.tolist() == pytest.approx([1, 0.5])
    assert bottom.tolist() == pytest.approx([0.25, 0.125])


def saved(tmp_path):
    """Return a small spectrum in a file."""
    s = BlockSRHT(n=120, dim=16, seed=5)
    sp = spectrum(s.T @ s, num_matvecs=12, dim=24, top_k=2, bottom_k=1, gradient=torch.ones(120).double())
    save_spectrum(sp, tmp_path / "sp.safetensors")
    return sp, tmp_path / "sp.safetensors"


def without_checksum(path):
    """Write a file again as the first version did: with one header field."""
    with safe_open(path, framework="pt") as file:
        data = save({key: file.get_tensor(key) for key in file.keys()}, {"spectrum": file.metadata()["spectrum"]})
    path.write_bytes(data)
    return data


def cut(data, i, number):
    return data[:i]


def flip(data, i, number):
    return data[:i] + bytes([data[i] ^ 1 << number]) + data[i + 1 :]


def exchange(data, i, number):
    return data[:i] + bytes([(data[i] + 1 + 17 * number) % 256]) + data[i + 1 :]


def blank(data, i, number):
    return data[:i] + bytes(len(data[i : i + 64])) + data[i + 64 :]


def drop(data, i, number):
    return data[:i] + data[i + 1 + number :]


def insert(data, i, number):
    return data[:i] + b"7" * (1 + number) + data[i:]


@pytest.mark.parametrize("change", [cut, flip, exchange, blank, drop, insert], ids=lambda change: change.__name__)
def test_a_file_that_was_changed_is_named_and_refused(tmp_path, change):
    """Of 102 changes in each of six ways, in the length, the header and the tensors, none is read as a spectrum."""
    _, path = saved(tmp_path)
    data, draw = path.read_bytes(), random.Random(change.__name__)
    header = 8 + int.from_bytes(data[:8], "little")
    for start, stop in ((0, 8), (8, header), (header, len(data))) * 34:
        changed = change(data, draw.randrange(start, stop), draw.randrange(8))
        if changed != data:
            path.write_bytes(changed)
            with pytest.raises(CorruptFile, match=r"sp\.safetensors"):
                load_spectrum(path)


def test_a_file_without_its_checksums_is_not_taken_for_one_of_the_first_version(tmp_path):
    _, path = saved(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"header_crc32"', b'"header_crc33"').replace(b'"crc32"', b'"crc33"'))
    with pytest.raises(CorruptFile, match="its header is not what was written"):
        load_spectrum(path)


def test_a_file_of_the_first_version_is_read_with_a_warning(tmp_path):
    sp, path = saved(tmp_path)
    data = without_checksum(path)
    with pytest.warns(UserWarning, match="has no checksum"):
        loaded = load_spectrum(path)
    assert torch.equal(loaded.eigenvalues, sp.eigenvalues)
    assert torch.equal(loaded.krylov.runs[0].columns[-1], sp.krylov.runs[0].columns[-1])
    for old, new in ((b"tol", b"tal"), (b"block_srht", b"block_srhy"), (b"weights", b"weighty"), (b"true", b"trxe")):
        if old in data:
            path.write_bytes(data.replace(old, new))
            with (
                pytest.warns(UserWarning, match="has no checksum"),
                pytest.raises(CorruptFile, match=r"sp\.safetensors"),
            ):
                load_spectrum(path)
