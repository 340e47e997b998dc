"""Make the page of wrong uses: each call of `tests/wrong_uses.py` is made, and the message that came is shown.

From the root of the repository:

    python docs/troubleshooting.py > docs/troubleshooting.md
"""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1] / "tests"

INTRODUCTION = """\
# Troubleshooting

Find your message with the search of these pages, by its words without the numbers. Each entry has the call that is
refused, what it says, the reason, and what to type instead. The calls are made whenever these pages are built, so that
the messages are those of this version.

In the calls `model` is a `LightningModule`, `new_model` one that is not trained, `data` its data set, `loader` a
`DataLoader`, `batches` a list of its batches, `x, y` the first of them, `loss_fn(module, batch)` the mean loss and
`h = Hessian(loss_fn, model, batches)`; `store` is a `GradientStore`, `rows = store.where(stage="validate")`, and
`queries = rows.sketch_gradients(model, batches)`.
"""


def page() -> str:
    """Return the page, in Markdown.

    Raises:
        AssertionError: If a call is not refused, or by another error than the table says.
    """
    uses = _table()
    parts = [INTRODUCTION]
    with _a_folder() as folder:
        given = uses.Given(folder)
        for topic in uses.TOPICS:
            parts.append(f"## {topic}\n")
            parts += [_entry(use, given) for use in uses.WRONG_USES if use.topic == topic]
    return "\n".join(parts)


def _table() -> ModuleType:
    sys.path.insert(0, str(TESTS))
    try:
        import wrong_uses
    finally:
        sys.path.remove(str(TESTS))
    return wrong_uses


@contextlib.contextmanager
def _a_folder():
    """Work in a temporary folder, without words on the standard output, which is the page."""
    before = Path.cwd()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(name)
        try:
            yield Path.cwd()
        finally:
            os.chdir(before)
            logging.disable(logging.NOTSET)


def _entry(use, given) -> str:
    """Return the part of the page about one call."""
    try:
        use.run(given)
    except use.error as error:
        # without the name of the temporary folder, which is another one at each build
        message = f"{type(error).__name__}: {error}".replace(f"{given.folder}{os.sep}", "").rstrip()
    else:
        raise AssertionError(f"{use.title}: the call is not refused:\n{use.code}")
    return (
        f"### {use.title}\n\n```python\n{use.code}\n```\n\n```text\n{message}\n```\n\n{use.why} Type instead:\n\n"
        f"```python\n{use.instead}\n```\n"
    )


if __name__ == "__main__":
    made = page()
    sys.stdout.write(made)
