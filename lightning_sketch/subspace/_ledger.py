"""The runs of a search that are done, in a small JSON file beside the logs, so that a restart goes on where it was.

A run counts as done for whoever asks with the same settings: the same initial weights, directions, rates, metric and
length.
"""

import json
from pathlib import Path
from typing import Any

from lightning_sketch._files import commit

Run = dict[str, Any]
"""Of one run: dim (n for full training), seed, value of the metric, optimizer steps, and status."""


class Ledger:
    """Runner under their settings.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries = self._read()

    def find(self, settings: dict[str, Any]) -> Run | None:
        """The run with these settings, if it is done."""
        asked = json.loads(json.dumps(settings))
        return next((entry["run"] for entry in self.entries if entry["settings"] == asked), None)

    def add(self, settings: dict[str, Any], run: Run, write: bool) -> None:
        """Note a run that is done; `write` on one rank only. What another search has noted meanwhile stays."""
        self.entries = self._read()
        self.entries.append({"settings": json.loads(json.dumps(settings)), "run": run})
        if write:
            commit(self.path, json.dumps(self.entries, indent=1).encode())

    def _read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else []
