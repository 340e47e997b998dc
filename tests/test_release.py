"""What is released agrees with itself: one version, one date, targets and links that are there."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
(VERSION,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    first = re.search(r"^## (\S+) - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first.groups() == (VERSION, citation["date-released"])
    assert citation["version"] == VERSION


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_targets_that_are_there_and_actions_that_cannot_change(path):
    """Every make target exists; every action is a commit; only the job that publishes may speak for the project."""
    text = path.read_text()
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    targets = {word for step in steps for word in re.findall(r"^make ([\w-]+)", step.get("run", ""))}
    if "matrix" in text:
        targets |= {word for item in jobs["tests"]["strategy"]["matrix"]["target"] for word in item.split()}
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets
    assert targets <= known
    uses = [step["uses"] for step in steps if "uses" in step]
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in uses)
    trusted = {name for name, job in jobs.items() if "id-token" in job.get("permissions", {})}
    assert trusted == ({"publish"} if path.stem == "publish" else set())
    assert not re.search(r"secrets\.", text)


def test_links_of_the_readme_work_where_it_is_shown_alone():
    """On PyPI there is no file beside it: pictures and links are addresses, or places in the README itself."""
    text = (ROOT / "README.md").read_text()
    places = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or link[1:] in places, link


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_need(tmp_path):
    """The page's template, the types and the license; no result, cache or test in the wheel."""
    import sys
    import tarfile
    import zipfile

    command = [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "lightning_sketch").rglob("*.py")}
    assert package <= names
    assert {"lightning_sketch/py.typed", "lightning_sketch/attribution/report.html"} <= names
    assert {name.split("/")[0] for name in names} == {"lightning_sketch", f"lightning_sketch-{VERSION}.dist-info"}
    inside = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert package | {"README.md", "LICENSE", "CHANGELOG.md", "tests/test_release.py"} <= inside
    assert not [name for name in inside if re.match(r"\.hypothesis|\.ci|dist/|runs/|benchmarks/results", name)]
