"""Makes the pages that have another source (README, benchmarks, errors, API), and turns formulas into MathML."""

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
    return files


def readme(repository: str) -> str:
    """Return the README with the pictures of this site."""
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/examples/"
    text = (ROOT / "README.md").read_text().replace(raw, "pictures/")
    return text.replace(f"{repository}/blob/main/benchmarks/README.md", "benchmarks.md")


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
