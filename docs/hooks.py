"""Makes the pages that have another source (README, benchmarks, errors, API), and turns formulas into MathML."""

import ast
import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "callbacks": "lightning_sketch.callbacks",
    "curvature": "lightning_sketch.curvature",
    "attribution": "lightning_sketch.attribution",
    "store": "lightning_sketch.store",
    "subspace": "lightning_sketch.subspace",
    "metrics": "lightning_sketch.metrics",
    "operators": "lightning_sketch.operators",
}
HUGGING_FACE = ["SpectrumCallback", "GradientSketchCallback"]  # which need transformers, so not in `callbacks.__all__`
EXTENSIONS = ["autodiff.num_labels", "per_example.register_layer", "testing.SketchTests", "testing.LayerRuleTests"]


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and pictures."""
    pages = {"index.md": readme(config["repo_url"]), "benchmarks.md": (ROOT / "benchmarks/README.md").read_text()}
    pages["troubleshooting.md"] = runpy.run_path(str(ROOT / "docs/troubleshooting.py"))["page"]()
    pages["gallery.md"] = gallery(config["repo_url"])
    pages |= {f"api/{name}.md": api(package) for name, package in PACKAGES.items()}
    pages["api/index.md"] = where()
    pages["api/extensions.md"] = "# For extensions\n\n" + "\n".join(f"::: lightning_sketch.{x}\n" for x in EXTENSIONS)
    pages["api/callbacks.md"] += "\n## Trainer of Hugging Face\n\n" + "\n".join(
        f"::: lightning_sketch.callbacks.hugging_face.{name}\n" for name in HUGGING_FACE
    )
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for picture in (ROOT / "examples").glob("*.png"):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    for picture in (ROOT / "examples/gallery").glob("*.png"):
        files.append(File.generated(config, f"pictures/gallery/{picture.name}", abs_src_path=str(picture)))
    return files


def readme(repository: str) -> str:
    """Return the README with the pictures of this site."""
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/examples/"
    text = (ROOT / "README.md").read_text().replace(raw, "pictures/")
    return text.replace(f"{repository}/blob/main/benchmarks/README.md", "benchmarks.md")


GALLERY = {
    "quickstart": "Quickstart",
    "attribution": "Attribution",
    "language_model": "Language model",
    "fine_tuning": "Fine-tuning",
    "intrinsic_dimension": "Intrinsic dimension",
    "stability": "Stability",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "store": "Stores in DuckDB and Lance",
    "command_line": "Command line",
}


def gallery(repository: str) -> str:
    """Return the page of all examples: a card for each of one screen, their code, and the longer ones."""
    blob, shown, cards, codes = f"{repository}/blob/main/examples", [], [], []
    for name, title in GALLERY.items():
        file = "quickstart.py" if name == "quickstart" else f"gallery/{name}.py"
        says, code = first_line(ROOT / "examples" / file), (ROOT / "examples" / file).read_text()
        picture = f"![{title}: {says}](pictures/gallery/{name}.png)"
        cards.append(f"-   [{picture}](#{name})\n\n    **[{title}](#{name})**\n\n    {says}\n")
        details = f'<details markdown="1"><summary>The code</summary>\n\n```python\n{code}```\n\n</details>'
        codes.append(f"## {title} {{#{name}}}\n\n{says} [`examples/{file}`]({blob}/{file})\n\n{details}\n")
        shown.append(file)
    books = sorted(path.name for path in (ROOT / "examples/notebooks").glob("*.ipynb"))
    longer = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name not in shown]
    return "\n".join(
        [
            "# Gallery\n\nExamples of one screen. They run on a CPU as they are and download nothing; what they",
            "write is in `runs/`. Times are those of one core.\n",
            '<div class="grid cards" markdown>\n',
            *cards,
            "</div>\n",
            "As notebooks, with what they print and draw: "
            + ", ".join(f"[{book}]({blob}/notebooks/{book})" for book in books)
            + ".\n",
            *codes,
            "## Longer experiments {#longer}\n",
            *(f"- [`{path.name}`]({blob}/{path.name}): {first_line(path)}" for path in longer),
        ]
    )


def gallery_table() -> str:
    """Return examples/gallery/README.md: the pictures of the examples, for who reads the repository."""
    lines = ["# Gallery\n\nExamples of one screen, which run on a CPU as they are and download nothing.\n"]
    lines += ["| | |", "| --- | --- |"]
    for name, title in GALLERY.items():
        file = "../quickstart.py" if name == "quickstart" else f"{name}.py"
        says = first_line(ROOT / "examples/gallery" / file)
        lines.append(f"| [![{title}]({name}.png)]({file}) | **[{title}]({file})**<br>{says} |")
    return "\n".join(lines) + "\n"


def first_line(path: Path) -> str:
    """Return what an example says first of itself."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def names_of(package: str) -> list[str]:
    """Return the public names: first those of the top level, then classes, then functions."""
    top = importlib.import_module("lightning_sketch").__all__
    return sorted(importlib.import_module(package).__all__, key=lambda name: (name not in top, name.islower(), name))


def api(package: str) -> str:
    """Return a page with the docstrings of a package's public names."""
    owned = [name for name in names_of(package) if not (package.endswith("attribution") and name in names_of(STORE))]
    room = importlib.import_module(package)
    shadowed = {name for name in owned if f"{package}.{name}" in sys.modules}  # a module has the name of its function
    homes = [
        f"{package}.{name}.{name}" if name in shadowed else f"{package}.{name}" for name in owned if name != "STAGES"
    ]
    functions, first = "\n".join(f"::: {home}\n" for home in homes), room.__doc__ or ""
    return f"# {package}\n\n{first}\n\n{functions}"


STORE = "lightning_sketch.store"


def where() -> str:
    """Return the table of all public names and where to import them from."""
    top = importlib.import_module("lightning_sketch").__all__
    lines = ["# Where names are", "", "| name | import it from |", "| --- | --- |"]
    for page, package in PACKAGES.items():
        for name in names_of(package):
            home = "`lightning_sketch`" if name in top else f"`{package}`"
            lines.append(f"| [`{name}`]({page}.md) | {home} |")
    home = "`lightning_sketch.callbacks.hugging_face`"
    lines += [f"| [`{name}`](callbacks.md) | {home} |" for name in HUGGING_FACE]
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace formulas between $$ by MathML, which browsers draw themselves."""
    return re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1], display="block"), markdown, flags=re.DOTALL)


if __name__ == "__main__":
    (ROOT / "examples/gallery/README.md").write_text(gallery_table())
