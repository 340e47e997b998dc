"""What was saved is all there: eigenvectors can be had from the file, and R on both sides is read off either."""

import pytest
import torch

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
