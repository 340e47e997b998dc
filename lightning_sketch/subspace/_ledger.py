"""The finished runs of a search, in a small JSON file beside the logs, so that a restarted search skips them.

A run is found again by its settings: initial weights, directions, learning rate, metric and length of training.
"""

import json
from pathlib import Path
from typing import Any

from lightning_sketch._files import commit

# What is recorded of a run: kind, dim (n for full training), seed, value of the metric, optimizer steps, and status.
Run = dict[str, Any]


class Ledger:
    """The finished runs in a file, looked up by their settings.

    Args:
        path: The JSON file, which need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries = self._read()

    def find(self, settings: dict[str, Any]) -> Run | None:
        """Return the finished run with these settings, or None."""
        asked = json.loads(json.dumps(settings))
        return next((entry["run"] for entry in self.entries if entry["settings"] == asked), None)

    def add(self, settings: dict[str, Any], run: Run, write: bool) -> None:
        """Record a finished run, after reading again what other searches have written since.

        Args:
            settings: What the run is found by, serializable as JSON.
            run: The run.
            write: Whether to write the file; True on one rank only.
        """
        self.entries = self._read()
        self.entries.append({"settings": json.loads(json.dumps(settings)), "run": run})
        if write:
            commit(self.path, json.dumps(self.entries, indent=1).encode())

    def _read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else []
