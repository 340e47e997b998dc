"""The pages of the documentation: their code runs, their links lead somewhere, and they build without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "docs/recipes").glob("*.md"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("page", RECIPES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of the packages that recipes are about
def test_a_recipe_runs_as_it_is_written(page, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if not blocks:
        assert page.stem in ("ddp", "fsdp2")  # several processes: callbacks/test_ddp.py, examples/sharded_spectrum.py
        pytest.skip("takes several processes")
    if page.stem == "peft":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec("\n".join(blocks), {"__name__": "recipe"})


def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: every link to a page or a heading, every name in the API, every page in the menu."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("index.html")}
    assert {"index.html", "troubleshooting/index.html", "concepts/choosing_dim/index.html"} <= pages
    api = (tmp_path / "site/api/curvature/index.html").read_text()
    assert "lightning_sketch.curvature.Hessian" in api
    found = (tmp_path / "site/search/search_index.json").read_text().lower()
    for words in ("hessian eigenvalues", "training data attribution", "influence functions", "intrinsic dimension"):
        assert words in found
