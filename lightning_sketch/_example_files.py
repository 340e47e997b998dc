"""Files of training examples, which the command line shows."""

import json
import re
from pathlib import Path
from typing import Any


def read_examples(path: Path, id_type: type) -> Any:
    """Read training examples from a file of texts or of images.

    Args:
        path: A .txt file with a text on each line; .jsonl with a text, or an object with a `text`, on each line; .json
            with a list of these, or an object by ids; or .npy, images.
        id_type: The type of the ids, into which the keys of an object are converted.

    Raises:
        ValueError: If it is another kind of file, or is not what it should be; the message names the line.
    """
    if path.suffix == ".npy":
        import numpy as np

        return np.load(path, mmap_mode="r")
    if path.suffix not in (".txt", ".jsonl", ".json"):
        raise ValueError(f"training examples are read from .txt, .jsonl, .json or .npy, got {path}; use one of these.")
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # other separators may be in a text
    if path.suffix == ".txt":
        return lines
    if path.suffix == ".jsonl":
        return [_text(_json(line, f"line {number} of {path}")) for number, line in enumerate(lines, 1)]
    found = _json("\n".join(lines), str(path))
    if isinstance(found, list):
        return [_text(value) for value in found]
    if not isinstance(found, dict) or (id_type is int and not all(re.fullmatch("-?[0-9]+", key) for key in found)):
        raise ValueError(f"{path} must have a list of examples, or an object of them by the ids of the store.")
    return {id_type(key): _text(value) for key, value in found.items()}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error


def _text(value: Any) -> Any:
    return value.get("text", value) if isinstance(value, dict) else value


def example_of(examples: Any, id: Any, path: Any) -> Any:
    """Return the example of an id.

    Raises:
        ValueError: If there is none; the message names the file.
    """
    try:
        return examples[id]
    except (KeyError, IndexError, TypeError) as error:
        way = "in a .json file by their ids" if isinstance(id, str) else "in their order"
        raise ValueError(f"{path} has no example {id!r}, which the store has; pass the data {way}.") from error
