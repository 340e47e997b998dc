"""Makes code of the examples in docstrings, which Markdown would take for quotations."""

import re
from typing import Any

import griffe


class Fenced(griffe.Extension):
    """Puts the doctests of each docstring between fences."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object, when it was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\n|\Z)", fence, obj.docstring.value, flags=re.DOTALL
            )


def fence(found: re.Match[str]) -> str:
    """Return a doctest as a block of code."""
    return f"```pycon\n{found[1]}\n```"
