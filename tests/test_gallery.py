"""The gallery: each example shows what it says, has a picture and a place in the documentation, and fits a screen."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from forks import run

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "docs/hooks.py"
SCRIPTS = {path.stem: path for path in (ROOT / "examples/gallery").glob("*.py") if path.stem != "thumbnails"}
ALL = {"quickstart": ROOT / "examples/quickstart.py", **SCRIPTS}
BOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def numbers(pattern, printed):
    """Return the groups of all matches as numbers."""
    found = re.findall(pattern, printed, re.MULTILINE)
    assert found, printed
    return [
        tuple(float(part.replace(",", "")) for part in (each if isinstance(each, tuple) else (each,))) for each in found
    ]


def the_edge_is_seen_before_the_loss(printed, folder):
    """Below the edge the loss falls; above it, it grows, and the verdict before the first step said so."""
    below, above = re.findall(r"before the first step: stability: (.+?) the edge", printed)
    assert below.endswith(" of")
    assert float(below.split()[0]) < 1 < float(above.split()[0])
    assert above.endswith(" times")
    (low, start), (high, same) = numbers(r"the loss is (\S+), from (\S+)$", printed)
    assert start == same
    assert low < start < high / 10


def a_page_shows_who_taught(printed, folder):
    """It has the twelve queries, each with ten training images on the side that helped."""
    (path,) = re.findall(r"^page: (.+)$", printed, re.MULTILINE)
    text = (folder / path).read_text()
    assert text.count('"number":') == 12
    assert text.count("data:image/png") > 50


def facts_are_taught_by_their_texts(printed, folder):
    """The text that taught the answer to a question best states this fact."""
    words = {"Paris": "France", "Lima": "Peru", "Jupiter": "largest", "Venus": "hottest", "redwood": "tallest",
             "Bell": "telephone", "Austen": "Emma"}  # fmt: skip
    found = {word: re.findall(rf"^ +{word}: (.+)$", printed, re.MULTILINE) for word in words}
    assert all(len(texts) == 1 and word in texts[0] and words[word] in texts[0] for word, texts in found.items())
    assert re.findall(r"^page: .+html$", printed, re.MULTILINE)


def fine_tuning_starts_sharp(printed, folder):
    """The largest eigenvalue at the start is far above that of random weights; negative ones are small."""
    found = numbers(r"start: loss \S+ largest eigenvalue +(\S+), most negative over largest (\S+)$", printed)
    (tuned, tuned_rneg), (zero, zero_rneg) = found
    assert tuned > 10 * zero
    assert tuned_rneg < 0.2 < zero_rneg


def few_numbers_and_a_bound(printed, folder):
    """A few per cent of the parameters reach the target; the bound is above the errors and below a guess."""
    ((dim, n),) = numbers(r"Result: (\d+) of (\S+) reaches", printed)
    assert dim in (64, 128, 256)
    assert dim / n < 0.06
    ((bound, errors),) = numbers(r"at most (\S+) % of new examples are errors: (\S+) % of", printed)
    assert errors < bound < 60


def both_processes_agree(printed, folder):
    """The spectrum is one number on both, and no step or image is counted twice."""
    zero, one = re.findall(r"^process \d: largest eigenvalues (.+)$", printed, re.MULTILINE)
    assert zero == one
    assert set(numbers(r"^(\d+) rows of (\d+) (?:steps|images)", printed)) == {(145, 145), (1797, 1797)}


def shards_are_measured(printed, folder):
    """Each process has half of the parameters, and errors are below a tenth of the eigenvalues."""
    halves = numbers(r"^process \d: (\S+) of (\S+)", printed)
    assert len(halves) == 2
    assert all(0.4 < here / n < 0.6 for here, n in halves)
    pairs = numbers(r"(\d\S*) ± ([\de.-]+)", printed)
    assert len(pairs) == 6
    assert all(error < 0.1 * value for value, error in pairs)


def tables_and_lance_have_the_rows(printed, folder):
    """SQL counts every image; where the loss is larger, so is the gradient; a row is nearest to itself in Lance."""
    rows = numbers(r"^│ +(\d) │ +(\d+) │ +(\S+) │ +(\S+) │$", printed)
    assert len(rows) == 10
    assert sum(images for _, images, _, _ in rows) == 1797
    losses, lengths = [row[2] for row in rows], [row[3] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert max(lengths) == lengths[0]
    assert min(lengths) == lengths[-1]
    assert len(re.findall(r"query \d: \d+ \(1\)", printed)) == 3


def commands_answer(printed, folder):
    """Both questions find other images, in the order in which they are asked; all rows are verified and exported."""
    asked = re.findall(r"^(\d):\n((?: +0\.\d+  \d+\n)+)", printed, re.MULTILINE)
    assert [name for name, _ in asked] == ["0", "7"]
    assert all(len(lines.splitlines()) == 4 and f"  {name}\n" not in lines for name, lines in asked)
    assert printed.count("rows: 1942") == 2
    assert (folder / "runs/command_line/rows.parquet").exists()
    assert "data:image/png" in (folder / "runs/command_line/page.html").read_text()
    assert "torch: " in printed
    assert "Error" not in printed


CHECKS = {
    "stability": the_edge_is_seen_before_the_loss,
    "attribution": a_page_shows_who_taught,
    "language_model": facts_are_taught_by_their_texts,
    "fine_tuning": fine_tuning_starts_sharp,
    "intrinsic_dimension": few_numbers_and_a_bound,
    "ddp": both_processes_agree,
    "fsdp2": shards_are_measured,
    "store": tables_and_lance_have_the_rows,
    "command_line": commands_answer,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_shows_what_it_says(name, tmp_path):
    """In a process of its own, as a reader runs it; it says what it wrote, below runs/."""
    if name == "store":
        pytest.importorskip("duckdb")
        pytest.importorskip("lance")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name == "fsdp2" else []
    quiet = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = run(*launcher, SCRIPTS[name], cwd=tmp_path, env=quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [tmp_path / path for path in re.findall(r"^(?:picture|page): (.+)$", done.stdout, re.MULTILINE)]
    assert all(path.stat().st_size > 5_000 for path in written)
    assert len(written) == {"attribution": 2, "ddp": 0, "fsdp2": 0, "store": 0, "command_line": 0}.get(name, 1)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])
    CHECKS[name](done.stdout, tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_an_example_is_of_one_screen_and_has_a_picture(name):
    text = ALL[name].read_text()
    assert len(text.splitlines()) <= (75 if name == "quickstart" else 60)
    first = ast.get_docstring(ast.parse(text)).splitlines()[0]
    assert re.search(r"\((a minute|\d+ seconds)\)\.$", first), first
    assert 1_000 < (ROOT / f"examples/gallery/{name}.png").stat().st_size <= 60_000


def test_examples_need_no_other_file_and_public_names_only():
    for path in ALL.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_sketch"):
                public = __import__(node.module, fromlist=["__all__"]).__all__
                assert {alias.name for alias in node.names} <= set(public)
            assert not (isinstance(node, ast.ImportFrom) and node.level)
            assert not (isinstance(node, ast.ImportFrom) and node.module in ALL)


def test_the_documentation_has_all_examples():
    """With their first lines, their code and their pictures; and the longer ones below."""
    for package in ("mkdocs", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    hooks = runpy.run_path(str(HOOKS))
    assert hooks["GALLERY"].keys() == ALL.keys()
    page = hooks["gallery"]("https://example.org/us")
    for name, path in ALL.items():
        assert path.read_text() in page
        assert f"pictures/gallery/{name}.png" in page
        assert f"](#{name})" in page
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in page
    assert all(book.name in page for book in BOOKS)


def test_the_readme_of_the_gallery_is_made_of_the_examples():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    made = runpy.run_path(str(HOOKS))["gallery_table"]()
    assert (ROOT / "examples/gallery/README.md").read_text() == made, "run `python docs/hooks.py`"


def test_notebooks_are_those_of_the_gallery():
    """Their cells are the examples' own, and what they show names no machine."""
    jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    assert jupytext
    make = runpy.run_path(str(ROOT / "examples/notebooks/make.py"))
    assert {book.stem for book in BOOKS} == make["SOURCES"].keys()
    for book in BOOKS:
        stored = nbformat.read(book, 4)
        assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
            (cell.cell_type, cell.source) for cell in make["notebook"](book.stem).cells
        ], "run `make notebooks`"
        outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        assert not re.search(r"/(tmp|home|root|Users|work)/", book.read_text())
        assert "Warning" not in "".join(output.get("text", "") for output in outputs)
        assert book.stat().st_size < 300_000


@pytest.mark.slow
def test_notebooks_run(tmp_path):
    """By the command of `make notebooks`, to another folder; the figures are there again."""
    nbformat = pytest.importorskip("nbformat")
    for package in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(package)
    quiet = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples/notebooks/make.py", tmp_path]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for book in BOOKS:
        cells = nbformat.read(tmp_path / book.name, 4).cells
        assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
