"""The runs of a store and their lineage: which rows are visible after interruptions and resumes.

Each run of a Trainer that writes rows has a number, and a fit that resumes from a checkpoint also has a parent: the run
that was writing when the checkpoint was saved, and the step of the checkpoint. The lineage of a fit is the chain of
runs that it resumed through. A row of a run in the lineage is visible if its step is not beyond the steps at which the
later runs branched off:

    visible(row) = row.step <= min of run.parent_step over the later runs of the lineage

so each step of a lineage has its rows exactly once. Runs that measure a checkpoint (validate, test, predict) have no
parent: of several in one stage at the same weights, the last is visible. Runs are ordered by number, not by clock.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_sketch._files import write_once
from lightning_sketch.store.manifest import kept_steps

RunStage = Literal["fit", "validate", "test", "predict"]

_FOREVER = 1 << 62


@dataclass(frozen=True)
class Run:
    """A run of a Trainer that writes rows.

    Args:
        number: 1, 2, ... in the order in which runs began.
        stage: "fit", "validate", "test" or "predict".
        parent: Number of the run that this one resumes, if any.
        parent_step: Optimizer steps done at the checkpoint that this run resumes from.
        world_size: Number of processes that write.
    """

    number: int
    stage: RunStage = "fit"
    parent: int | None = None
    parent_step: int | None = None
    world_size: int = 1


def begin_run(
    folder: Path, stage: RunStage, parent: int | None = None, parent_step: int | None = None, world_size: int = 1
) -> Run:
    """Record a new run under the next free number; of several processes each gets its own.

    Args:
        folder: The folder of the store.
        stage: As in `Run`.
        parent: As in `Run`.
        parent_step: As in `Run`.
        world_size: As in `Run`.

    Raises:
        ValueError: if the stage or the parent is unknown, or compaction has dropped the parent's last steps.
    """
    if stage not in get_args(RunStage):
        raise ValueError(f"stage={stage!r} does not write a run; use one of {', '.join(get_args(RunStage))}.")
    known = {run.number for run in read_runs(folder)}
    if parent is not None and parent not in known:
        raise ValueError(
            f"the checkpoint resumes run {parent}, which is not in {folder} (it has {sorted(known)}); use the folder "
            "that was written when the checkpoint was saved, or an empty one."
        )
    kept = _FOREVER if parent is None else kept_steps(folder).get(parent, _FOREVER)
    if parent_step is not None and parent_step > kept:
        raise ValueError(
            f"the checkpoint resumes run {parent} at step {parent_step}, but compact() has kept only the first {kept} "
            "steps of that run, those that the latest fit resumed from; use a later checkpoint, or another folder."
        )
    number = max(known, default=0)
    while True:
        number += 1
        run = Run(number, stage, parent, parent_step, world_size)
        if write_once(_path(folder, number), json.dumps(asdict(run)).encode()):
            return run


def read_runs(folder: Path) -> list[Run]:
    """Read all runs of a store, in order of their numbers."""
    return [Run(**json.loads(path.read_text())) for path in sorted((folder / "attempts").glob("*.json"))]


def lineage_of(runs: Sequence[Run], last: int | None = None) -> dict[int, int]:
    """Return the runs of a fit's lineage, in order, each with the last of its steps that is visible.

    Args:
        runs: All runs of a store.
        last: Number of the fit whose lineage it is; the latest if None.

    Raises:
        ValueError: if there is no such fit.

    >>> lineage_of([Run(1), Run(2, parent=1, parent_step=50), Run(3, parent=1, parent_step=20)])[1]
    20
    """
    by_number = {run.number: run for run in runs}
    fits = [run.number for run in runs if run.stage == "fit"]
    if last is not None and last not in fits:
        raise ValueError(f"lineage={last} is no fit of the store; its fits are {fits}.")
    current = last if last is not None else max(fits, default=None)
    lineage, until = {}, _FOREVER
    while current is not None:
        lineage[current] = until
        run = by_number[current]
        until = min(until, _FOREVER if run.parent_step is None else run.parent_step)
        current = run.parent
    return dict(sorted(lineage.items()))


def _path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:08d}.json"
