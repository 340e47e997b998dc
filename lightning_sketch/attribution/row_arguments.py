"""The arguments that rows of a store were computed with, which its queries inherit.

Numbers and words are in the record of the run. Functions are known in the process that has written the rows; in another
one they are found again if they have a name in a module that is imported there, and missed aloud if not.
"""

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sketch.store.format import Run

# With their defaults.
INHERITED: dict[str, Any] = {
    "loss_fn": None,
    "row_fn": None,
    "weight_fn": None,
    "reduction": None,
    "num_examples": None,
    "batch_dim": 0,
    "split_fn": None,
}

_functions: dict[str, dict[str, Any]] = {}  # by the UUID of the run that they were used in


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's record keeps of arguments: those that are not the default, functions by their names."""
    given = {name: value for name, value in arguments.items() if value != INHERITED[name]}
    return {name: {"function": _name(value)} if callable(value) else value for name, value in given.items()}


def remember(run: str, arguments: Mapping[str, Any]) -> None:
    """Keep the functions of a run, given by its UUID, for queries in this process."""
    _functions[run] = {name: value for name, value in arguments.items() if callable(value)}


def inherited(runs: Sequence[Run], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of queries: those that are given, and else those of the rows of the last of the runs.

    Warns:
        UserWarning: if the rows were computed by a function that is not known in this process.
    """
    recorded = runs[-1].arguments if runs else {}
    known = _functions.get(runs[-1].id, {}) if runs else {}
    found, missed = dict(given), []
    for name, value in recorded.items():
        if name not in given or given[name] != INHERITED[name]:
            continue
        if not isinstance(value, dict):
            found[name] = value
            continue
        found[name] = known.get(name) or _by_name(value["function"])
        if found[name] is None:
            missed.append(f"{name}={value['function']}")
    if missed:
        warnings.warn(
            f"the rows were computed with {', '.join(missed)}, which is not known in this process; pass the same "
            "function, or queries may be of another loss.",
            stacklevel=3,
        )
    return found


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


def _by_name(name: str) -> Any:
    """Return the function of this name in a module that is imported; None if there is none."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module) if module != "__main__" else None  # another script has other functions
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if inspect.isfunction(found) else None
