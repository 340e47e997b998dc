"""Make the notebooks from examples of the gallery, and run them (two minutes): `make notebooks`.

A cell's title becomes a text above it. What a run says on stderr, such as the advice of other packages, is left out.
"""

import ast
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
SOURCES = {"spectrum": "stability", "attribution": "attribution", "intrinsic_dimension": "intrinsic_dimension"}
INSTALL = 'To run this notebook, install what it needs: `%pip install "lightning-sketch[plots]" scikit-learn`'


def notebook(name: str) -> Any:
    """Return the notebook of an example, not run."""
    text = (HERE.parent / "gallery" / f"{SOURCES[name]}.py").read_text()
    says = ast.get_docstring(ast.parse(text)) or ""
    cells = [new_markdown_cell(f"# {name.replace('_', ' ').capitalize()}\n\n{says}\n\n{INSTALL}")]
    code = text[text.index('"""', 3) + 3 :].lstrip()  # after the docstring
    for cell in jupytext.reads(code, "py:percent").cells:
        if "title" in cell.metadata:
            cells.append(new_markdown_cell(cell.metadata["title"]))
        cells.append(new_code_cell(cell.source))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same in each run
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=kernel)


def executed(made: Any) -> Any:
    """Run a notebook in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, timeout=3600, resources={"metadata": {"path": folder}}).execute()
        for cell in made.cells:
            cell.metadata.pop("execution", None)  # when it ran
            outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
            for output in outputs:
                if "text" in output:
                    output["text"] = re.sub(rf"\S*{re.escape(Path(folder).name)}/", "", output["text"])
            if cell.cell_type == "code":
                cell.outputs = outputs
    made.metadata.pop("language_info", None)
    return made


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name in SOURCES:
        nbformat.write(executed(notebook(name)), out / f"{name}.ipynb")
        print(f"notebook: {out / f'{name}.ipynb'}")
